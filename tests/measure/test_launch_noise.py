import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pipeline.measure.samples import Sample, SpeedMeasurement
from pipeline.measure.workload import Point

PATH = Path(__file__).parents[2] / "benchmarks" / "launch_noise.py"
DECODE = Point(kind="decode", batch=1, prompt=8, new_tokens=4)


@pytest.mark.parametrize("spread", [0.0, 0.003, 0.02])
def test_what_launches_add_is_found_in_the_baseline_s_two_processes(spread: float) -> None:
    spec = importlib.util.spec_from_file_location("launch_noise", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    draw = np.random.default_rng(0)
    launches = spread * draw.standard_normal((2, 100))
    samples = [
        Sample(
            stage="source",
            replica=replica,
            launch=launch,
            round=number,
            order=0,
            point=DECODE,
            seconds=(float(np.exp(launches[replica, launch] + 0.005 * draw.standard_normal())),),
            started_s=0.0,
        )
        for replica in (0, 1)
        for launch in range(100)
        for number in range(8)
    ]
    seen = module.pairs(SpeedMeasurement(baseline="source", seed=0, samples=tuple(samples)))
    center, low, high, noise = module.pooled(seen["decode"])
    assert low <= center <= high
    assert center == pytest.approx(spread, rel=0.25, abs=0.001)
    assert low <= spread <= high
    assert noise == pytest.approx(0.005, rel=0.1)
