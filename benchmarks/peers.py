"""This project's artifacts beside other tools: the same checkpoint, the same tokens, all of them taking turns.

    python benchmarks/peers.py /var/tmp/peers                        # everything, and docs/peers.md
    python benchmarks/peers.py /var/tmp/peers --steps page           # the page again, from what was measured
    python benchmarks/peers.py /var/tmp/peers --only llama.cpp --set model.architecture.num_hidden_layers=2

The checkpoint is that of recipes/llama-1b-cpu.yaml, in float32. Each tool lives in a virtual environment of its own below
ENVIRONMENTS, made where it is missing from benchmarks/peers/requirements/NAME.txt; llama-cpp-python is built from its
source with the host's instruction sets, which takes a quarter of an hour on two cores.

A tool converts the checkpoint in a process that is watched (`convert`). Then every candidate is scored against torch in
float32, as it is used: the prompt in one pass, each token after it in a step (`quality`), on this model and on
llama2-tiny. Then all of them take turns in shuffled rounds (`speed`). What a step found lies in WORK; a step that is run
again finds conversions already made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder has a package with this file's name

from benchmarks.peers import page, targets  # noqa: E402
from benchmarks.peers.candidates import (  # noqa: E402
    BEST,
    CANDIDATES,
    FP32,
    NEW_TOKENS,
    OURS,
    PROMPT,
    Candidate,
)
from benchmarks.peers.converting import Converted, convert, environment  # noqa: E402
from benchmarks.peers.measuring import (  # noqa: E402
    POINTS,
    Quality,
    Texts,
    drawn_tokens,
    measure_quality,
    measure_speed,
    speed_ratios,
    text_tokens,
)
from benchmarks.peers.ours import RECIPE  # noqa: E402
from benchmarks.peers.serving import CandidateWorker  # noqa: E402
from pipeline.hardware.host import describe_host  # noqa: E402
from pipeline.measure.samples import Sample  # noqa: E402
from pipeline.measure.scoring import Scored  # noqa: E402
from pipeline.measure.statistics import Interval, speed_figures  # noqa: E402

TINY = ROOT / "pipeline" / "models" / "builtin" / "llama2-tiny"
REQUIREMENTS = Path(__file__).parent / "peers" / "requirements"
STEPS = ("convert", "quality", "speed", "page")
SEED = 0
FIRST_PROMPTS, CONTINUED_PROMPTS = 48, 16
BUILD = {"llama_cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "PIP_NO_BINARY": "llama-cpp-python"}}
"""Variables under which an environment's packages are installed."""

SHOWN = (
    "llama_cpp_python", "llama-cpp-python", "gguf", "openvino", "nncf", "optimum", "optimum-intel", "onnxruntime",
    "onnxruntime-genai", "olive-ai", "torch", "transformers",
)  # fmt: skip


