"""Whether a target is met, from figures alone."""

import pytest

from benchmarks.peers.targets import Peer, judge_conversion, judge_speed, judge_worse
from pipeline.measure.statistics import Interval


def peer(name="other", *, speed=100.0, ratio=1.2, low=None, high=None, divergence=0.1):
    interval = Interval(median=ratio, low=low or ratio - 0.02, high=high or ratio + 0.02)
    return Peer(name, speed, interval, divergence)


def test_the_target_is_met_where_the_whole_interval_is_above_it_and_the_divergence_is_no_larger():
    verdict = judge_speed("decode", [peer(ratio=1.2, divergence=0.1)], 0.1)
    assert verdict.met
    assert "1.20 (1.18–1.22) times other" in verdict.why


def test_an_interval_that_begins_below_the_target_does_not_meet_it():
    verdict = judge_speed("decode", [peer(ratio=1.15, low=1.05, high=1.25)], 0.0)
    assert not verdict.met
    assert "the interval begins 5% below it" in verdict.why


def test_it_is_said_by_how_much_a_target_is_missed():
    verdict = judge_speed("prefill", [peer(ratio=1.0)], 0.0)
    assert not verdict.met
    assert "10% short" in verdict.why


def test_the_fastest_peer_is_the_one_compared_with():
    slow, fast = peer("slow", speed=50, ratio=2.0), peer("fast", speed=100, ratio=1.0)
    assert "times fast" in judge_speed("decode", [slow, fast], 0.0).why


def test_speed_at_a_larger_divergence_does_not_meet_the_target():
    verdict = judge_speed("decode", [peer(ratio=1.5, divergence=0.1)], 0.2)
    assert not verdict.met
    assert "2.00 times as large" in verdict.why


def test_an_unknown_divergence_meets_nothing():
    assert not judge_speed("decode", [peer(ratio=1.5, divergence=None)], 0.1).met
    assert not judge_speed("decode", [peer(ratio=1.5)], None).met


def test_the_fastest_of_the_more_precise_peers_is_named():
    peers = [
        peer("coarse", speed=300, ratio=1.0, divergence=0.5),
        peer("fine", speed=200, ratio=1.5, divergence=0.1),
        peer("finest", speed=10, ratio=30.0, divergence=0.01),
    ]
    said = judge_worse("decode", peers, 0.2)
    assert said is not None
    assert "of the 2 peers" in said
    assert "fine is the fastest; ours is 1.50" in said


def test_nothing_is_said_where_no_peer_is_more_precise():
    assert judge_worse("decode", [peer(divergence=0.3)], 0.2) is None


@pytest.mark.parametrize(("own", "met"), [(10.0, True), (10.1, False)])
def test_a_conversion_is_held_to_its_share_of_the_next_best(own, met):
    verdict = judge_conversion("time", own, {"a": 30.0, "b": 90.0}, share=1 / 3, unit="s")
    assert verdict.met is met
    assert "30.00 s of a" in verdict.why


def test_a_conversion_that_takes_too_much_is_told_how_many_times_too_much():
    assert (
        "2.0 times what the target allows" in judge_conversion("memory", 2.0, {"a": 10.0}, share=1 / 10, unit="GB").why
    )
