"""What this host really delivers: read bandwidth and the rate of matrix products, measured once and kept.

    python -m pipeline.hardware.probe --measure        # prints one line of JSON

The measurement runs in a process of its own, since it imports torch and fills memory. Its figures are ceilings for a
roofline, so each is the best of its repetitions, with their spread beside it. A noisy neighbour only ever lowers them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import HostError
from pipeline.files import write_atomically
from pipeline.hardware.host import Host, describe_host

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Clock = Callable[[], float]
"""Seconds that only go forward, as time.perf_counter."""

BUSY_LOAD = 0.5
"""A load average above which figures may be too low."""

_MIB = 1024**2
_MEASURING_S = 3.0  # in all; starting Python, importing torch and filling memory come on top
_WORKER_TIMEOUT_S = 180.0
_SMALLEST_BUFFER_BYTES = 256 * _MIB
_SWEEP_S = 0.025  # of uninterrupted reading in one repetition, beside which starting the threads is nothing
_TRIAL_SIZE = 256
_LARGEST_SIZE = 4096


class Figure(BaseModel):
    """One measured rate: the best of its repetitions, and how they spread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    """The figure to use; which one of the repetitions it is, `statistic` says."""
    statistic: Literal["best"] = "best"
    median: float
    low: float
    high: float
    repetitions: int

    @classmethod
    def best_of(cls, rates: Sequence[float]) -> Figure:
        """The highest of these rates. Raises ValueError where there are none."""
        if not rates:
            raise ValueError("no repetition was measured")
        return cls(
            value=max(rates),
            median=statistics.median(rates),
            low=min(rates),
            high=max(rates),
            repetitions=len(rates),
        )


class ProbeResult(BaseModel):
    """What the probe measured on one host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    measured_at: datetime
    host: Mapping[str, Any]
    """The host's facets; a result stands for hosts with equal ones."""
    threads: int
    torch: str
    """The version of torch whose kernels were timed."""
    onnxruntime: str | None = None
    """That of ONNX Runtime, where it is installed: its kernels were timed, too."""
    load_average_1m: float | None
    """Before the measurement began."""
    bandwidth_gb_per_s: Figure
    """Reading memory beyond the caches with all threads; GB = 1e9 bytes."""
    buffer_bytes: int
    gemm_gflops: Mapping[str, Figure | None]
    """Square matrix products by data type, 2 n^3 operations each; None where there is no fast kernel here."""
    gemm_kernels: Mapping[str, str]
    """Which operator of torch or ONNX Runtime, at which size, gave each rate."""

    @property
    def was_busy(self) -> bool:
        """Whether other work ran on the host when the probe began: its figures may then be too low."""
        return self.load_average_1m is not None and self.load_average_1m >= BUSY_LOAD


# --- run once and keep -----------------------------------------------------------------------------------------------


def probe_folder(store: Path) -> Path:
    """Where the results for this machine are kept in a store."""
    return store / "probe"


def cached_probe(host: Host, folder: Path, *, threads: int | None = None) -> ProbeResult | None:
    """The result that is kept in `folder` for this host; None where there is none that can be read.

    `threads`: how many it was to be measured with (default: one for each physical core).
    """
    threads = threads or host.physical_cores
    try:
        result = ProbeResult.model_validate_json(_result_path(host, folder, threads).read_bytes())
    except (OSError, ValidationError):
        return None  # absent, damaged or of another schema: to be measured again
    return result if result.host == host.facets() else None


def probe(
    host: Host,
    folder: Path,
    *,
    threads: int | None = None,
    again: bool = False,
    measure: Callable[[], ProbeResult] | None = None,
) -> ProbeResult:
    """Measure this host, or return the result kept in `folder`. A measurement takes about 6 s.

    `threads`: with so many (default: one for each physical core); each number has a result of its own. `again` measures
    even though there is a result. `measure` is what measures (default: `measure_in_worker`).
    Raises HostError where the measurement fails.
    """
    threads = threads or host.physical_cores
    kept = None if again else cached_probe(host, folder, threads=threads)
    if kept is not None:
        return kept
    found = measure() if measure is not None else measure_in_worker(threads=threads)
    result = found.model_copy(update={"host": host.facets()})
    write_atomically(_result_path(host, folder, threads), result.model_dump_json(indent=2).encode() + b"\n")
    return result