class Comparison:
    """Where things lie, and who takes part."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work.resolve()
        self.environments: Path = (options.environments or self.work / "environments").resolve()
        self.logs = self.work / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.overrides: list[str] = options.set
        self.threads = describe_host().physical_cores
        self.launches: int = options.launches
        self.rounds: int = options.rounds
        wanted = [part.lower() for part in options.only or [""]]
        self.candidates = [c for c in CANDIDATES if any(w in c.name.lower() for w in wanted) or c.name == BEST]

    # Where things are

    def python(self, name: str) -> Path:
        """The interpreter of an environment, which is made where it is missing."""
        if name == OURS:
            return Path(sys.executable)
        folder = self.environments / name
        python = folder / "bin" / "python"
        if not python.exists():
            tell(f"making {folder}; this takes minutes")
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS / f"{name}.txt")]
            subprocess.run(install, check=True, env={**os.environ, **BUILD.get(name, {})})
        return python

    def checkpoint(self, model: str) -> Path:
        """The float32 checkpoint of `model`, made where it is missing."""
        folder = self.work / model / "checkpoint"
        if folder.exists():
            return folder
        aside = self.work / model / "making"
        shutil.rmtree(aside, ignore_errors=True)
        if model == "tiny":
            self._process("torch_models", {"dtype": "float32"}, TINY, aside)
        else:
            tell("drawing the checkpoint")
            command = [sys.executable, "-m", "pipeline", "run", str(RECIPE), "--no-measure", "--only", "source"]
            command += ["--set", "export=source", "--runs", str(aside / "runs")]
            command += [word for override in self.overrides for word in ("--set", override)]
            store = {**os.environ, "PIPELINE_STORE": str(aside / "store")}
            subprocess.run(command, check=True, env=store, stdout=subprocess.DEVNULL)
            made = aside / "runs" / RECIPE.stem / "latest" / "model"
            made.resolve().rename(aside / "model")
            shutil.rmtree(aside / "store")
            aside = aside / "model"
        for name in ("tokenizer.json", "tokenizer_config.json"):  # some converters ask for one; it is not used
            shutil.copy(TINY / name, aside / name)
        aside.rename(folder)
        return folder

    def _process(self, adapter: str, given: dict[str, Any], checkpoint: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        command = [sys.executable, "-P", "-m", "benchmarks.peers.converting", adapter, json.dumps(given)]
        subprocess.run([*command, str(checkpoint), str(folder)], check=True, env=environment(self.threads))

    def start(self, candidate: Candidate, model: str, log: Path) -> CandidateWorker:
        """A process for the candidate."""
        conversion = candidate.conversion
        folder = self.work / model / (conversion.folder if conversion else "none")
        return CandidateWorker(
            candidate, self.python(candidate.environment), folder, self.checkpoint(model), self.threads, log
        )

    def converted(self, model: str) -> dict[str, Converted]:
        """What every conversion took, by its folder; those that were made are not made again."""
        found: dict[str, Converted] = {}
        for candidate in self.candidates:
            conversion = candidate.conversion
            if conversion is None or conversion.folder in found:
                continue
            tell(f"{model}: converting for {candidate.name}")
            log = self.logs / f"{model}-{conversion.folder}.log"
            python = self.python(conversion.environment)
            made = convert(conversion, python, self.checkpoint(model), self.work / model, threads=self.threads, log=log)
            if made.error:
                tell(f"  failed: {made.error}")
            found[conversion.folder] = made
        return found

    def ready(self, model: str) -> tuple[list[Candidate], dict[str, str]]:
        """Those that have been converted, and why the others have not."""
        made = self.converted(model)
        missing = {
            c.name: f"its conversion {error}"
            for c in self.candidates
            if c.conversion and (error := made[c.conversion.folder].error)
        }
        return [c for c in self.candidates if c.name not in missing], missing

    # Steps

    def convert(self) -> None:
        for model in ("tiny", "large"):
            self.converted(model)

    def quality(self) -> None:
        for model in ("tiny", "large"):
            candidates, missing = self.ready(model)
            folder = self.work / model / "scoring"
            folder.mkdir(parents=True, exist_ok=True)
            texts = Texts(folder / "tokens.npy", FIRST_PROMPTS, CONTINUED_PROMPTS)
            self._tokens(model, texts)
            measured, failures, described = measure_quality(
                candidates,
                lambda candidate, log, model=model: self.start(candidate, model, log),
                texts,
                folder=folder,
                logs=self.logs,
                tell=tell,
            )
            shutil.rmtree(folder)
            self.keep(
                f"quality-{model}",
                {
                    "date": f"{datetime.now(UTC):%Y-%m-%d}",
                    "quality": {name: _dumped(quality) for name, quality in measured.items()},
                    "failures": {**missing, **failures},
                    "described": {name: answer.get("described") for name, answer in described.items()},
                    "versions": _versions(described),
                },
            )

    def _tokens(self, model: str, texts: Texts) -> None:
        import numpy as np

        checkpoint = self.checkpoint(model)
        if model == "tiny":
            ids = text_tokens(checkpoint, TINY / "held_out.txt", texts.length)
        else:
            vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
            ids = drawn_tokens(vocabulary, texts.length, SEED)
        np.save(texts.tokens, ids)

    def speed(self) -> None:
        candidates, missing = self.ready("large")
        found = measure_speed(
            candidates,
            lambda candidate, log: self.start(candidate, "large", log),
            threads=self.threads,
            launches=self.launches,
            rounds=self.rounds,
            seed=SEED,
            logs=self.logs,
            tell=tell,
        )
        fields = asdict(found) | {"samples": [sample.model_dump(mode="json") for sample in found.samples]}
        fields["failures"] = {**missing, **found.failures}
        self.keep("speed", {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "launches": self.launches, **fields})

    def page(self) -> None:
        path = ROOT / "docs" / "peers.md"
        path.write_text(page.render(self._page()), encoding="utf-8")
        tell(f"wrote {path}")

    # What was kept

    def keep(self, name: str, found: dict[str, Any]) -> None:
        (self.work / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

    def kept(self, name: str) -> dict[str, Any]:
        path = self.work / f"{name}.json"
        if not path.exists():
            sys.exit(f"{path} is missing: the step that writes it has not run")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    # The page

    def _page(self) -> page.Page:
        speed = self.kept("speed")
        large, tiny = self.kept("quality-large"), self.kept("quality-tiny")
        qualities = {name: _quality(fields) for name, fields in large["quality"].items()}
        rows = self._rows(speed, large, qualities)
        conversions = self._conversions()
        rates = sorted(speed["bandwidth_gb_per_s"])
        reason = self.work / "reason.md"
        failures = {c.name: row.failure for c, row in zip(self.candidates, rows, strict=True) if row.failure}
        host = describe_host()
        versions = {**large["versions"]}
        versions["Python"] = ".".join(map(str, sys.version_info[:3]))
        return page.Page(
            best=BEST,
            model=_model(self.checkpoint("large")),
            date=speed["date"],
            host=f"{host.cpu_model}, {self.threads} threads",
            how=_how(speed, len({s["round"] for s in speed["samples"]})),
            rows=rows,
            noise=_noise(speed),
            bandwidth=Interval(median=rates[len(rates) // 2], low=rates[0], high=rates[-1]),
            conversions=conversions,
            trained=[self._quality_row(c, tiny) for c in self.candidates],
            verdicts=_verdicts(rows, conversions),
            remarks=_remarks(rows),
            missing=failures,
            versions=versions,
            reason=reason.read_text(encoding="utf-8").strip() if reason.exists() else "",
        )

    def _rows(self, speed: dict[str, Any], large: dict[str, Any], qualities: dict[str, Quality]) -> list[page.Row]:
        samples = [Sample.model_validate(fields) for fields in speed["samples"]]
        names = [c.name for c in self.candidates]
        figures = speed_figures(samples, baseline=BEST, parents=dict.fromkeys(names))
        ratios = speed_ratios(samples, [name for name in names if name != BEST])
        rows = []
        for candidate in self.candidates:
            name = candidate.name
            at = {p.kind: p.tokens_per_s for p in figures.stages.get(name, ())}
            over = {
                point.kind: Interval(median=ratio.ratio, low=ratio.low, high=ratio.high)
                for point in POINTS
                if (ratio := ratios.get((name, point))) is not None
            }
            quality = qualities.get(name)
            rows.append(
                page.Row(
                    name=name,
                    is_ours=candidate.is_ours,
                    prefill=at.get("prefill"),
                    decode=at.get("decode"),
                    prefill_ratio=over.get("prefill"),
                    decode_ratio=over.get("decode"),
                    first_divergence=quality.first.kl_divergence if quality else None,
                    following_divergence=quality.following.kl_divergence if quality else None,
                    agreement=quality.following.top1_agreement if quality else None,
                    memory_bytes=speed["memory_bytes"].get(name),
                    load_s=speed["load_s"].get(name),
                    failure=speed["failures"].get(name) or large["failures"].get(name),
                )
            )
        return rows

    def _conversions(self) -> list[page.ConversionRow]:
        found = {}
        for candidate in self.candidates:
            conversion = candidate.conversion
            if conversion is None or conversion.folder in found:
                continue
            record = self.work / "large" / conversion.folder / "conversion.json"
            made = Converted(**json.loads(record.read_text()))
            if made.error is None:
                found[conversion.folder] = page.ConversionRow(
                    candidate.name, candidate.is_ours, made.wall_s, made.peak_memory_bytes, made.size_bytes
                )
        return list(found.values())

    def _quality_row(self, candidate: Candidate, tiny: dict[str, Any]) -> page.QualityRow:
        name = candidate.name
        if name in tiny["failures"]:
            return page.QualityRow(name, failure=tiny["failures"][name])
        if name not in tiny["quality"]:
            return page.QualityRow(name)
        quality = _quality(tiny["quality"][name])
        return page.QualityRow(
            name,
            first_divergence=quality.first.kl_divergence,
            following_divergence=quality.following.kl_divergence,
            agreement=quality.following.top1_agreement,
            perplexity=quality.perplexity,
        )


def _dumped(quality: Quality) -> dict[str, Any]:
    return {
        "first": quality.first.model_dump(),
        "following": quality.following.model_dump(),
        "perplexity": quality.perplexity,
    }


def _quality(fields: dict[str, Any]) -> Quality:
    return Quality(
        Scored.model_validate(fields["first"]), Scored.model_validate(fields["following"]), fields["perplexity"]
    )


def _versions(described: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The versions of the tools, of whichever environment has one; several are joined."""
    found: dict[str, set[str]] = {}
    for answer in described.values():
        for name, version in answer.get("versions", {}).items():
            if name in SHOWN:
                found.setdefault(name.replace("_", "-"), set()).add(version)
    return {name: " and ".join(sorted(versions)) for name, versions in sorted(found.items())}


