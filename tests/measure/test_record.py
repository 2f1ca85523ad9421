from pipeline.measure.record import Record
from pipeline.measure.samples import LoadSample, Sample
from pipeline.measure.workload import Point

POINT = Point(kind="prefill", batch=1, prompt=8, new_tokens=0)


def sample(launch: int, round: int, *, stage: str = "int4", replica: int = 0) -> Sample:
    return Sample(
        stage=stage, replica=replica, launch=launch, round=round, order=0, point=POINT, seconds=(1.0,), started_s=0.0
    )


def test_a_failure_before_any_round_has_its_bare_reason() -> None:
    record = Record()
    record.fail("int4", 0, 0, "out of memory")
    assert record.failures == {"int4": "out of memory"}


def test_a_failure_after_rounds_says_how_many_there_were() -> None:
    record = Record(samples=[sample(0, 0), sample(0, 1), sample(1, 0), sample(1, 1, stage="other")])
    record.fail("int4", 0, 1, "out of memory")
    assert record.failures["int4"] == "it failed in launch 2, after 3 rounds: out of memory"
    assert len(record.samples) == 4


def test_a_failing_second_process_of_the_baseline_is_a_note() -> None:
    record = Record()
    record.fail("source", 1, 0, "out of memory")
    assert record.failures == {}
    assert record.notes == ["the second process of source failed, the noise is not known: out of memory"]


def test_cold_and_warm_loads_are_told_apart_and_warm_ones_give_their_median() -> None:
    loads = [
        LoadSample(stage="int4", launch=n, load_s=s, cold=n == 1, warm=n != 1)
        for n, s in enumerate((1.0, 9.0, 2.0, 7.0))
    ]
    times = Record(loads=loads).load_times(["int4", "other"])
    assert (times["int4"].cold_s, times["int4"].warm_s) == (9.0, 2.0)
    assert (times["other"].cold_s, times["other"].warm_s) == (None, None)


def test_a_load_that_compiled_anew_without_being_cold_is_neither() -> None:
    loads = [
        LoadSample(stage="compiled", launch=0, load_s=28.0, cold=False, warm=True, compiled_anew=True),
        LoadSample(stage="compiled", launch=1, load_s=0.5, cold=False, warm=True),
    ]
    times = Record(loads=loads).load_times(["compiled"])["compiled"]
    assert (times.cold_s, times.warm_s) == (None, 0.5)


def test_a_load_that_found_some_of_its_files_in_memory_is_neither_cold_nor_warm() -> None:
    loads = [LoadSample(stage="int4", launch=n, load_s=s, cold=False, warm=n == 1) for n, s in enumerate((4.3, 0.5))]
    times = Record(loads=loads).load_times(["int4"])["int4"]
    assert (times.cold_s, times.warm_s) == (None, 0.5)
