"""This project's artifacts beside other tools: the same checkpoint, the same tokens, all of them taking turns.

    python benchmarks/peers.py /var/tmp/peers                        # everything, and docs/peers.md
    python benchmarks/peers.py /var/tmp/peers --steps page           # the page again, from what was measured
    python benchmarks/peers.py /var/tmp/peers --only llama.cpp --set model.architecture.num_hidden_layers=2

The checkpoint is that of recipes/llama-1b-cpu.yaml, in float32. Each tool lives in a virtual environment of its own
below ENVIRONMENTS, made where it is missing from benchmarks/peers/requirements/NAME.txt; llama-cpp-python is built from
its source for the host's instruction sets, which takes a quarter of an hour on two cores.

A tool converts the checkpoint in a process that is watched (`convert`). Then every candidate is scored against torch in
float32, as it is used: the prompt in one pass, each token after it in a step (`quality`), on this model and on
llama2-tiny. Then all of them take turns in shuffled rounds (`speed`). What a step found lies in WORK; a step that is
run again finds conversions already made. `operators` asks ONNX Runtime's profiler where our time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder has a package with this file's name

from benchmarks.peers.candidates import ALONE, BEST, CANDIDATES, OURS, Candidate, Conversion  # noqa: E402
from benchmarks.peers.converting import Converted, convert, environment  # noqa: E402
from benchmarks.peers.gathering import Kept, gather, quality_fields  # noqa: E402
from benchmarks.peers.measuring import (  # noqa: E402
    SCORED,
    Texts,
    drawn_tokens,
    measure_quality,
    measure_speed,
    text_tokens,
)
from benchmarks.peers.ours import RECIPE, exported  # noqa: E402
from benchmarks.peers.page import render  # noqa: E402
from benchmarks.peers.serving import CandidateWorker  # noqa: E402
from pipeline.hardware.host import describe_host  # noqa: E402

TINY = ROOT / "pipeline" / "models" / "builtin" / "llama2-tiny"
REQUIREMENTS = Path(__file__).parent / "peers" / "requirements"
MODELS = ("tiny", "large")
STEPS = ("convert", "quality", "speed", "operators", "page")
SEED = 0
BUILD = {"llama_cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "PIP_NO_BINARY": "llama-cpp-python"}}
"""Variables under which an environment's packages are installed."""

UNWANTED = {"openvino": ("torchvision",)}
"""What comes along in an environment and keeps its tool from being imported: there is no such build beside torch's."""

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
        self.models: list[str] = options.models
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
            if name in UNWANTED:
                subprocess.run([str(python), "-m", "pip", "uninstall", "--yes", *UNWANTED[name]], check=True)
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

    def start(self, model: str, candidate: Candidate, log: Path) -> CandidateWorker:
        """A process for the candidate."""
        conversion = candidate.conversion
        folder = self.work / model / (conversion.folder if conversion else "none")
        return CandidateWorker(
            candidate,
            log,
            python=self.python(candidate.environment),
            folder=folder,
            checkpoint=self.checkpoint(model),
            threads=self.threads,
        )

    def converted(self, model: str) -> dict[str, Converted]:
        """What every conversion took, by its folder; those that were made are not made again."""
        found: dict[str, Converted] = {}
        for candidate in self.candidates:
            conversion = candidate.conversion
            if conversion is None or conversion.folder in found:
                continue
            found[conversion.folder] = self._convert(model, candidate.name, conversion)
        return found

    def _convert(self, model: str, name: str, conversion: Conversion) -> Converted:
        tell(f"{model}: converting for {name}")
        log = self.logs / f"{model}-{conversion.folder}.log"
        python = self.python(conversion.environment)
        made = convert(conversion, python, self.checkpoint(model), self.work / model, threads=self.threads, log=log)
        if made.error:
            tell(f"  failed: {made.error}")
        return made

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
        for model in self.models:
            self.converted(model)
        if "large" in self.models:
            for name, conversion in ALONE.items():
                self._convert("large", name, conversion)

    def quality(self) -> None:
        for model in self.models:
            candidates, missing = self.ready(model)
            folder = self.work / model / "scoring"
            folder.mkdir(parents=True, exist_ok=True)
            texts = Texts(folder / "tokens.npy", *SCORED[model])
            self._tokens(model, texts)
            measured, failures, described = measure_quality(
                candidates,
                partial(self.start, model),
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
                    "quality": {name: quality_fields(quality) for name, quality in measured.items()},
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
            partial(self.start, "large"),
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

    def operators(self) -> None:
        best = next(c.conversion for c in self.candidates if c.name == BEST and c.conversion)
        model = exported(self.work / "large" / best.folder)
        command = [sys.executable, "-P", "-m", "benchmarks.peers.operators", str(model), str(self.threads)]
        done = subprocess.run(command, check=True, env=environment(self.threads), stdout=subprocess.PIPE, text=True)
        self.keep("operators", json.loads(done.stdout))

    def page(self) -> None:
        path = ROOT / "docs" / "peers.md"
        kept = Kept(
            candidates=self.candidates,
            speed=self.kept("speed"),
            large=self.kept("quality-large"),
            tiny=self.kept("quality-tiny"),
            operators=self.kept("operators"),
            work=self.work / "large",
        )
        found = gather(kept, describe_host(), threads=self.threads)
        path.write_text(render(found), encoding="utf-8")
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


def _versions(described: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The versions of the tools, of whichever environment has one; several are joined."""
    found: dict[str, set[str]] = {}
    for answer in described.values():
        for name, version in answer.get("versions", {}).items():
            if name in SHOWN:
                found.setdefault(name.replace("_", "-"), set()).add(version)
    return {name: " and ".join(sorted(versions)) for name, versions in sorted(found.items())}


def tell(message: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {message}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints, conversions and results: some 30 GB")
    parser.add_argument("--environments", type=Path, help="folder of the tools' environments (default: in WORK)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--only", nargs="+", metavar="PART", help="candidates whose names have one of these in them")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="to convert and to score")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of each launch")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the checkpoint's recipe")
    options = parser.parse_args()
    comparison = Comparison(options)
    for step in STEPS:
        if step in options.steps:
            getattr(comparison, step)()


if __name__ == "__main__":
    main()
