"""How often the verdicts are right: the whole adaptive procedure, simulated with the code that a report uses.

    python benchmarks/statistics_power.py                       # every scenario, 2,000 trials each
    python benchmarks/statistics_power.py --trials 200 --only launch

A trial is one run: a baseline, its second process and six stages at one workload point, in the launches and shuffled
rounds of the plan, with a look after 12, 30, 80 and 200 rounds; it ends when all six are decided. A block's time is the
truth, times

- noise of 1 % (normal, or as heavy-tailed as Student's t with three degrees of freedom where it says so);
- in 3 % of the blocks, something that makes it longer, by 8 % on average (exponential);
- drift that all blocks of a round share, a random walk of 1 % a round, which ratios do not see; and drift inside a
  round, 0.1 % from one block to the next in a direction drawn anew, which they do;
- what a launch of a process adds: normal, 0.3 % where nothing else is said.

Printed with Monte Carlo errors: how often the 95 % interval that a report would show covers the truth; how often any
of the six is called faster or slower when it is not; how often a stage is called equivalent, and how often what it is;
rounds used. The exit code is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.measure.estimate import estimates, look_at
from pipeline.measure.looks import LookPlan
from pipeline.measure.verdicts import CLAIMS, noise_floor, verdicts

LOOKS = (12, 30, 80, 200)
EDGE = 0.01
CHUNK = 250
"""Trials at once, so that memory stays small."""

FASTER, SLOWER, EQUIVALENT = CLAIMS.index("faster"), CLAIMS.index("slower"), CLAIMS.index("equivalent")


@dataclass(frozen=True)
class Scenario:
    """One setting; a truth is a stage's speed over the baseline's, minus one."""

    name: str
    truths: tuple[float, ...]
    launch_sd: float = 0.003
    launch_sd_of_first: float | None = None  # the first stage's, where it differs
    looks: tuple[int, ...] = LOOKS
    launches: int | None = None  # the most that there can be
    noise_sd: float = 0.01
    tails: str = "outliers"  # outliers | heavy | clean
    odd_launches: float = 0.0  # share of launches that are 2 % slower than the others
    persistence: float = 0.0  # correlation of a block's noise with that of the same stage a round before
    bars: tuple[str, ...] = ()

    def plan(self) -> LookPlan:
        plan = LookPlan.declare(self.looks)
        return plan if self.launches is None else plan.within(self.looks[-1], self.launches)


@dataclass
class Outcome:
    """What became of the trials; arrays [trials, stages]."""

    claims: np.ndarray
    covered: np.ndarray
    rounds: np.ndarray  # [trials]
    half_widths: np.ndarray
    truths: np.ndarray = field(default_factory=lambda: np.zeros(0))  # logarithms, [stages]

    def coverage(self) -> tuple[float, float]:
        return mean_and_error(self.covered.mean(axis=1))

    def coverage_of_first(self) -> tuple[float, float]:
        return mean_and_error(self.covered[:, 0])

    def any_false(self) -> tuple[float, float]:
        """Trials in which a stage was called faster or slower that is not."""
        edge = math.log1p(EDGE) + 1e-12
        wrong = ((self.claims == FASTER) & (self.truths <= edge)) | ((self.claims == SLOWER) & (self.truths >= -edge))
        return mean_and_error(wrong.any(axis=1))

    def called_equivalent(self) -> tuple[float, float]:
        return mean_and_error((self.claims == EQUIVALENT).mean(axis=1))

    def found(self) -> tuple[float, float]:
        """Stages called what they are, faster or slower."""
        right = np.where(self.truths > 0, self.claims == FASTER, self.claims == SLOWER)
        return mean_and_error(right.mean(axis=1))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


MARGIN = (EDGE, -(1 - 1 / (1 + EDGE))) * 3
FOUND = (0.025, -(1 - 1 / 1.025)) * 3
MIXED = (0.0, 0.005, 0.01, 0.025, 0.10, 1.0)

SCENARIOS = (
    Scenario("all equal", (0.0,) * 6, bars=("equivalent",)),
    Scenario("all at the margin", MARGIN, bars=("coverage", "false")),
    Scenario("all 2.5 % off", FOUND, bars=("coverage", "found")),
    Scenario("0, 0.5, 1, 2.5, 10, 100 % faster", MIXED, bars=("coverage", "false")),
    Scenario("same, one look at 100 rounds", MIXED, looks=(100,), bars=("coverage", "false")),
    *(
        Scenario(f"{what}, launches {sd * 100:.1f} %", truths, launch_sd=sd)
        for sd in (0.001, 0.005, 0.01)
        for what, truths in (("equal", (0.0,) * 6), ("margin", MARGIN), ("2.5 %", FOUND))
    ),
    Scenario("margin, one stage's launches 1 %", MARGIN, launch_sd_of_first=0.01),
    Scenario("margin, no outliers", MARGIN, tails="clean", bars=("coverage", "false")),
    Scenario("margin, heavy tails", MARGIN, tails="heavy", bars=("coverage", "false")),
    Scenario("margin, noise 5 %", MARGIN, noise_sd=0.05),
    Scenario("margin, one launch in five 2 % slower", MARGIN, odd_launches=0.2),
    Scenario("margin, noise persists (0.5)", MARGIN, persistence=0.5),
    Scenario("margin, noise persists (0.95)", MARGIN, persistence=0.95),
    Scenario("margin, 12 rounds of 3 launches", MARGIN, looks=(12,)),
    Scenario("margin, 6 rounds of 1 launch", MARGIN, looks=(6,), launches=1),
    Scenario("same, launches 1.0 %", MARGIN, looks=(6,), launches=1, launch_sd=0.01),
    Scenario("same, noise persists (0.95)", MARGIN, looks=(6,), launches=1, persistence=0.95),
    Scenario("same, launches 3.0 %", MARGIN, looks=(6,), launches=1, launch_sd=0.03),
    Scenario("2 times faster, 6 rounds of 1 launch", (1.0,) * 6, looks=(6,), launches=1),
    Scenario("margin, noise 20 %, 8 rounds of 2", MARGIN, looks=(8,), launches=2, noise_sd=0.2),
    *(
        Scenario(
            f"noise 20 %, 8 of 2, launches {100 * sd:.0f} %", MARGIN, looks=(8,), launches=2, noise_sd=0.2, launch_sd=sd
        )
        for sd in (0.1, 0.2)
    ),
    Scenario("4 times faster, noise 20 %, 8 of 2", (3.0,) * 6, looks=(8,), launches=2, noise_sd=0.2),
    Scenario("margin, noise 20 %, 3 rounds of 1", MARGIN, looks=(3,), launches=1, noise_sd=0.2),
)


def blocks(scenario: Scenario, plan: LookPlan, trials: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(logarithms of block times [processes, trials, rounds], launch of each round).

    The first process is the baseline's, the second its other one.
    """
    launches = np.repeat(np.arange(len(plan.rounds_by_launch)), plan.rounds_by_launch)
    shape = (len(scenario.truths) + 2, trials, len(launches))
    logs = _noise(scenario, shape, draw)
    logs += np.cumsum(draw.normal(0, 0.01, shape[1:]), axis=1)  # shared by the round
    place = draw.permuted(np.broadcast_to(np.arange(shape[0])[:, None, None], shape), axis=0)
    logs += place * draw.normal(0, 0.001, shape[1:])
    spreads = np.full(shape[0], scenario.launch_sd)
    if scenario.launch_sd_of_first is not None:
        spreads[2] = scenario.launch_sd_of_first
    per_launch = draw.standard_normal((*shape[:2], launches[-1] + 1)) * spreads[:, None, None]
    per_launch += np.where(draw.random(per_launch.shape) < scenario.odd_launches, 0.02, 0.0)
    logs += per_launch[:, :, launches]
    logs[2:] -= np.log1p(scenario.truths)[:, None, None]
    return logs, launches


