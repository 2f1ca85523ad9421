"""The report as Markdown in GitHub's dialect: tables, sentences, sample texts. Strangers' words are escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from pipeline.report import figures
from pipeline.report import words as words_of
from pipeline.report.effects import changed_counts, effect_facts, most_changed
from pipeline.report.machines import host_facts, measured_on, target_facts
from pipeline.report.points import TIME_WORDS, point_in_words, points_of, timed_at
from pipeline.report.printable import without_controls
from pipeline.report.schema import Divergence, Report, Speed, StageReport
from pipeline.report.tables import Table as Figures
from pipeline.report.tables import ablation_table, roofline_table
from pipeline.report.verdicts import (
    RATIO_NOTE,
    counts_in_words,
    is_contradicted,
    margin_of,
    outliers_in_words,
    schedule_in_words,
    why_undecided,
)

SPECIAL = re.compile(r"([\\`*\[\]|~$]|^[#+\->]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
"""What Markdown takes for markup: anywhere, at the start of a line, or beside a word."""


def render_markdown(report: Report) -> str:
    """The whole page."""
    report = without_controls(report)
    parts = [
        _head(report),
        _gates(report),
        _speed(report),
        _quality(report),
        _figures(roofline_table(report)),
        _figures(ablation_table(report)),
        _resources(report),
        _stages(report),
        _where(report),
        _lock(report),
    ]
    return "\n\n".join("\n".join(part) for part in map(list, parts) if part) + "\n"


def plain(text: object) -> str:
    """A stranger's words in one line, none of them markup."""
    flat = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = SPECIAL.sub(r"\\\1", flat)
    # a bare address would become a link, and a name after an at sign would be called
    return escaped.replace("://", ":&#8203;//").replace("www.", "www&#8203;.").replace("@", "&#64;")


def code(text: object, *, in_table: bool = False) -> str:
    """Code in one line, in a fence that its contents cannot close."""
    flat = " ".join(str(text).split())
    if in_table:  # a table splits its cells before it sees code
        flat = flat.replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", flat)), default=0)
    fence = "`" * (longest + 1)
    space = " " if flat.startswith("`") or flat.endswith("`") or not flat else ""
    return f"{fence}{space}{flat}{space}{fence}"


def block(text: str) -> str:
    """Text in a fence that its contents cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; a header that begins with `>` has its column aligned to the right."""
    yield "| " + " | ".join(h.removeprefix(">") for h in header) + " |"
    yield "| " + " | ".join("---:" if h.startswith(">") else "---" for h in header) + " |"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _head(report: Report) -> Iterator[str]:
    yield f"# {plain(report.recipe)}"
    if report.description:
        yield f"\n{plain(report.description)}"
    yield ""
    for line in words_of.headline(report):
        shout = line.startswith("BROKEN")
        yield f"- **{plain(line)}**" if shout else f"- {plain(line)}"
    target = plain(report.hardware.get("name"))
    yield (
        f"\nMeasured on {plain(measured_on(report))}, {report.threads} threads; target {target}. "
        + ("" if target == "local" else "No measured figure here is one of the target. ")
        + f"Run {code(report.run)}, {plain(report.created)}, {figures.seconds(report.wall_s)}."
    )
    if report.model is not None:
        random = ": its weights are random, so perplexity means nothing, agreement with the baseline does"
        yield f"\nModel: {plain(report.model.source)}{random if report.model.random_weights else ''}."
    if report.cell is not None:
        overrides = code(json.dumps(report.cell.overrides, ensure_ascii=False))
        yield f"\nCell {report.cell.index} of 0 to {report.cell.of - 1} of the matrix: {overrides}."
    for note in report.notes:
        yield f"\n> {plain(note)}"


def _gates(report: Report) -> Iterator[str]:
    if not report.gates:
        return
    yield "## Gates\n"
    yield from table(
        ("gate", "result", ">deciding value", "why"),
        (
            (code(g.gate, in_table=True), _verdict(g.result), figures.gate_value(g.observed), plain(g.reason or ""))
            for g in report.gates
        ),
    )


