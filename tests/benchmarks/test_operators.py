"""Times by operator, from a profile's events."""

from benchmarks.peers.operators import durations_of, seconds_by_operator


def event(name, operator, microseconds, cat="Node"):
    return {"cat": cat, "name": name, "dur": microseconds, "args": {"op_name": operator}}


EVENTS = [
    event("a_kernel_time", "MatMul", 1000),
    event("a_kernel_time", "MatMul", 3000),
    event("a_kernel_time", "MatMul", 2000),
    event("b_kernel_time", "MatMul", 500),
    event("c_kernel_time", "Add", 10000),
    event("a_fence_before", "MatMul", 99),
    {"cat": "Session", "name": "model_run", "dur": 12345, "args": {}},
]


def test_only_kernels_are_counted_each_by_its_node():
    found = durations_of(EVENTS)
    assert set(found) == {("MatMul", "a_kernel_time"), ("MatMul", "b_kernel_time"), ("Add", "c_kernel_time")}
    assert found["MatMul", "b_kernel_time"] == [0.0005]


def test_an_operators_time_is_the_sum_of_its_nodes_medians_largest_first():
    found = seconds_by_operator(durations_of(EVENTS))
    assert list(found) == ["Add", "MatMul"]
    assert abs(found["MatMul"] - 0.0025) < 1e-12
