"""Whether workers that wait slow the one that runs: time of a block with two idle workers beside it, over alone.

    python benchmarks/idle_workers.py                # both runners and the control, about two minutes
    python benchmarks/idle_workers.py --rounds 40

A launch starts three workers of the same model: one that is timed and two that wait. In every round each of the two
first runs a short block of its own, as it does in a run, so that threads that spin on after their work would be caught
at it. Then a block of the first is timed: with the two stopped by a signal (alone), or waiting in their read (beside);
which comes first is drawn anew. The control has two processes that spin in the place of the idle workers, so that the
last rows show what would be seen if they did.

The interval is that of a run's speed ratios. The exit code is 1 where idle workers cost 2 % or more beyond doubt, or
the control costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from pipeline import Artifact, ExecutionSpec
from pipeline.hardware.host import describe_host
from pipeline.measure.process import Worker
from pipeline.measure.samples import Sample
from pipeline.measure.statistics import compare_stages
from pipeline.measure.workload import Point
from pipeline.store import Store

RECIPE = """\
version: 1
name: idle-workers
model:
  architecture:
    type: llama
    hidden_size: 512
    intermediate_size: 1376
    num_hidden_layers: 4
    num_attention_heads: 8
    vocab_size: 4096
    max_position_embeddings: 256
hardware: local
passes: [{pass: export_onnx, name: onnx}]
"""
PREFILL = Point(kind="prefill", batch=1, prompt=64, new_tokens=0)
DECODE = Point(kind="decode", batch=1, prompt=64, new_tokens=16)
VOCABULARY = 4096
BLOCK_S, SHORT_S = 0.2, 0.02
ALONE, BESIDE = "alone", "beside"
TOLERATED = 0.02
SPIN = "while True: pass"


class Seen(NamedTuple):
    samples: list[Sample]
    busy_s: float
    """Processor time of the two others while blocks were timed beside them."""
    timed_s: float


def make_artifacts(work: Path) -> dict[str, Artifact]:
    """The model as the torch and the onnxruntime runner load it.

    Raises: SystemExit with the output of `pipeline run` where it fails.
    """
    (work / "recipe.yaml").write_text(RECIPE)
    command = [str(Path(sys.executable).with_name("pipeline")), "run", "recipe.yaml", "--no-measure", "--runs", "runs"]
    environment = {**os.environ, "PIPELINE_STORE": str(work / "store")}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    report = json.loads((work / "runs" / "idle-workers" / "latest" / "report.json").read_text())
    digests = {stage["name"]: stage["artifact"]["digest"] for stage in report["stages"]}
    store = Store(work / "store")
    found = {runner: store.artifact(digests[stage]) for runner, stage in (("torch", "source"), ("onnxruntime", "onnx"))}
    return {runner: artifact for runner, artifact in found.items() if artifact is not None}


def run_block(worker: Worker, point: Point, min_s: float) -> list[float]:
    """Seconds of each iteration."""
    answer = worker.ask(
        "block", point=point.model_dump(), vocab_size=VOCABULARY, seed=0, steps=point.new_tokens, min_s=min_s
    )
    seconds: list[float] = answer["seconds"]
    return seconds


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """The processes do nothing at all meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def processor_s(pids: Sequence[int]) -> float:
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def measure(artifact: Artifact, *, spin: bool, launches: int, rounds: int, threads: int, work: Path) -> Seen:
    """Blocks alone and beside two others, which are idle workers, or with `spin` processes that do nothing but spin."""
    draw = random.Random(0)  # noqa: S311 (an order, not a secret)
    samples: list[Sample] = []
    busy_s = timed_s = 0.0
    for launch in range(launches):
        with ExitStack() as processes:

            def start(name: str, processes: ExitStack = processes) -> Worker:
                spec = ExecutionSpec(threads=threads)
                worker = processes.enter_context(Worker(name, spec, work / f"{name}.log"))
                worker.load(artifact)
                for point in (PREFILL, DECODE):
                    run_block(worker, point, BLOCK_S)
                return worker

            timed = start("timed")
            idle = [] if spin else [start(f"idle-{number}") for number in range(2)]
            others = [worker.pid for worker in idle]
            if spin:
                spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(2)]
                for process in spinning:
                    processes.callback(process.wait)
                    processes.callback(process.kill)
                others = [process.pid for process in spinning]
            for number in range(rounds):
                for point in (PREFILL, DECODE):
                    for order, what in enumerate(draw.sample([ALONE, BESIDE], 2)):
                        for worker in idle:
                            run_block(worker, point, SHORT_S)
                        if what == ALONE:
                            with stopped(others):
                                seconds = run_block(timed, point, BLOCK_S)
                        else:
                            before = processor_s(others)
                            seconds = run_block(timed, point, BLOCK_S)
                            busy_s += processor_s(others) - before
                            timed_s += sum(seconds)
                        samples.append(
                            Sample(
                                stage=what,
                                launch=launch,
                                round=number,
                                order=order,
                                point=point,
                                seconds=tuple(seconds),
                                started_s=0.0,
                            )
                        )
    return Seen(samples, busy_s, timed_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of each launch")
    parser.add_argument("--launches", type=int, default=3)
    options = parser.parse_args()
    threads = describe_host().physical_cores
    table = Table("runner", "beside it", "block", "time beside / alone", "95 % interval", "CPU of the others")
    missed = False
    with tempfile.TemporaryDirectory(prefix="idle-workers-") as folder:
        work = Path(folder)
        artifacts = make_artifacts(work)
        for runner, spin in (("onnxruntime", False), ("torch", False), ("onnxruntime", True)):
            seen = measure(
                artifacts[runner],
                spin=spin,
                launches=options.launches,
                rounds=options.rounds,
                threads=threads,
                work=work,
            )
            what = "2 that spin (control)" if spin else "2 idle workers"
            for point, ratio in compare_stages(seen.samples, BESIDE, ALONE, baseline=ALONE).items():
                low, high = 1 / ratio.high, 1 / ratio.low
                missed |= high < 1 + TOLERATED if spin else low > 1 + TOLERATED
                table.add_row(
                    runner,
                    what,
                    point.kind,
                    f"{1 / ratio.ratio:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{seen.busy_s / seen.timed_s:.1%}",
                )
    print(f"{threads} threads, {options.launches} launches of {options.rounds} rounds")
    Console(width=110).print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
