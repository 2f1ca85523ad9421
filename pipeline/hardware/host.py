"""The machine that we are on, as the operating system describes it.

Cheap enough for every command: files under /proc and /sys are read, NVIDIA's management library is called through
ctypes, and nothing heavy (torch, onnxruntime) is imported, no process started. What must be measured is the probe's.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

# The instruction sets for which kernels are written, by the names that /proc/cpuinfo gives them.
# The other hundred flags say nothing about inference and would only make cache keys brittle.
# fmt: off
_KERNEL_INSTRUCTION_SETS = frozenset({
    "sse4_1", "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx_ne_convert",
    "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "asimdfhm", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme",
})
# fmt: on

# macOS names the same ARM features in its own way.
_DARWIN_FEATURES = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
}

# Distribution -> the provider that it adds to CPUExecutionProvider, which every one of them has.
_PROVIDER_OF_DISTRIBUTION = {
    "onnxruntime-gpu": "CUDAExecutionProvider",
    "onnxruntime-migraphx": "MIGraphXExecutionProvider",
    "onnxruntime-openvino": "OpenVINOExecutionProvider",
    "onnxruntime-directml": "DmlExecutionProvider",
    "onnxruntime-qnn": "QNNExecutionProvider",
    "onnxruntime": None,
}


class Gpu(BaseModel):
    """One NVIDIA GPU. `memory_bytes` is None where the driver does not say (memory shared with the CPU)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_bytes: int | None
    driver: str | None


class Host(BaseModel):
    """The machine that we are on, with the limits under which this process runs.

    Cores and memory are what this process may use: CPU affinity and cgroup limits are taken off. `None` means that
    the operating system does not say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu_model: str
    physical_cores: int
    logical_cores: int
    memory_bytes: int
    available_memory_bytes: int
    l3_cache_bytes: int | None = None
    instruction_sets: tuple[str, ...] = ()
    os: str
    """'Linux', 'Darwin'; the distribution's own name is in `distribution`."""
    distribution: str | None = None
    architecture: str
    python: str
    kernel: str
    governor: str | None = None
    load_average: tuple[float, float, float] | None = None
    """Over 1, 5 and 15 minutes, when the host was described."""
    clock_mhz: float | None = None
    """The median over the usable CPUs when the host was described: not a nominal figure."""
    gpus: tuple[Gpu, ...] = ()
    execution_providers: tuple[str, ...] = ()
    """What the installed ONNX Runtime distributions offer here, in its order of preference."""

    def facets(self) -> dict[str, Any]:
        """What of this host may enter a cache key, as JSON values: nothing that changes while the machine does not."""
        return {
            "host.cpu": self.cpu_model,
            "host.gpu": [{"name": gpu.name, "driver": gpu.driver} for gpu in self.gpus],
            "host.cores": self.physical_cores,
            "host.instruction_sets": sorted(self.instruction_sets),
        }


def describe_host(*, root: Path = Path("/"), affinity: Collection[int] | None = None) -> Host:
    """Describe this machine. Takes milliseconds; raises nothing for what it cannot find out.

    `root` is where /proc, /sys and /etc are looked for, `affinity` the CPUs that this process may run on
    (default: as the operating system says).
    """
    gpus = find_gpus()
    described = _describe_linux(root, affinity) if (root / "proc/cpuinfo").exists() else _describe_without_proc()
    return Host(
        **described,
        os=platform.system(),
        architecture=platform.machine(),
        python=platform.python_version(),
        kernel=platform.release(),
        gpus=gpus,
        execution_providers=execution_providers(installed_distributions(), has_nvidia_gpu=bool(gpus)),
    )


# --- Linux -----------------------------------------------------------------------------------------------------------