def _noise(scenario: Scenario, shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    sd, keep = scenario.noise_sd, scenario.persistence
    if scenario.tails == "heavy":
        return sd / math.sqrt(3) * draw.standard_t(3, shape)  # a t with three degrees of freedom has variance 3
    noise = draw.normal(0, sd, shape)
    for i in range(1, shape[2] if keep else 0):
        noise[..., i] = keep * noise[..., i - 1] + math.sqrt(1 - keep**2) * noise[..., i]
    if scenario.tails == "outliers":
        noise += np.where(draw.random(shape) < 0.03, draw.exponential(0.08, shape), 0.0)
    return noise


def simulate(scenario: Scenario, trials: int, seed: int = 0) -> Outcome:
    """Run the procedure so many times."""
    draw = np.random.default_rng(seed)
    plan = scenario.plan()
    parts = [_simulate(scenario, plan, min(CHUNK, trials - done), draw) for done in range(0, trials, CHUNK)]
    return Outcome(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("claims", "covered", "rounds", "half_widths")),
        truths=np.log1p(scenario.truths),
    )


def _simulate(scenario: Scenario, plan: LookPlan, trials: int, draw: np.random.Generator) -> Outcome:
    logs, launches = blocks(scenario, plan, trials, draw)
    truths = np.log1p(scenario.truths)
    shape = (trials, len(truths))
    out = Outcome(np.zeros(shape, int), np.zeros(shape, bool), np.zeros(trials, int), np.zeros(shape), truths)
    running = np.arange(trials)
    for look in plan.looks:
        seen = [
            look_at(logs[0, running, : look.rounds] - other, launches[: look.rounds])
            for other in logs[1:, running, : look.rounds]
        ]
        again, *pairs = estimates(seen)
        floor = noise_floor(again)
        claims, _ = verdicts(pairs, [floor] * len(pairs), margin=plan.margin, alpha=look.alpha)
        out.claims[running] = claims.T
        out.half_widths[running] = np.stack([p.half_width() for p in pairs], axis=1)
        out.covered[running] = np.stack(
            [np.abs(p.center - truth) <= p.half_width() for p, truth in zip(pairs, truths, strict=True)], axis=1
        )
        out.rounds[running] = look.rounds
        running = running[(claims == 0).any(axis=0)]
        if not len(running):
            break
    return out