def _model(checkpoint: Path) -> str:
    config = json.loads((checkpoint / "config.json").read_text())
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return (
        f"A Llama of {size / 4e9:.1f} billion parameters: {config['num_hidden_layers']} layers, hidden "
        f"{config['hidden_size']}, intermediate {config['intermediate_size']}, {config['num_attention_heads']} heads, "
        f"{config['num_key_value_heads']} of keys and values, vocabulary {config['vocab_size']:,}; random weights with "
        f"outlier channels, a checkpoint of {size / 1e9:.1f} GB in float32."
    )


def _how(speed: dict[str, Any], rounds: int) -> list[str]:
    return [
        f"Prompts of {PROMPT} tokens, then {NEW_TOKENS} single tokens, batch 1, all of them fed: every candidate computes "
        f"the same tokens. Each runs in a process of its own, idle while another runs; {rounds} rounds in "
        f"{speed['launches']} launches, the order drawn anew, blocks, visits and intervals as in "
        f"[measurement](measurement.md). The whole took {speed['wall_s'] / 60:.0f} minutes.",
        f"Divergence is the mean KL (nats) from {FP32.name} on the same tokens, as the model is used: the first token after "
        f"each of {FIRST_PROMPTS} prompts, which prefill predicts, and the {NEW_TOKENS} tokens after the first of "
        f"{CONTINUED_PROMPTS} of them, which steps of decode predict. Log-probabilities are compared in float16, which "
        "resolves about 1e-6. `top-1` is the share of the following tokens with the same most likely token.",
    ]