def _describe_linux(root: Path, affinity: Collection[int] | None) -> dict[str, Any]:
    processors = _cpuinfo(root)
    if affinity is None:
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cpus = sorted(affinity)
    sys_cpu = root / "sys/devices/system/cpu"

    logical = max(1, len(cpus))
    # Hyper-threads of one core share one list of siblings, which so names the core on every architecture.
    siblings = {_text(sys_cpu / f"cpu{cpu}/topology/thread_siblings_list") for cpu in cpus}
    physical = logical if None in siblings else max(1, len(siblings))
    quota = _cpu_quota(root)
    if quota is not None:
        # Rounded down: a thread too many is throttled for whole periods and spoils every timing, one too few
        # costs a fraction of a core.
        logical, physical = min(logical, max(1, int(quota))), min(physical, max(1, int(quota)))

    memory_bytes, available_bytes = _memory(root)
    flags = next((p[key] for p in processors for key in ("flags", "Features") if key in p), "").split()
    return {
        "cpu_model": _cpu_model(root, processors),
        "physical_cores": physical,
        "logical_cores": logical,
        "memory_bytes": memory_bytes,
        "available_memory_bytes": available_bytes,
        "l3_cache_bytes": _l3_cache_bytes(sys_cpu, cpus),
        "instruction_sets": tuple(sorted(_KERNEL_INSTRUCTION_SETS.intersection(flags))),
        "distribution": _distribution(root),
        "governor": _text(sys_cpu / f"cpu{cpus[0] if cpus else 0}/cpufreq/scaling_governor"),
        "load_average": _load_average(root),
        "clock_mhz": _clock_mhz(sys_cpu, cpus, processors),
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return int(text) if text is not None else None
    except ValueError:  # "max", cgroup's word for no limit
        return None


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo, one for each processor (on ARM the last may describe the board)."""
    blocks = (_text(root / "proc/cpuinfo") or "").split("\n\n")
    pairs = [[line.partition(":") for line in block.splitlines()] for block in blocks]
    return [{key.strip(): value.strip() for key, _, value in lines} for lines in pairs if lines]


def _cpu_model(root: Path, processors: list[dict[str, str]]) -> str:
    for key in ("model name", "Model", "cpu model", "cpu"):
        for processor in processors:
            if processor.get(key):
                return processor[key]
    board = _text(root / "sys/firmware/devicetree/base/model")
    if board:
        return board.rstrip("\0")
    if processors and "CPU part" in processors[0]:
        return f"ARM implementer {processors[0].get('CPU implementer', '?')} part {processors[0]['CPU part']}"
    return platform.machine() or "unknown"


def _cgroup_folders(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """The cgroups that bound this process for one controller, innermost first, each with its version (1 or 2).

    A limit set on any ancestor binds. In a container the path that /proc shows may be the host's, which is not there;
    the mount itself is then the container's own cgroup and comes last in any case.
    """
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts = root / "sys/fs/cgroup"
        if number == "0" and not controllers:
            version, base = 2, mounts / "unified" if (mounts / "unified").is_dir() else mounts
        elif controller in controllers.split(","):
            version, base = 1, mounts / controller
        else:
            continue
        folder = base / path.lstrip("/")
        while folder != base and base in folder.parents:
            yield version, folder
            folder = folder.parent
        yield version, base


def _cpu_quota(root: Path) -> float | None:
    """How many CPUs' worth of time cgroups grant to this process; None where they set no limit."""
    quotas = []
    for version, folder in _cgroup_folders(root, "cpu"):
        if version == 2:
            quota_text, _, period_text = (_text(folder / "cpu.max") or "max").partition(" ")
            quota = int(quota_text) if quota_text.isdecimal() else None
            period = int(period_text) if period_text.isdecimal() else None
        else:
            quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _memory(root: Path) -> tuple[int, int]:
    """(memory, free memory) that this process may use, in bytes."""
    meminfo = {}
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdecimal():
            meminfo[key] = int(words[0]) * 1024  # the file says kB and means KiB
    total = meminfo.get("MemTotal", 0)
    available = meminfo.get("MemAvailable", meminfo.get("MemFree", total))
    for version, folder in _cgroup_folders(root, "memory"):
        limit = _number(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        if limit is None or limit >= total:  # version 1 writes "no limit" as a number near 2^63
            continue
        used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
        # Pages of files that nobody has touched lately are counted as used, but are given back when asked for.
        reclaimable = _memory_stat(folder, "inactive_file" if version == 2 else "total_inactive_file")
        total = min(total, limit)
        available = min(available, max(0, limit - used + reclaimable))
    return total, min(available, total)


def _memory_stat(folder: Path, key: str) -> int:
    for line in (_text(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdecimal():
            return int(value)
    return 0


def _l3_cache_bytes(sys_cpu: Path, cpus: Sequence[int]) -> int | None:
    """The sum over the distinct L3 caches of these CPUs, in bytes."""
    sizes: dict[str, int] = {}
    for cpu in cpus:
        cache = sys_cpu / f"cpu{cpu}/cache/index3"
        size, shared_by = _text(cache / "size"), _text(cache / "shared_cpu_list")
        if size and size[-1] in "KM" and size[:-1].isdecimal():
            sizes[shared_by or str(cpu)] = int(size[:-1]) * (1024 if size[-1] == "K" else 1024**2)
    return sum(sizes.values()) or None


def _clock_mhz(sys_cpu: Path, cpus: Sequence[int], processors: list[dict[str, str]]) -> float | None:
    wanted = {str(cpu) for cpu in cpus}
    clocks = [float(p["cpu MHz"]) for p in processors if "cpu MHz" in p and p.get("processor") in wanted]
    if not clocks:
        khz = (_number(sys_cpu / f"cpu{cpu}/cpufreq/scaling_cur_freq") for cpu in cpus)
        clocks = [value / 1000 for value in khz if value]
    return round(statistics.median(clocks), 1) if clocks else None


def _load_average(root: Path) -> tuple[float, float, float] | None:
    words = (_text(root / "proc/loadavg") or "").split()
    try:
        return float(words[0]), float(words[1]), float(words[2])
    except (IndexError, ValueError):
        return None


def _distribution(root: Path) -> str | None:
    for line in (_text(root / "etc/os-release") or "").splitlines():
        key, _, value = line.partition("=")
        if key == "PRETTY_NAME":
            return value.strip().strip("\"'") or None
    return None


# --- macOS and others ------------------------------------------------------------------------------------------------


def _describe_without_proc() -> dict[str, Any]:
    import psutil  # only here: Linux is read from /proc, which costs less than this import

    memory = psutil.virtual_memory()
    logical = psutil.cpu_count(logical=True) or 1
    features = [ours for theirs, ours in _DARWIN_FEATURES.items() if _sysctl(theirs) == b"\x01\x00\x00\x00"]
    brand = _sysctl("machdep.cpu.brand_string")
    return {
        "cpu_model": brand.rstrip(b"\0").decode(errors="replace") if brand else platform.machine() or "unknown",
        "physical_cores": psutil.cpu_count(logical=False) or logical,
        "logical_cores": logical,
        "memory_bytes": memory.total,
        "available_memory_bytes": memory.available,
        "instruction_sets": tuple(sorted(features)),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def _sysctl(name: str) -> bytes | None:
    """The raw value of a sysctl of macOS; None where there is no such thing."""
    if platform.system() != "Darwin":
        return None
    libc = ctypes.CDLL(None)
    size = ctypes.c_size_t(256)
    buffer = ctypes.create_string_buffer(size.value)
    if libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return None
    return buffer.raw[: size.value]


# --- GPUs and execution providers ------------------------------------------------------------------------------------


class _NvmlMemory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _NvmlDevice(NamedTuple):
    gpu: Gpu
    uuid: str


def _load_nvml() -> Any:
    return ctypes.CDLL("libnvidia-ml.so.1")


def find_gpus(*, load_nvml: Callable[[], Any] = _load_nvml, visible: str | None = None) -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that this process may use, asked from the driver's management library (NVML).

    `visible` restricts them as CUDA does (default: CUDA_VISIBLE_DEVICES of the environment). No library, no driver
    or no device: an empty tuple.
    """
    try:
        nvml = load_nvml()
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:  # the library is there, but no driver or no device
        return ()
    try:
        devices = _nvml_devices(nvml)
    finally:
        nvml.nvmlShutdown()
    if visible is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(device.gpu for device in (devices if visible is None else _restrict(devices, visible)))


def _nvml_devices(nvml: Any) -> list[_NvmlDevice]:
    driver = _nvml_string(nvml.nvmlSystemGetDriverVersion)
    count = ctypes.c_uint(0)
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    devices = []
    for index in range(count.value):
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
            continue  # a device that this user may not open
        known = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
        gpu = Gpu(
            name=_nvml_string(nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU",
            memory_bytes=int(memory.total) if known else None,
            driver=driver,
        )
        devices.append(_NvmlDevice(gpu, _nvml_string(nvml.nvmlDeviceGetUUID, handle) or ""))
    return devices


def _nvml_string(function: Callable[..., int], *arguments: Any) -> str | None:
    buffer = ctypes.create_string_buffer(96)  # NVML's own limit for names, UUIDs and versions
    if function(*arguments, buffer, ctypes.c_uint(len(buffer))) != 0:
        return None
    return buffer.value.decode(errors="replace")


def _restrict(devices: Sequence[_NvmlDevice], visible: str) -> Iterator[_NvmlDevice]:
    """The devices that CUDA_VISIBLE_DEVICES names, by index or by a prefix of the UUID.

    As in CUDA, the list ends at the first entry that names no device, so "-1" and "" hide all of them.
    """
    for entry in (word.strip() for word in visible.split(",")):
        if entry.isdecimal() and int(entry) < len(devices):
            yield devices[int(entry)]
            continue
        named = [device for device in devices if entry and device.uuid.startswith(entry)]
        if len(named) != 1:
            return
        yield named[0]


def installed_distributions() -> frozenset[str]:
    """Which distributions of ONNX Runtime are installed, by name."""
    found = set()
    for name in _PROVIDER_OF_DISTRIBUTION:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
    return frozenset(found)


def execution_providers(installed: Collection[str], *, has_nvidia_gpu: bool) -> tuple[str, ...]:
    """The execution providers of these distributions of ONNX Runtime, in its order of preference, the CPU's last.

    Told from names, without importing onnxruntime: a build of one's own under another name is not seen.
    """
    if not set(installed) & set(_PROVIDER_OF_DISTRIBUTION):
        return ()
    providers = [
        provider
        for distribution, provider in _PROVIDER_OF_DISTRIBUTION.items()
        if provider and distribution in installed and (has_nvidia_gpu or provider != "CUDAExecutionProvider")
    ]
    if platform.system() == "Darwin" and "onnxruntime" in installed:
        providers.append("CoreMLExecutionProvider")
    return (*providers, "CPUExecutionProvider")