def _speed(report: Report) -> Iterator[str]:
    points = points_of(report)
    if not points:
        return
    yield "## Speed\n"
    if report.schedule is not None:
        yield f"{schedule_in_words(report.schedule)}.\n"
    yield RATIO_NOTE
    base, margin = plain(report.baseline), margin_of(report)
    for point in points:
        rows = list(timed_at(report, point))
        floor = report.floor_at(point)
        noise = (
            f"{base} against itself {figures.floor_interval(floor.ratio_low, floor.ratio_high)}"
            if floor
            else f"{base} did not run against itself, so nothing is claimed"
        )
        first = point_in_words(point)
        yield f"\n### {plain(first[:1].upper() + first[1:])}\n"
        yield f"{counts_in_words([p for _, p in rows])}; {noise}.\n"
        lines = []
        for stage, own in rows:
            ratio, rate, time = own.vs_baseline, own.tokens_per_s, own.latency_s
            compared = (
                (figures.times(ratio.ratio), figures.times_interval(ratio.ratio, ratio, margin))
                if ratio
                else ("–",) * 2
            )
            lines.append(
                (
                    plain(stage.name),
                    figures.rate(rate.median),
                    figures.rate_interval(rate.median, rate),
                    figures.duration(time.median),
                    figures.duration_interval(time.median, time),
                    *compared,
                    _speed_verdict(stage, own, report),
                )
            )
        header = (
            "stage",
            ">tokens/s",
            ">95 %",
            f">{TIME_WORDS[point.kind]}",
            ">95 %",
            f">× {base}",
            ">95 %",
            "verdict",
        )
        yield from table(header, lines)


def _speed_verdict(stage: StageReport, point: Speed, report: Report) -> str:
    """The verdict, why there is none, and what speaks against believing or using it."""
    if point.vs_baseline is None:
        words = ["baseline" if stage.name == report.baseline else "–"]
    else:
        words = [_verdict(point.vs_baseline.verdict)]
        words += filter(None, [plain(why_undecided(point.vs_baseline, point, report))])
    if is_contradicted(stage, point, report):
        words.append("**contradiction**: it changed nothing")
    if words_of.is_broken(stage):
        words.append(_verdict("broken"))
    if flag := words_of.short_flag(stage):
        words.append(f"**{plain(flag)}**")
    words += filter(None, [outliers_in_words(point)])
    return ", ".join(words)


def _quality(report: Report) -> Iterator[str]:
    scored = [(s, s.quality) for s in report.stages if s.quality is not None]
    if not scored:
        return
    tokens = max(quality.tokens for _, quality in scored)
    base, random = plain(report.baseline), words_of.has_random_weights(report)
    if random:
        yield f"## Agreement with {base} on {tokens:,} tokens\n"
        yield "The weights are random: perplexity means nothing here, agreement with the baseline does.\n"
    else:
        yield f"## Quality on {tokens:,} held-out tokens\n"
    rows = []
    for stage, quality in scored:
        paired = quality.vs_baseline
        ratio = paired.perplexity_ratio if paired else None
        perplexity = (
            figures.number(quality.perplexity, ".3f"),
            figures.finer_times(ratio.ratio) if ratio else "–",
            figures.finer_interval(ratio.ratio, ratio) if ratio else "–",
        )
        verdict = "baseline" if stage.name == report.baseline else "–"
        if paired:
            verdict = _verdict(paired.verdict) + (f": {plain(why)}" if (why := words_of.reason_to_tell(paired)) else "")
        rows.append(
            (
                plain(stage.name),
                *(() if random else perplexity),
                figures.number(paired.kl_divergence, ".2g") if paired else "–",
                figures.percent(paired.top1_agreement) if paired else "–",
                figures.number(paired.max_abs_logit_error, ".3g") if paired else "–",
                verdict,
            )
        )
    header = ("stage", *(() if random else (">perplexity", f">× {base}", ">95 %")), ">KL", ">same top token")
    yield from table((*header, ">largest logit error", "verdict"), rows)
    if report.pareto:
        told = f"No other stage was shown to beat these in {words_of.front_kind(report)} speed and quality"
        yield f"\n{told}: {plain(', '.join(report.pareto))}."


def _figures(found: Figures | None) -> Iterator[str]:
    """A table that every renderer shows alike."""
    if found is None:
        return
    yield f"## {found.title}\n"
    yield f"{plain(found.note)}\n"
    yield from table(found.header, (tuple(map(plain, row)) for row in found.rows))


