"""`pipeline cache`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import JsonOption
from pipeline.cli.verb import Verbs

if TYPE_CHECKING:
    from pipeline.store.description import Description
    from pipeline.store.garbage import Collection
    from pipeline.store.integrity import Verification

NAMES_SHOWN = 20

app = Verbs(help="The store of artifacts.", no_args_is_help=True)

ArtifactArgument = Annotated[
    str,
    typer.Argument(metavar="ARTIFACT", help="RECIPE/STAGE, or the beginning of an artifact's digest or a stage's key."),
]


@app.command("path")
def path_verb() -> None:
    """Print the store's folder."""
    from pipeline.store import default_store_path

    typer.echo(str(default_store_path()))


@app.command("list")
def list_verb(json: JsonOption = False) -> None:
    """List the stages whose artifacts are in the store, the newest first."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.output import console, print_json
    from pipeline.report.figures import megabytes
    from pipeline.store import Store, default_store_path
    from pipeline.store.listing import list_store

    listing = list_store(Store(default_store_path()))
    if json:
        print_json(listing.model_dump(mode="json"))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("made (UTC)", "recipe", "stage", "pass", "artifact", "format"):
        table.add_column(column, overflow="fold")
    for column in ("size", "in store", "alone"):
        table.add_column(column, justify="right", overflow="fold")
    for row in listing.stages:
        table.add_row(
            row.created[:16].replace("T", " "),
            escape(row.recipe),
            row.stage,
            row.pass_name,
            row.artifact[:12] + (" pinned" if row.pinned else ""),
            row.format,
            megabytes(row.size_bytes),
            megabytes(row.stored_bytes),
            megabytes(row.unique_bytes),
        )
    output = console()
    output.print(table)
    output.print(
        f"stages: {len(listing.stages)}; the store takes {megabytes(listing.total_bytes)} in {escape(listing.folder)}",
        soft_wrap=True,
    )
    if listing.damaged:
        output.print(f"missing or damaged, not shown: {listing.damaged}; `pipeline cache verify` names them")


@app.command("show")
def show_verb(artifact: ArtifactArgument, json: JsonOption = False) -> None:
    """Show all parts of an artifact: files, tensors, interface, lineage, cost."""
    from pipeline.cli.output import print_json
    from pipeline.store import Store, default_store_path
    from pipeline.store.description import describe_artifact, find_artifact

    store = Store(default_store_path())
    found = describe_artifact(store, find_artifact(store, artifact))
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        for line in _in_words(found):
            typer.echo(line)


@app.command("verify")
def verify_verb(
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is damaged, so that the next run makes it again.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Read every byte of the store and of the files that it refers to; name what is damaged.

    Ends with 1 where something is, unless --delete removed it.
    """
    from pipeline.cli.output import print_json
    from pipeline.store import Store, default_store_path
    from pipeline.store.integrity import verify_store

    found = verify_store(Store(default_store_path()), delete=delete)
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        _print_verification(found, delete=delete)
    return 1 if found.damages and not delete else 0