def _result_path(host: Host, folder: Path, threads: int) -> Path:
    facets = json.dumps(host.facets(), sort_keys=True, separators=(",", ":"))
    name = hashlib.sha256(facets.encode()).hexdigest()[:16]
    return folder / (f"{name}.json" if threads == host.physical_cores else f"{name}-{threads}-threads.json")


def measure_in_worker(*, seconds: float = _MEASURING_S, threads: int | None = None) -> ProbeResult:
    """Run `measure` in a fresh Python process and return what it found. Raises HostError where that fails."""
    # -P: a file in the current folder that is named like one of our modules, or like torch, must not be imported.
    command = [sys.executable, "-P", "-m", "pipeline.hardware.probe", "--measure", "--seconds", str(seconds)]
    command += ["--threads", str(threads)] if threads is not None else []
    try:
        done = subprocess.run(
            command, env=_worker_environment(), capture_output=True, text=True, timeout=_WORKER_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        message = f"the hardware probe did not end within {_WORKER_TIMEOUT_S:.0f} s"
        raise HostError(message, hint="is the host overloaded or out of memory?") from error
    if done.returncode != 0:
        last_words = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise HostError(
            f"the hardware probe failed (exit status {done.returncode}): {last_words[0]}",
            hint="run `python -m pipeline.hardware.probe --measure` to see the whole message",
        )
    try:
        return ProbeResult.model_validate_json(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValidationError) as error:
        raise HostError("the hardware probe printed something else than its result") from error


def _worker_environment() -> dict[str, str]:
    """The environment in which the worker finds this very package, be it installed or in a checkout."""
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}  # importing onnxruntime would start its uploader
    here = str(Path(__file__).resolve().parents[2])
    if here not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([here, before] if before else [here])
    return environment


# --- bandwidth -------------------------------------------------------------------------------------------------------


def repeat(operation: Callable[[], object], *, seconds: float, clock: Clock, at_least: int = 3) -> list[float]:
    """Run `operation` until `seconds` have passed, at least so many times; the duration of each run in seconds."""
    durations: list[float] = []
    begin = now = clock()
    while len(durations) < at_least or now - begin < seconds:
        before = now
        operation()
        now = clock()
        durations.append(now - before)
    return durations


