"""The page about real sizes says what the reports of runs say."""

import pytest

from benchmarks.real_sizes import page
from pipeline.report.schema import Report
from tests.report.conftest import report

__all__ = ["report"]


@pytest.fixture
def lines(report: Report) -> list[str]:
    return page([report]).splitlines()


def test_every_stage_has_its_cost(report: Report, lines: list[str]) -> None:
    first = [line for line in lines if line.startswith("| ")][: len(report.stages) + 2]
    assert [line.split(" | ")[0].removeprefix("| ") for line in first[2:]] == [s.name for s in report.stages]


def test_what_was_measured_has_its_speed_with_the_interval(report: Report, lines: list[str]) -> None:
    stage = next(s for s in report.stages if s.speed)
    decode = next(point for point in stage.speed or () if point.kind == "decode")
    row = next(line for line in lines if line.startswith(f"| {stage.name} |") and "(" in line)
    assert f"{decode.tokens_per_s.median:.3g}"[:2] in row.split(" | ")[2]


def test_without_a_measurement_there_is_no_table_of_speeds(report: Report) -> None:
    stages = tuple(stage.model_copy(update={"speed": None}) for stage in report.stages)
    made = page([report.model_copy(update={"stages": stages})])
    assert "| prefill |" not in made
    assert f"## {report.recipe}" in made
