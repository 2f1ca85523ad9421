"""`pipeline hardware`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import JsonOption
from pipeline.cli.verb import Verbs

if TYPE_CHECKING:
    from pipeline.hardware import Gpu

app = Verbs(help="Hardware profiles, and this machine.", invoke_without_command=True, no_args_is_help=False)


@app.callback()
def list_verb(context: typer.Context, json: JsonOption = False) -> None:
    """List the hardware profiles."""
    if context.invoked_subcommand is not None:
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.output import console, print_json
    from pipeline.hardware import describe_host, load_profile, profile_names
    from pipeline.hardware.probe import probe_folder
    from pipeline.store import default_store_path

    host, probed = describe_host(), probe_folder(default_store_path())
    profiles = [load_profile(name, host=host, probe_folder=probed) for name in [*profile_names(), "local"]]
    if json:
        print_json([p.model_dump(mode="json") for p in profiles])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("profile", "device", "model"):
        table.add_column(column, overflow="fold")
    for column in ("cores", "memory", "bandwidth"):
        table.add_column(column, justify="right", overflow="fold")
    for p in profiles:
        memory = f"{p.memory_bytes / 2**30:.0f} GiB" if p.memory_bytes else "–"
        bandwidth = f"{p.bandwidth_gb_per_s:.0f} GB/s" if p.bandwidth_gb_per_s else "not measured"
        table.add_row(p.name, p.device, escape(p.model), str(p.physical_cores or "–"), memory, bandwidth)
    output = console()
    output.print(table)
    for gpu in host.gpus:
        output.print(escape(_of_the_gpu(gpu, [p.name for p in profiles if p.model == gpu.name])), soft_wrap=True)


@app.command("show")
def show_verb(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A profile's name or file, or local.")] = "local",
    probe: Annotated[bool, typer.Option("--probe", help="Measure this machine again.")] = False,
    json: JsonOption = False,
) -> None:
    """Show a profile and where each figure comes from. `local` is measured the first time."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pipeline.cli.output import console, print_json
    from pipeline.hardware import describe_host, load_profile, local_profile
    from pipeline.hardware.probe import probe as measure
    from pipeline.hardware.probe import probe_folder
    from pipeline.store import default_store_path

    host = describe_host()
    if name == "local":
        profile = local_profile(host, measure(host, probe_folder(default_store_path()), again=probe))
    else:
        profile = load_profile(name, host=host)
    if json:
        print_json(profile.model_dump(mode="json"))
        return
    output = console()
    output.print(f"[bold]{escape(profile.name)}[/]  {escape(profile.description)}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("figure", "value", "source"):
        table.add_column(column, overflow="fold")
    values = profile.model_dump(mode="json", exclude={"name", "description", "sources"})
    for field, value in values.items():
        table.add_row(field, escape(_in_words(value)), escape(profile.sources.get(field, "")))
    output.print(table)


def _of_the_gpu(gpu: Gpu, names: list[str]) -> str:
    """One line about a GPU of this machine, and the profiles that describe it."""
    memory = f", {gpu.memory_bytes / 2**30:.0f} GiB" if gpu.memory_bytes else ""
    driver = f", driver {gpu.driver}" if gpu.driver else ""
    profile = f"`hardware: {' or '.join(names)}`" if names else "a profile of your own with `device: cuda`"
    return f"this machine has a {gpu.name}{memory}{driver}: {profile} runs on it, `local` on the processor"


def _in_words(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {v if v is not None else 'none'}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