class ReadBandwidth:
    """A buffer in memory and the threads that read it: `measure` as often as you like, then `close`.

    Needs numpy only. `buffer_bytes` should be several times the last-level cache.
    """

    def __init__(self, *, threads: int, buffer_bytes: int = _SMALLEST_BUFFER_BYTES) -> None:
        import numpy as np

        self.threads = threads
        words = max(1, buffer_bytes // 8 // threads)
        self.buffer_bytes = words * 8 * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-bandwidth")

        # Written, not merely allocated: untouched pages are all one page of zeros, which never leaves the cache.
        def fill(_: int) -> npt.NDArray[np.int64]:
            return np.full(words, 1, dtype=np.int64)

        self._parts = list(self._pool.map(fill, range(threads)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def measure(self, *, seconds: float, clock: Clock = time.perf_counter) -> list[float]:
        """Read the buffer for about `seconds`; the rate of each repetition in GB/s (1e9 bytes)."""
        once_s = min(repeat(lambda: self._read(1), seconds=0, clock=clock, at_least=2))
        sweeps = max(1, round(min(_SWEEP_S, seconds / 4) / once_s)) if once_s > 0 else 1
        durations = repeat(lambda: self._read(sweeps), seconds=seconds, clock=clock)
        return [self.buffer_bytes * sweeps / duration / 1e9 for duration in durations]

    def close(self) -> None:
        """Let go of the threads and the memory."""
        self._pool.shutdown()
        self._parts.clear()

    def _read(self, sweeps: int) -> None:
        import numpy as np

        def sweep(part: npt.NDArray[np.int64]) -> None:
            # A maximum over integers: numpy runs it in SIMD at several times the speed of memory, without the GIL.
            for _ in range(sweeps):
                np.maximum.reduce(part)

        for _ in self._pool.map(sweep, self._parts):
            pass


def quick_bandwidth(
    seconds: float = 0.2,
    *,
    host: Host | None = None,
    threads: int | None = None,
    clock: Clock = time.perf_counter,
) -> Figure:
    """Read bandwidth of this host now, in GB/s: a companion to a measurement, to tell a slow model from a slow hour.

    Filling the buffer takes some time more than `seconds`; who calls it often keeps a `ReadBandwidth` instead.
    """
    host = host or describe_host()
    with ReadBandwidth(threads=threads or host.physical_cores, buffer_bytes=_buffer_bytes(host)) as bandwidth:
        return Figure.best_of(bandwidth.measure(seconds=seconds, clock=clock))


def _buffer_bytes(host: Host) -> int:
    """Four times the last-level caches, and never more than a quarter of the memory that is free."""
    wanted = max(_SMALLEST_BUFFER_BYTES, 4 * (host.l3_cache_bytes or 0))
    return max(8 * _MIB, min(wanted, host.available_memory_bytes // 4))


# --- matrix products -------------------------------------------------------------------------------------------------


def measure(
    *, seconds: float = _MEASURING_S, threads: int | None = None, clock: Clock = time.perf_counter
) -> ProbeResult:
    """Measure this host in this process, with `threads` (default: one for each physical core).

    Imports torch and sets its number of threads: call it in a worker.
    """
    host = describe_host()
    threads = threads or host.physical_cores
    with ReadBandwidth(threads=threads, buffer_bytes=_buffer_bytes(host)) as bandwidth:
        rates = bandwidth.measure(seconds=seconds / 4, clock=clock)
        buffer_bytes = bandwidth.buffer_bytes

    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    gemm: dict[str, Figure | None] = {}
    kernels: dict[str, str] = {}
    float32_trial = 0.0
    for data_type in ("float32", "bfloat16", "float16", "int8"):
        trials = _trials(data_type, threads, clock)
        kernel = max(trials, key=lambda name: trials[name], default=None)
        if data_type == "float32":
            float32_trial = max(trials.values(), default=0.0)
        # A data type without instructions of its own falls to a reference kernel, often a hundred times slower.
        # It is not timed any further: one product of a fair size would take seconds.
        if kernel is None or trials[kernel] < float32_trial / 8:
            gemm[data_type] = None
            continue
        size, figure = _gemm_figure(data_type, kernel, threads, seconds=seconds / 5, clock=clock)
        float32 = gemm.get("float32")
        slow = float32 is not None and figure.value < float32.value / 2
        gemm[data_type] = None if slow else figure
        if not slow:
            kernels[data_type] = f"{kernel}, {size} x {size}"
    return ProbeResult(
        measured_at=datetime.now(UTC).replace(microsecond=0),
        host=host.facets(),
        threads=threads,
        torch=str(torch.__version__),
        onnxruntime=_onnxruntime_version(),
        load_average_1m=host.load_average[0] if host.load_average else None,
        bandwidth_gb_per_s=Figure.best_of(rates),
        buffer_bytes=buffer_bytes,
        gemm_gflops=gemm,
        gemm_kernels=kernels,
    )


def _products(data_type: str, size: int, threads: int) -> dict[str, Callable[[], object]]:
    """The operators that multiply two [size, size] matrices of this data type, by name."""
    import torch

    if data_type != "int8":
        dtype: torch.dtype = getattr(torch, data_type)
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        return {"torch.mm": lambda: torch.mm(left, right), **_onnxruntime_products(data_type, size, threads)}

    signed = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    unsigned = torch.randint(0, 256, (size, size), dtype=torch.uint8)

    def packed() -> Callable[[], object]:
        weight = torch.ops.onednn.qlinear_prepack(signed, [size, size])
        scales, zero_points = torch.full((size,), 0.01), torch.zeros(size, dtype=torch.int64)

        def multiply() -> object:
            return torch.ops.onednn.qlinear_pointwise(
                unsigned, 0.01, 128, weight, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
            )

        return multiply

    products: dict[str, Callable[[], object]] = {"torch._int_mm": lambda: torch._int_mm(signed, signed)}
    # It raises where torch was built without oneDNN, or this CPU is none of oneDNN's.
    with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
        products["onednn.qlinear_pointwise"] = packed()
    return products | _onnxruntime_products(data_type, size, threads)


_ONNXRUNTIME_OPERATORS = {"float32": ("", "MatMul"), "int8": ("com.microsoft", "DynamicQuantizeMatMul")}


def _onnxruntime_version() -> str | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    return str(onnxruntime.__version__)


def _onnxruntime_products(data_type: str, size: int, threads: int) -> dict[str, Callable[[], object]]:
    """The operator of ONNX Runtime; none where it is not installed, or has no kernel of its own for this data type."""
    if data_type not in _ONNXRUNTIME_OPERATORS:
        return {}
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return {}
    import numpy as np

    domain, operator = _ONNXRUNTIME_OPERATORS[data_type]
    random = np.random.default_rng(0)
    left = random.standard_normal((size, size), dtype=np.float32)
    weights: dict[str, npt.NDArray[Any]]
    if data_type == "int8":
        scales = np.full(size, 0.01, np.float32)
        weights = {"b": random.integers(-127, 128, (size, size), dtype=np.int8), "scales": scales}
    else:
        weights = {"b": random.standard_normal((size, size), dtype=np.float32)}
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", *weights], ["y"], domain=domain)],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [size, size])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # it must not slow what is timed after it
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {f"onnxruntime {operator}": lambda: session.run(None, {"a": left})}


def _trials(data_type: str, threads: int, clock: Clock) -> dict[str, float]:
    """A first rate in GFLOP/s of each operator that works here, from small matrices."""
    rates = {}
    for name, multiply in _products(data_type, _TRIAL_SIZE, threads).items():
        try:
            multiply()
            durations = repeat(multiply, seconds=0, clock=clock)
        except (RuntimeError, NotImplementedError):
            continue  # no kernel for this data type on this CPU
        rates[name] = _gflops(_TRIAL_SIZE, min(durations))
    return rates


def _gemm_figure(data_type: str, kernel: str, threads: int, *, seconds: float, clock: Clock) -> tuple[int, Figure]:
    """(size, rate in GFLOP/s) of one operator, at the largest size of which several products fit into `seconds`."""
    size = 2 * _TRIAL_SIZE
    while True:
        multiply = _products(data_type, size, threads)[kernel]
        multiply()  # the first call picks and compiles the kernel
        (once_s,) = repeat(multiply, seconds=0, clock=clock, at_least=1)
        if size >= _LARGEST_SIZE or 8 * once_s > seconds / 4:
            break
        size *= 2
    durations = repeat(multiply, seconds=seconds, clock=clock)
    return size, Figure.best_of([_gflops(size, duration) for duration in durations])


def _gflops(size: int, duration_s: float) -> float:
    return 2 * size**3 / duration_s / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    """`--measure` measures this host and prints the result as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.hardware.probe", description=main.__doc__)
    parser.add_argument("--measure", action="store_true", required=True)
    parser.add_argument(
        "--seconds", type=float, default=_MEASURING_S, help="how long to measure (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="with how many (default: one for each physical core)")
    options = parser.parse_args(arguments)
    print(measure(seconds=options.seconds, threads=options.threads).model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