def _noise(speed: dict[str, Any]) -> dict[str, Interval]:
    samples = [Sample.model_validate(fields) for fields in speed["samples"]]
    figures = speed_figures(samples, baseline=BEST, parents={BEST: None})
    return {
        floor.kind: Interval(median=1.0, low=floor.ratio_low, high=floor.ratio_high) for floor in figures.noise_floor
    }


def _peers(rows: Sequence[page.Row], kind: str) -> list[targets.Peer]:
    divergence = {"prefill": "first_divergence", "decode": "following_divergence"}[kind]
    return [
        targets.Peer(row.name, speed.median, ratio, getattr(row, divergence))
        for row in rows
        if not row.is_ours
        and (speed := getattr(row, kind)) is not None
        and (ratio := getattr(row, f"{kind}_ratio")) is not None
    ]


def _verdicts(rows: Sequence[page.Row], conversions: Sequence[page.ConversionRow]) -> list[targets.Verdict]:
    best = next(row for row in rows if row.name == BEST)
    found = []
    if peers := _peers(rows, "prefill"):
        found.append(targets.judge_speed("prefill", peers, best.first_divergence))
        found.append(targets.judge_speed("decode", _peers(rows, "decode"), best.following_divergence))
    own = next((c for c in conversions if c.name == BEST), None)
    others = [c for c in conversions if not c.is_ours]
    if own is not None and others:
        seconds = {c.name: c.wall_s for c in others}
        gigabytes = {c.name: c.peak_memory_bytes / 1e9 for c in others}
        time_share, memory_share = targets.TIME_SHARE, targets.MEMORY_SHARE
        found += [
            targets.judge_conversion("conversion time", own.wall_s, seconds, share=time_share, unit="s"),
            targets.judge_conversion(
                "conversion memory", own.peak_memory_bytes / 1e9, gigabytes, share=memory_share, unit="GB"
            ),
        ]
    return found


def _remarks(rows: Sequence[page.Row]) -> list[str]:
    best = next(row for row in rows if row.name == BEST)
    found = [
        targets.judge_worse("prefill", _peers(rows, "prefill"), best.first_divergence),
        targets.judge_worse("decode", _peers(rows, "decode"), best.following_divergence),
    ]
    return [f"{remark[0].upper()}{remark[1:]}." for remark in found if remark]


def tell(message: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {message}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints, conversions and results: some 30 GB")
    parser.add_argument("--environments", type=Path, help="folder of the tools' environments (default: in WORK)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--only", nargs="+", metavar="PART", help="candidates whose names have one of these in them")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4, help="of each launch")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the checkpoint's recipe")
    options = parser.parse_args()
    comparison = Comparison(options)
    for step in STEPS:
        if step in options.steps:
            getattr(comparison, step)()


if __name__ == "__main__":
    main()
