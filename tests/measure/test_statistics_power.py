"""The whole adaptive procedure, simulated as benchmarks/statistics_power.py does, with fewer trials and fixed seeds.

Bounds leave three Monte Carlo standard errors beside what the benchmark's 2,000 trials show.
"""

import dataclasses
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "statistics_power.py"


@cache
def power() -> ModuleType:
    spec = importlib.util.spec_from_file_location("statistics_power", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def outcome(name: str, trials: int = 200) -> Any:
    scenario = next(s for s in power().SCENARIOS if s.name == name)
    return power().simulate(scenario, trials)


@pytest.mark.parametrize(
    "name", ["all at the margin", "0, 0.5, 1, 2.5, 10, 100 % faster", "margin, heavy tails", "margin, noise 5 %"]
)
def test_the_interval_covers_the_truth(name: str) -> None:
    share, error = outcome(name).coverage()
    assert 0.93 - 3 * error <= share <= 0.97 + 3 * error


def test_stages_at_the_margin_are_rarely_called_faster_or_slower() -> None:
    assert outcome("all at the margin").any_false()[0] <= 0.05


def test_equal_stages_are_called_equivalent() -> None:
    assert outcome("all equal").called_equivalent()[0] >= 0.80


def test_a_difference_of_two_and_a_half_percent_is_found_and_saves_rounds() -> None:
    found = outcome("all 2.5 % off")
    assert found.found()[0] >= 0.80
    assert found.rounds.mean() < 150


def test_a_stage_whose_launches_vary_more_than_the_others_is_still_covered() -> None:
    share, error = outcome("margin, one stage's launches 1 %").coverage_of_first()
    assert share >= 0.92 - 3 * error


def test_one_launch_covers_launches_that_vary_as_assumed() -> None:
    scenario = next(s for s in power().SCENARIOS if s.name == "margin, 6 rounds of 1 launch")
    assumed = power().simulate(dataclasses.replace(scenario, launch_sd=0.005), 200)
    assert assumed.coverage()[0] >= 0.95
    assert assumed.any_false()[0] <= 0.02


def test_two_times_faster_needs_one_launch() -> None:
    assert outcome("2 times faster, 6 rounds of 1 launch").found()[0] == 1.0


def test_looking_at_every_round_would_err_where_four_looks_do_not() -> None:
    """The simulation notices a procedure that is wrong: intervals of 95 % at every look, nothing corrected."""
    module = power()
    scenario = next(s for s in module.SCENARIOS if s.name == "all at the margin")
    plan = scenario.plan()
    draw = np.random.default_rng(0)
    logs, launches = module.blocks(scenario, plan, 60, draw)
    wrong = np.zeros(60, bool)
    for rounds in range(12, 200, 8):
        for truth, other in zip(np.log1p(scenario.truths), logs[2:, :, :rounds], strict=True):
            values = np.sign(truth) * (logs[0, :, :rounds] - other)
            medians = np.median(values, axis=1)
            spread = values.std(axis=1) / np.sqrt(rounds)
            wrong |= medians - 1.96 * spread > np.log1p(module.EDGE)
    assert launches[-1] == plan.looks[-1].launches - 1
    assert wrong.mean() > 0.5