def _resources(report: Report) -> Iterator[str]:
    made = [s for s in report.stages if s.artifact is not None]
    if not made:
        return
    yield "## Cost and memory\n"
    yield "Memory is anonymous plus shared memory of the processes, sampled; estimates were made before anything ran.\n"
    estimated = any(s.predicted_memory for s in made)
    header = ["stage", ">size", ">load cold", ">warm", ">memory to run", ">made in", ">memory to make"]
    earned = any(s.break_even for s in made)
    header += [">earned back after"] if earned else []
    header += [">estimated to run", ">estimated to make", "fits the target"] if estimated else []
    rows = []
    for s in made:
        row = [
            plain(s.name),
            figures.megabytes(s.artifact.size_bytes if s.artifact else None),
            figures.seconds(s.load.cold_s if s.load else None),
            figures.seconds(s.load.warm_s if s.load else None),
            figures.megabytes(s.inference_peak_memory_bytes),
            figures.seconds(s.cost.wall_s),
            figures.megabytes(s.cost.peak_memory_bytes),
        ]
        row += [words_of.earned_back(s.break_even)] if earned else []
        if estimated:
            predicted = s.predicted_memory
            row += [
                figures.megabytes(predicted.inference_bytes if predicted else None),
                figures.megabytes(predicted.conversion_bytes if predicted else None),
                {True: "yes", False: "**no**", None: "–"}[predicted.fits if predicted else None],
            ]
        rows.append(row)
    yield from table(header, rows)


def _stages(report: Report) -> Iterator[str]:
    yield "## Stages"
    for stage in report.stages:
        yield f"\n### {plain(stage.name)}\n"
        source = f", from {code(stage.parent)}" if stage.parent else ""
        exported = ", exported" if stage.name == report.export else ""
        exported += ", made for the ablation alone" if words_of.is_extra(stage, report) else ""
        yield f"{code(stage.pass_)}{source}, {stage.status}{exported}\n"
        yield plain(words_of.sentence(stage, report))
        yield from _details(stage)


def _details(stage: StageReport) -> Iterator[str]:
    if given := {k: v for k, v in stage.params.items() if v is not None}:
        told = ", ".join(f"{code(f'{k}: {json.dumps(v, ensure_ascii=False)}')}" for k, v in given.items())
        yield f"\nParameters: {told}"
    if facts := [(term, said) for term, said in effect_facts(stage) if term != "nodes"]:
        yield "\nFound by comparing: " + "; ".join(f"{plain(term)} {plain(said)}" for term, said in facts)
    for title, counts in changed_counts(stage):
        told = ", ".join(f"{code(name)} {before} → {after}" for name, (before, after) in most_changed(counts))
        yield f"\n{title}: {told}"
    if stage.quality and stage.quality.divergence:
        yield from _divergence(stage.quality.divergence)
    if stage.log:
        yield f"\nLog: {code(stage.log)}"
    quality = stage.quality
    if quality is not None and quality.sample_text is not None:
        paired = quality.vs_baseline
        where = ""
        if paired is not None:
            at = paired.first_divergence
            where = ", the baseline's text" if at is None else f", leaves the baseline's at token {at}"
        yield f"\nGreedy continuation{where}:\n"
        yield block((quality.sample_prompt or "") + quality.sample_text)


def _divergence(found: Divergence) -> Iterator[str]:
    matched = f", {found.matched[0]} of {found.matched[1]} layers matched" if found.matched else ""
    part = f" of {code(found.component)}" if found.component else ""
    against = code(words_of.reference_in_words(found))
    yield f"\nLayers{part} against {against} on {found.tokens:,} tokens{matched}:\n"
    rows = []
    for layer in found.layers:
        error = "not finite" if layer.relative_error is None else figures.number(layer.relative_error, ".2g")
        own = figures.number(layer.added, ".2g") if layer.added is not None else "–"
        rows.append((plain(layer.layer), error, own, words_of.layer_mark(layer.layer, found)))
    yield from table(("layer", ">relative error", ">by itself", ""), rows)


def _where(report: Report) -> Iterator[str]:
    yield "## Where it ran\n"
    yield from table(("host, measured here", ""), ((plain(n), plain(v)) for n, v in host_facts(report)))
    yield ""
    yield from table(("target, from its profile", ""), ((plain(n), plain(v)) for n, v in target_facts(report.hardware)))


def _lock(report: Report) -> Iterator[str]:
    yield "## What it depended on\n"
    rows = [(plain(n), code(v, in_table=True)) for n, v in report.lock.packages.items()]
    rows.append(("seed", str(report.lock.seed)))
    rows += [(f"digest of {plain(name)}", code(digest, in_table=True)) for name, digest in report.lock.digests.items()]
    yield from table(("", ""), rows)


def _verdict(word: str) -> str:
    loud = word in {"broken", "failed"}
    told = word.replace("_", " ")
    return f"**{told.upper() if word == 'broken' else told}**" if loud else told
