"""This project: the stages of recipes/llama-1b-cpu.yaml, and what a run exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.runtime import CausalLMRunner

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "llama-1b-cpu.yaml"
RUNS = "runs"


def convert(checkpoint: Path, folder: Path, *, stage: str) -> None:
    """Run the recipe over the checkpoint up to `stage`, in a store of its own, and export that.

    Raises: SystemExit where the run fails.
    """
    command = [sys.executable, "-m", "pipeline", "run", str(RECIPE), "--no-measure", "--runs", str(folder / RUNS)]
    command += ["--only", stage, "--set", f"model.path={checkpoint}", "--set", f"export={stage}"]
    done = subprocess.run(command, check=False, env={**os.environ, "PIPELINE_STORE": str(folder / "store")})
    if done.returncode:
        sys.exit(done.returncode)


def load(folder: Path, checkpoint: Path, threads: int, *, stage: str | None = None) -> CausalLMRunner:
    """The model that the run exported, or one of the stages that it is made of."""
    from pipeline.runtime import ExecutionSpec, load_model, load_runner
    from pipeline.store import Store

    if stage is None:
        return load_model(exported(folder), threads=threads)
    report = json.loads((exported(folder).parent / "report.json").read_text())
    digest = next(each["artifact"]["digest"] for each in report["stages"] if each["name"] == stage)
    artifact = Store(folder / "store").artifact(digest)
    if artifact is None:
        raise RuntimeError(f"the store in {folder} has no longer the stage {stage}")
    return load_runner(artifact, ExecutionSpec(threads=threads))


def exported(folder: Path) -> Path:
    """The model folder that the run in `folder` exported."""
    return folder / RUNS / RECIPE.stem / "latest" / "model"