@app.command("gc")
def gc_verb(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed; remove nothing.")] = False,
    older_than: Annotated[
        float,
        typer.Option("--older-than", metavar="DAYS", min=0, help="Only artifacts not made or used for so many days."),
    ] = 0,
    keep_last: Annotated[
        int | None,
        typer.Option("--keep-last", metavar="N", min=0, help="Of each recipe, only the last N runs keep artifacts."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Remove from the store what no run's folder, pin or running process needs.

    A run keeps its artifacts for as long as its folder exists. Files that the store only refers to are never touched.
    """
    from pipeline.cli.output import print_json
    from pipeline.store import Store, default_store_path
    from pipeline.store.garbage import collect_garbage

    store = Store(default_store_path())
    done = collect_garbage(store, dry_run=dry_run, older_than_days=older_than, keep_last=keep_last)
    if json:
        print_json({**done.model_dump(mode="json"), "freed_bytes": done.freed_bytes})
    else:
        _print_collection(done)


@app.command("pin")
def pin_verb(
    artifact: ArtifactArgument,
    note: Annotated[str, typer.Option("--note", help="Why, for those who meet the pin later.")] = "",
) -> None:
    """Keep an artifact, whatever `gc` would do, until it is unpinned."""
    from pipeline.store import Store, default_store_path
    from pipeline.store.description import find_artifact
    from pipeline.store.roots import pin

    store = Store(default_store_path())
    digest = find_artifact(store, artifact)
    pin(store, digest, note)
    typer.echo(f"pinned {digest[:12]}")


@app.command("unpin")
def unpin_verb(artifact: ArtifactArgument) -> None:
    """Leave a pinned artifact to `gc` again."""
    from pipeline.errors import RecipeError, did_you_mean
    from pipeline.store import Store, default_store_path
    from pipeline.store.description import find_artifact
    from pipeline.store.roots import pins, unpin

    store = Store(default_store_path())
    pinned = [digest for digest in pins(store) if digest.startswith(artifact)]
    digest = pinned[0] if len(pinned) == 1 else find_artifact(store, artifact)
    if not unpin(store, digest):
        known = [d[:12] for d in pins(store)]
        raise RecipeError(f"{digest[:12]} is not pinned", hint=did_you_mean(artifact, known, noun="pinned"))
    typer.echo(f"unpinned {digest[:12]}")


def _print_verification(found: Verification, *, delete: bool) -> None:
    from pipeline.report.figures import megabytes

    typer.echo(f"read {found.files} files, {megabytes(found.bytes_read)}, of {found.artifacts} artifacts")
    for damage in found.damages:
        typer.echo(f"{damage.fault} {damage.kind}: {damage.path}: {damage.detail}")
        if damage.stages:
            typer.echo(f"  needed by {', '.join(damage.stages)}")
    if not found.damages:
        typer.echo("nothing is damaged")
    elif delete:
        typer.echo(f"deleted {found.deleted} files of the store; the next run makes them again")
    else:
        typer.echo(f"damaged: {len(found.damages)}; the next run that needs one makes it again; --delete removes them")


def _print_collection(done: Collection) -> None:
    from pipeline.report.figures import megabytes

    would = "would remove" if done.dry_run else "removed"
    for part in done.removed:
        typer.echo(f"{would} {part.kind}: {part.count}" + (f", {megabytes(part.bytes)}" if part.bytes else ""))
        for name in part.names[:NAMES_SHOWN]:
            typer.echo(f"  {name}")
        if len(part.names) > NAMES_SHOWN:
            typer.echo(f"  and {len(part.names) - NAMES_SHOWN} more")
    reasons = ", ".join(f"{count} for {why}" for why, count in done.kept_for.items())
    kept = f"kept artifacts: {done.kept_artifacts}" + (f" ({reasons})" if reasons else "")
    typer.echo(f"{would} {megabytes(done.freed_bytes)} in all; {kept}")


def _in_words(found: Description) -> list[str]:
    from pipeline.report.figures import megabytes

    lines = [
        f"artifact {found.artifact}",
        f"format {found.format}, {megabytes(found.size_bytes)} written out alone, weights "
        f"{megabytes(found.weights_bytes)}",
    ]
    if found.problem:
        lines.append(f"DAMAGED: {found.problem}")
    for component in found.components:
        lines.append(f"component {component.name} ({component.format})")
        lines += [f"  {t.count} tensors {t.dtype}, {megabytes(t.bytes)}" for t in component.tensors]
        lines += [_file_in_words(f) for f in component.files]
    if found.files:
        lines.append("files of all components")
        lines += [_file_in_words(f) for f in found.files]
    length = f", at most {found.max_length} positions" if found.max_length else ""
    vocabulary = f", vocabulary {found.vocab_size}" if found.vocab_size else ""
    lines.append(f"interface {found.task}{vocabulary}{length}")
    if found.cache:
        c = found.cache
        how = ", extended in place" if c.in_place else ""
        lines.append(
            f"  cache: {c.layers} layers of [B, {c.kv_heads}, T, {c.head_dim}] {c.dtype}, keys and values{how}"
        )
    for direction, names in (("inputs", found.inputs), ("outputs", found.outputs)):
        if names:
            lines.append(f"  {direction}: {_names_in_words(names)}")
    if found.execution:
        lines.append("execution " + ", ".join(f"{k} {_told(v)}" for k, v in found.execution.items()))
    if found.transforms:
        lines.append("transforms " + ", ".join(str(t.get("name", t)) for t in found.transforms))
    if found.lineage:
        parents = f" from {', '.join(p[:12] for p in found.lineage.parents)}" if found.lineage.parents else ""
        lines.append(f"made by {found.lineage.pass_name}{parents}")
    for record in found.records:
        made = f"key {record.key[:12]}: {record.recipe}/{record.stage}, {record.created[:16].replace('T', ' ')} UTC"
        cost = f", {record.wall_s:.1f} s" if record.wall_s is not None else ""
        memory = f", peak {megabytes(record.peak_memory_bytes)}" if record.peak_memory_bytes else ""
        lines.append(made + cost + memory)
    if found.pinned is not None:
        lines.append("pinned" + (f": {found.pinned}" if found.pinned else ""))
    lines += [f"kept for the run {folder}" for folder in found.runs]
    return lines


def _told(value: object) -> str:
    """What stands in an execution block: `crossover_tokens 16` of a mapping."""
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _file_in_words(file: object) -> str:
    from pipeline.report.figures import megabytes
    from pipeline.store.description import FileFacts

    assert isinstance(file, FileFacts)
    size = megabytes(file.size_bytes) if file.size_bytes >= 50_000 else f"{file.size_bytes} B"
    place = f"refers to {file.path}" if file.referenced else f"blob {file.digest[:12]}"
    name = file.name if len(file.name) < 40 else file.name[:20] + "…"
    return f"  {name}, {size}, {place}"


def _names_in_words(names: dict[str, str]) -> str:
    """Roles and tensor names; of numbered ones, the first stands for all."""
    first = {role: name for role, name in names.items() if "[" not in role or role.endswith("[0]")}
    more = len(names) - len(first)
    listed = ", ".join(role if role == name else f"{role} = {name}" for role, name in first.items())
    return listed + (f" and {more} more" if more else "")
