"""All candidates in turns: speed in shuffled rounds, and quality against the reference on the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.candidates import BEST, FP32, NEW_TOKENS, PROMPT, Candidate
from benchmarks.peers.serving import CandidateWorker
from pipeline.artifact import Artifact, Interface, Manifest
from pipeline.errors import StageError
from pipeline.hardware.probe import ReadBandwidth
from pipeline.measure.cold_load import ColdLoads
from pipeline.measure.launches import Launcher, Seat
from pipeline.measure.process import StageToMeasure, StartWorker
from pipeline.measure.record import Record
from pipeline.measure.rounds import run_blocks
from pipeline.measure.samples import Sample
from pipeline.measure.scoring import Scored, ScoreWork, Window
from pipeline.measure.workload import Point
from pipeline.runtime import ExecutionSpec

if TYPE_CHECKING:
    import numpy as np

POINTS = (
    Point(kind="prefill", batch=1, prompt=PROMPT, new_tokens=0),
    Point(kind="decode", batch=1, prompt=PROMPT, new_tokens=NEW_TOKENS),
)

SCORED = {"large": (24, 4), "tiny": (48, 16)}
"""Prompts that are scored, and how many of them with the tokens that follow, by model."""

WARM_UPS_S = 120.0
"""For the warm-ups of all launches, as a run with ten times so many seconds has it."""

BANDWIDTH_S = 0.15

Start = Callable[[Candidate, Path], CandidateWorker]
"""What starts the process of a candidate, with the log that it is to write."""


@dataclass
class Speed:
    """What was seen while the candidates took turns."""

    samples: list[Sample] = field(default_factory=list)
    bandwidth_gb_per_s: list[float] = field(default_factory=list)
    """The median of what the probe read before each round."""
    load_s: dict[str, float] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wall_s: float = 0.0


def measure_speed(
    candidates: Sequence[Candidate],
    start: Start,
    *,
    threads: int,
    launches: int,
    rounds: int,
    seed: int,
    logs: Path,
    tell: Callable[[str], None],
) -> Speed:
    """`rounds` rounds in each of `launches` launches; the memory's bandwidth is read before each round.

    A launch starts every candidate and a second process of BEST, loads and warms them up, one at a time. A candidate
    that fails is left out from there on.
    """
    named = {candidate.name: candidate for candidate in candidates}
    began = time.monotonic()
    record = Record()

    @contextmanager
    def starter() -> Iterator[StartWorker]:
        yield lambda name, spec, log: start(named[name], log)

    launcher = Launcher(
        points=POINTS,
        baseline=BEST,
        budget_s=10 * WARM_UPS_S,
        seed=seed,
        logs=logs,
        record=record,
        cold=ColdLoads({}),
        begin_launch=starter,
        clock=time.monotonic,
        tell=tell,
    )
    stages = {candidate.name: _stage(candidate, threads) for candidate in candidates}
    group = [*map(Seat, stages.values()), Seat(stages[BEST], replica=1)]
    found = Speed()
    with launcher, ReadBandwidth(threads=threads) as memory:
        for launch in range(launches):
            with launcher.start(group, launch, launches=launches) as crew:
                for number in range(rounds):
                    tell(f"launch {launch + 1} of {launches}, round {number + 1} of {rounds}")
                    rates = sorted(memory.measure(seconds=BANDWIDTH_S))
                    found.bandwidth_gb_per_s.append(rates[len(rates) // 2])
                    order = 0
                    for point in launcher.shuffled(POINTS):
                        blocks = run_blocks(launcher, crew, point, steps=NEW_TOKENS, clock=time.monotonic)
                        found.samples += [
                            block.sample(launch=launch, round=launch * rounds + number, order=order + place)
                            for place, block in enumerate(blocks)
                        ]
                        order += len(blocks)
    found.load_s = {n: times.warm_s for n, times in record.load_times(named).items() if times.warm_s is not None}
    found.memory_bytes = record.memory
    found.failures = record.failures
    found.notes = record.notes
    found.wall_s = time.monotonic() - began
    return found


def _stage(candidate: Candidate, threads: int) -> StageToMeasure:
    """The candidate as the launcher knows stages; its files are no artifact's, so the artifact is empty."""
    execution: dict[str, Any] = {"compile": {}} if candidate.compiles else {}
    manifest = Manifest(format="peer", components={}, interface=Interface(), execution=execution)
    return StageToMeasure(candidate.name, Artifact(manifest, Path()), ExecutionSpec(threads=threads))