BARS = {
    "coverage": lambda o: 0.93 <= o.coverage()[0] <= 0.97,
    "false": lambda o: o.any_false()[0] <= 0.05,
    "equivalent": lambda o: o.called_equivalent()[0] >= 0.80,
    "found": lambda o: o.found()[0] >= 0.80,
}


def share(value: tuple[float, float]) -> str:
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def table(outcomes: Sequence[tuple[Scenario, Outcome]]) -> Table:
    found = Table(title="shares in %, with Monte Carlo errors", title_justify="left", box=None, pad_edge=False)
    found.add_column("scenario", no_wrap=True)
    for column in ("covered", "any false", "equivalent", "found", "half width", "rounds", "bars"):
        found.add_column(column, justify="right", no_wrap=True)
    for scenario, outcome in outcomes:
        truths = outcome.truths
        missed = [bar for bar in scenario.bars if not BARS[bar](outcome)]
        found.add_row(
            scenario.name,
            share(outcome.coverage()),
            share(outcome.any_false()),
            share(outcome.called_equivalent()) if np.all(np.abs(truths) <= math.log1p(EDGE) + 1e-9) else "–",
            share(outcome.found()) if np.all(np.abs(truths) > math.log1p(EDGE) + 1e-9) else "–",
            f"{100 * float(np.median(outcome.half_widths)):.2f}",
            f"{outcome.rounds.mean():.0f}",
            "" if not scenario.bars else f"missed: {', '.join(missed)}" if missed else "met",
        )
        if scenario.launch_sd_of_first is not None:
            found.add_row("  that stage alone", share(outcome.coverage_of_first()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    options = parser.parse_args()
    chosen = [(seed, s) for seed, s in enumerate(SCENARIOS) if options.only in s.name]
    outcomes = [(scenario, simulate(scenario, options.trials, seed)) for seed, scenario in chosen]
    console = Console(width=130)
    console.print(table(outcomes))
    console.print(f"{options.trials} trials of each scenario")
    if any(not BARS[bar](outcome) for scenario, outcome in outcomes for bar in scenario.bars):
        sys.exit(1)


if __name__ == "__main__":
    main()
