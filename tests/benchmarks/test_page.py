"""The page's tables, from figures alone."""

from dataclasses import replace

from benchmarks.peers.page import ConversionRow, Page, QualityRow, Row, render, table
from benchmarks.peers.targets import Verdict
from pipeline.measure.statistics import Interval

OURS = Row(
    name="ours",
    is_ours=True,
    prefill=Interval(median=700, low=680, high=720),
    decode=Interval(median=66.04, low=60, high=70),
    first_divergence=0.00123,
    following_divergence=0.0456,
    agreement=0.9,
    memory_bytes=1_500_000_000,
    load_s=1.25,
)
OTHER = Row(
    name="other",
    is_ours=False,
    prefill=Interval(median=350, low=340, high=360),
    decode=Interval(median=33, low=30, high=35),
    prefill_ratio=Interval(median=2, low=1.9, high=2.1),
    decode_ratio=Interval(median=2, low=1.8, high=2.2),
)
PAGE = Page(
    best="ours",
    model="A model.",
    date="2026-01-01",
    host="a host, 2 threads",
    how=["How it went."],
    rows=[OURS, OTHER, Row("broken", is_ours=False, failure="it does not load")],
    noise={"prefill": Interval(median=1, low=0.99, high=1.01)},
    bandwidth=Interval(median=60, low=45, high=80),
    conversions=[ConversionRow("ours", True, 12.3, 20.4, 400_000_000, 700_000_000)],
    trained=[QualityRow("ours", 0.001, 0.002, 0.99, 12.3456), QualityRow("broken", failure="no")],
    stages=[("export", 1.25, 400_000_000)],
    trained_prompts="2 prompts",
    verdicts=[Verdict("be fast", True, "2 times"), Verdict("be small", False, "half as small")],
    operators={"decode": {"MatMulNBits": 0.009, "Attention": 0.00095, "Cast": 0.00005}},
    product_bytes=450_000_000,
    missing={"broken": "it does not load"},
    versions={"other": "1.2"},
)


def lines_of(page):
    return render(page).splitlines()


def test_a_table_has_a_row_for_each_and_numbers_to_the_right():
    assert table(("a", "b"), [("x", "1")]) == ["| a | b |", "| --- | ---: |", "| x | 1 |"]


def test_speeds_are_shown_with_intervals_and_how_many_times_as_fast_ours_is():
    assert "| other | 350 (340–360) | 2.00 (1.90–2.10) | 33.0 (30.0–35.0) | 2.00 (1.80–2.20) | – | – | – |" in lines_of(
        PAGE
    )


def test_our_artifact_is_not_compared_with_itself():
    assert "| **ours** | 700 (680–720) | – | 66.0 (60.0–70.0) | – | 0.0012 | 0.046 | 90.0% |" in lines_of(PAGE)


def test_a_candidate_that_failed_is_shown_as_failed_and_its_reason_is_told():
    lines = lines_of(PAGE)
    assert "| broken | failed | failed | failed | failed | failed | failed | failed |" in lines
    assert "- broken: it does not load" in lines


def test_every_target_is_answered():
    lines = lines_of(PAGE)
    assert "| be fast | yes | 2 times |" in lines
    assert "| be small | **no** | half as small |" in lines


def test_conversions_memory_and_versions_are_told_in_their_units():
    text = render(PAGE)
    assert "| ours | 12.3 | 20.4 | 0.40 GB | 0.70 GB |" in text
    assert "| ours | 1.50 GB | 1.2 s |" in text
    assert "other 1.2." in text


def test_operators_of_less_than_a_hundredth_are_shown_together():
    lines = lines_of(PAGE)
    assert "| MatMulNBits | 90.0% |" in lines
    assert "| all others | 0.5% |" in lines
    assert "| Cast | 0.5% |" not in lines


def test_the_rate_at_which_a_step_reads_its_weights_is_set_beside_the_memorys():
    text = render(PAGE)
    assert "MatMulNBits reads its 450 MB of weights and scales at 33 GB/s" in text
    assert "memory was read at 60 GB/s" in text


def test_the_stages_of_our_conversion_are_listed_with_what_they_take():
    assert "| export | 1.2 | 0.40 GB |" in lines_of(PAGE)


def test_nothing_left_out_has_no_section():
    assert "## Left out" in render(PAGE)
    assert "## Left out" not in render(replace(PAGE, missing={}))


def test_perplexity_on_the_trained_model_is_shown_with_three_digits():
    assert "| ours | 0.001 | 0.002 | 99.0% | 12.346 |" in lines_of(PAGE)