@dataclass(frozen=True)
class Quality:
    """Against the reference on the same tokens, scored as it is used; divergence in nats."""

    first: Scored
    """The first new token of each prompt, which prefill predicts."""
    following: Scored
    """The tokens after it, each of which a step of decode predicts."""
    perplexity: float


@dataclass(frozen=True)
class Texts:
    """Where the prompts begin, in a file of token ids."""

    tokens: Path
    prompts: int
    continued: int
    """How many of them are continued by NEW_TOKENS tokens."""

    def windows(self) -> tuple[tuple[Window, ...], tuple[Window, ...]]:
        """(of the first new tokens, of the following ones)."""
        length = PROMPT + NEW_TOKENS + 1
        begins = [at * length for at in range(self.prompts)]
        first = tuple(Window(begin=b, end=b + PROMPT + 1, first=b + PROMPT) for b in begins)
        return first, tuple(Window(begin=b, end=b + length, first=b + PROMPT + 1) for b in begins[: self.continued])

    @property
    def length(self) -> int:
        """Tokens that the file must have."""
        return self.prompts * (PROMPT + NEW_TOKENS + 1)


def measure_quality(
    candidates: Sequence[Candidate],
    start: Start,
    texts: Texts,
    *,
    folder: Path,
    logs: Path,
    tell: Callable[[str], None],
) -> tuple[dict[str, Quality], dict[str, str], dict[str, dict[str, Any]]]:
    """(quality, reasons of those that fail, what each said of itself when it was loaded), by candidate.

    The reference is scored first; its distributions lie in `folder` meanwhile.
    """
    found: dict[str, Quality] = {}
    failures: dict[str, str] = {}
    described: dict[str, dict[str, Any]] = {}
    for candidate in (FP32, *candidates):
        tell(f"scoring {candidate.name}")
        worker = start(candidate, logs / f"{_plain(candidate.name)}.log")
        try:
            described[candidate.name] = worker.load(_stage(candidate, 1).artifact)
            if candidate.compiles:
                worker.ask("compile", shapes=[[1, PROMPT]])
            found[candidate.name] = _score(worker, candidate, texts, folder)
        except StageError as error:
            failures[candidate.name] = str(error)
            if candidate is FP32:
                raise
        finally:
            worker.close()
    return found, failures, described


def _score(worker: CandidateWorker, candidate: Candidate, texts: Texts, folder: Path) -> Quality:
    import numpy as np

    from pipeline.measure.quality import perplexity
    from pipeline.measure.scoring import NLL

    answers = []
    for what, windows in zip(("first", "following"), texts.windows(), strict=True):
        own = folder / what / _plain(candidate.name)
        work = ScoreWork(
            tokens=str(texts.tokens),
            windows=windows,
            folder=str(own),
            baseline=None if candidate is FP32 else str(folder / what / _plain(FP32.name)),
            kept=tuple(range(sum(w.end - w.first for w in windows))),
        )
        answers.append(Scored.model_validate(worker.ask("score", work=work.model_dump(mode="json"))))
    return Quality(answers[0], answers[1], perplexity=perplexity(np.load(own / NLL)) or float("nan"))


def _plain(name: str) -> str:
    """The name as a file's."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def drawn_tokens(vocabulary: int, count: int, seed: int) -> np.ndarray:
    """Token ids for a model with random weights, to which no text is likelier than another."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, vocabulary, count, dtype=np.int64)


def text_tokens(checkpoint: Path, text: Path, count: int) -> np.ndarray:
    """The first tokens of a text by the checkpoint's tokenizer.

    Raises: ValueError where the text has fewer.
    """
    import numpy as np

    from pipeline.measure.quality import encode

    ids = encode(checkpoint / "tokenizer.json", text.read_text(encoding="utf-8"), limit=count)
    if len(ids) < count:
        raise ValueError(f"{text} has {len(ids)} tokens, and {count} are needed")
    return np.array(ids, np.int64)


def speed_ratios(samples: Sequence[Sample], names: Sequence[str]) -> Mapping[tuple[str, Point], Any]:
    """How much faster BEST is than each of `names`, by name and point: a SpeedRatio."""
    from pipeline.measure.statistics import compare_stages

    return {
        (name, point): ratio
        for name in names
        for point, ratio in compare_stages(samples, BEST, name, baseline=BEST, comparisons=len(names)).items()
    }
