"""What is read from the operating system, over a folder that stands for / and a library that stands for NVML."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.hardware import Gpu, Host, describe_host
from pipeline.hardware.host import execution_providers, find_gpus

KIB, MIB, GIB = 1024, 1024**2, 1024**3
UNLIMITED_V1 = 9223372036854771712


def cpuinfo(cpus: int, *, flags: str = "fpu sse4_2 avx2 fma avx512f avx512_vnni rdpid", mhz: float = 2800.0) -> str:
    blocks = [
        f"processor\t: {cpu}\nmodel name\t: Imaginary CPU @ 2.80GHz\n"
        f"cpu MHz\t\t: {mhz + 100 * cpu}\nflags\t\t: {flags}\n"
        for cpu in range(cpus)
    ]
    return "\n".join(blocks)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Four cores of two threads each (CPUs 0-3 and 4-7), 16 GiB of which 10 are free, no cgroup limits."""
    files = {
        "proc/cpuinfo": cpuinfo(8),
        "proc/meminfo": f"MemTotal: {16 * MIB} kB\nMemFree: {2 * MIB} kB\nMemAvailable: {10 * MIB} kB\n",
        "proc/loadavg": "0.50 0.25 0.10 1/100 4242\n",
        "proc/self/cgroup": "0::/user.slice/job\n",
        "etc/os-release": 'NAME=Imaginary\nPRETTY_NAME="Imaginary Linux 12"\n',
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "sys/fs/cgroup/user.slice/job/cgroup.controllers": "cpu memory\n",
    }
    for cpu in range(8):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        files[f"{folder}/topology/thread_siblings_list"] = f"{cpu % 4},{cpu % 4 + 4}\n"
        files[f"{folder}/cache/index3/size"] = "12288K\n"
        files[f"{folder}/cache/index3/shared_cpu_list"] = "0-7\n"
    write(tmp_path, files)
    return tmp_path


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def described(root: Path, cpus: range = range(8)) -> Host:
    return describe_host(root=root, affinity=set(cpus))


# --- cores, clocks and instruction sets


def test_hyper_threads_of_one_core_count_as_one_physical_core(machine: Path) -> None:
    host = described(machine)
    assert (host.physical_cores, host.logical_cores) == (4, 8)


@pytest.mark.parametrize(
    ("cpus", "physical", "logical"), [(range(2), 2, 2), (range(0, 8, 4), 1, 2), (range(6), 4, 6), (range(3, 4), 1, 1)]
)
def test_cores_outside_the_affinity_do_not_count(machine: Path, cpus: range, physical: int, logical: int) -> None:
    host = described(machine, cpus)
    assert (host.physical_cores, host.logical_cores) == (physical, logical)


def test_without_topology_every_cpu_counts_as_a_core(machine: Path) -> None:
    (machine / "sys/devices/system/cpu/cpu1/topology/thread_siblings_list").unlink()
    assert described(machine).physical_cores == 8


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 4), ("300000 100000", 3), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_a_cpu_quota_is_rounded_down_to_whole_cores_but_never_to_none(machine: Path, quota: str, cores: int) -> None:
    write(machine, {"sys/fs/cgroup/user.slice/job/cpu.max": quota})
    assert described(machine).physical_cores == cores


def test_a_quota_on_an_outer_cgroup_binds_as_well(machine: Path) -> None:
    write(
        machine,
        {
            "sys/fs/cgroup/user.slice/job/cpu.max": "400000 100000",
            "sys/fs/cgroup/user.slice/cpu.max": "200000 100000",
        },
    )
    host = described(machine)
    assert (host.physical_cores, host.logical_cores) == (2, 2)


def test_a_cpu_quota_of_cgroup_version_1_is_respected(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "4:memory:/\n2:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert described(machine).logical_cores == 1


def test_a_quota_of_minus_one_is_no_limit(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "2:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert described(machine).logical_cores == 8


def test_only_instruction_sets_that_kernels_use_are_named_in_order(machine: Path) -> None:
    assert described(machine).instruction_sets == ("avx2", "avx512_vnni", "avx512f", "fma", "sse4_2")


def test_the_features_of_an_arm_cpu_are_read_from_their_own_line(machine: Path) -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    write(machine, {"proc/cpuinfo": text})
    host = described(machine, range(1))
    assert host.instruction_sets == ("asimd", "asimddp", "i8mm")
    assert host.cpu_model == "ARM implementer 0x41 part 0xd40"


def test_the_clock_is_the_median_over_the_usable_cpus(machine: Path) -> None:
    assert described(machine, range(1, 4)).clock_mhz == 3000.0


def test_an_l3_cache_that_cpus_share_counts_once(machine: Path) -> None:
    assert described(machine).l3_cache_bytes == 12 * MIB


def test_separate_l3_caches_are_added(machine: Path) -> None:
    for cpu in range(8):
        shared = "0-3" if cpu < 4 else "4-7"
        write(machine, {f"sys/devices/system/cpu/cpu{cpu}/cache/index3/shared_cpu_list": shared})
    assert described(machine).l3_cache_bytes == 24 * MIB


def test_model_governor_load_and_distribution_are_read(machine: Path) -> None:
    host = described(machine)
    assert host.cpu_model == "Imaginary CPU @ 2.80GHz"
    assert host.governor == "powersave"
    assert host.load_average == (0.5, 0.25, 0.1)
    assert host.distribution == "Imaginary Linux 12"


def test_what_the_system_does_not_say_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "processor\t: 0\n"})
    host = described(tmp_path, range(1))
    assert (host.governor, host.clock_mhz, host.load_average, host.l3_cache_bytes) == (None, None, None, None)
    assert host.instruction_sets == ()
    assert host.physical_cores == 1


# --- memory


def test_without_limits_memory_is_the_machines(machine: Path) -> None:
    host = described(machine)
    assert (host.memory_bytes, host.available_memory_bytes) == (16 * GIB, 10 * GIB)


def test_a_memory_limit_bounds_memory_and_what_is_free_of_it(machine: Path) -> None:
    write(
        machine,
        {
            "sys/fs/cgroup/user.slice/job/memory.max": str(4 * GIB),
            "sys/fs/cgroup/user.slice/job/memory.current": str(3 * GIB),
        },
    )
    host = described(machine)
    assert (host.memory_bytes, host.available_memory_bytes) == (4 * GIB, 1 * GIB)


def test_cached_files_that_can_be_dropped_count_as_free(machine: Path) -> None:
    write(
        machine,
        {
            "sys/fs/cgroup/user.slice/job/memory.max": str(4 * GIB),
            "sys/fs/cgroup/user.slice/job/memory.current": str(3 * GIB),
            "sys/fs/cgroup/user.slice/job/memory.stat": f"anon 1\nactive_file {GIB}\ninactive_file {2 * GIB}\n",
        },
    )
    assert described(machine).available_memory_bytes == 3 * GIB


def test_the_tightest_limit_of_all_ancestors_holds(machine: Path) -> None:
    write(
        machine,
        {
            "sys/fs/cgroup/user.slice/job/memory.max": str(8 * GIB),
            "sys/fs/cgroup/user.slice/memory.max": str(2 * GIB),
            "sys/fs/cgroup/memory.max": "max",
        },
    )
    assert described(machine).memory_bytes == 2 * GIB


def test_more_is_never_free_than_the_machine_has_free(machine: Path) -> None:
    write(machine, {"sys/fs/cgroup/user.slice/job/memory.max": str(15 * GIB)})
    assert described(machine).available_memory_bytes == 10 * GIB


def test_a_memory_limit_of_cgroup_version_1_is_respected(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "4:memory:/job\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(UNLIMITED_V1),
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(1 * GIB),
        },
    )
    host = described(machine)
    assert (host.memory_bytes, host.available_memory_bytes) == (2 * GIB, 1 * GIB)


def test_in_a_container_the_mounts_own_limit_is_found_though_the_path_is_the_hosts(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "4:memory:/docker/0123456789ab\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(1 * GIB),
        },
    )
    assert described(machine).memory_bytes == 1 * GIB


def test_a_cgroup_path_that_leaves_its_folder_ends_without_harm(machine: Path) -> None:
    write(machine, {"proc/self/cgroup": "0::/../../elsewhere\n"})
    assert described(machine).memory_bytes == 16 * GIB


# --- GPUs


class FakeNvml:
    """As much of libnvidia-ml as is called, under its names: functions that fill what they are given and return 0."""

    def __init__(self, gpus: list[tuple[str, int | None, str]], *, initialises: bool = True) -> None:
        self.gpus = gpus
        self.initialises = initialises
        self.shut_down = False

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0 if self.initialises else 9

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.shut_down = True
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, length: Any) -> int:  # noqa: N802
        buffer.value = b"560.35"
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, length: Any) -> int:  # noqa: N802
        buffer.value = self.gpus[handle.value - 1][0].encode()
        return 0

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, length: Any) -> int:  # noqa: N802
        buffer.value = self.gpus[handle.value - 1][2].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        total = self.gpus[handle.value - 1][1]
        if total is None:
            return 3
        memory._obj.total = total
        return 0


TWO_GPUS: list[tuple[str, int | None, str]] = [
    ("NVIDIA GeForce RTX 3090", 24 * GIB, "GPU-aaaa-1"),
    ("NVIDIA A100", 40 * GIB, "GPU-bbbb-2"),
]


def names(visible: str) -> list[str]:
    return [gpu.name for gpu in find_gpus(load_nvml=lambda: FakeNvml(TWO_GPUS), visible=visible)]


def test_gpus_are_named_with_memory_and_driver() -> None:
    nvml = FakeNvml(TWO_GPUS)
    assert find_gpus(load_nvml=lambda: nvml, visible="0,1") == (
        Gpu(name="NVIDIA GeForce RTX 3090", memory_bytes=24 * GIB, driver="560.35"),
        Gpu(name="NVIDIA A100", memory_bytes=40 * GIB, driver="560.35"),
    )
    assert nvml.shut_down


def test_without_the_library_there_are_no_gpus() -> None:
    def absent() -> Any:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    assert find_gpus(load_nvml=absent) == ()


def test_a_library_without_a_driver_means_no_gpus() -> None:
    assert find_gpus(load_nvml=lambda: FakeNvml(TWO_GPUS, initialises=False)) == ()


def test_a_gpu_that_does_not_tell_its_memory_is_listed_all_the_same() -> None:
    (gpu,) = find_gpus(load_nvml=lambda: FakeNvml([("NVIDIA GB10", None, "GPU-c")]), visible="0")
    assert gpu == Gpu(name="NVIDIA GB10", memory_bytes=None, driver="560.35")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", ["NVIDIA A100"]),
        ("1,0", ["NVIDIA A100", "NVIDIA GeForce RTX 3090"]),
        ("GPU-bbbb", ["NVIDIA A100"]),
        ("0,-1,1", ["NVIDIA GeForce RTX 3090"]),
        ("7", []),
        ("-1", []),
        ("", []),
        ("GPU-", []),
    ],
)
def test_gpus_are_restricted_as_cuda_restricts_them(visible: str, expected: list[str]) -> None:
    assert names(visible) == expected


def test_the_environment_restricts_gpus_where_the_caller_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.name for gpu in find_gpus(load_nvml=lambda: FakeNvml(TWO_GPUS))] == ["NVIDIA A100"]


# --- execution providers


@pytest.fixture
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")


@pytest.mark.usefixtures("on_linux")
@pytest.mark.parametrize(
    ("installed", "has_gpu", "expected"),
    [
        ({"onnxruntime"}, False, ("CPUExecutionProvider",)),
        ({"onnxruntime"}, True, ("CPUExecutionProvider",)),
        ({"onnxruntime-gpu"}, True, ("CUDAExecutionProvider", "CPUExecutionProvider")),
        ({"onnxruntime-gpu"}, False, ("CPUExecutionProvider",)),
        ({"onnxruntime-openvino"}, False, ("OpenVINOExecutionProvider", "CPUExecutionProvider")),
        (set(), True, ()),
    ],
)
def test_providers_follow_from_the_installed_distributions(
    installed: set[str], has_gpu: bool, expected: tuple[str, ...]
) -> None:
    assert execution_providers(installed, has_nvidia_gpu=has_gpu) == expected


# --- the value


def host(**changes: Any) -> Host:
    values: dict[str, Any] = {
        "cpu_model": "Imaginary CPU",
        "physical_cores": 4,
        "logical_cores": 8,
        "memory_bytes": 16 * GIB,
        "available_memory_bytes": 10 * GIB,
        "instruction_sets": ("avx2",),
        "os": "Linux",
        "architecture": "x86_64",
        "python": "3.11.7",
        "kernel": "6.1",
    }
    return Host(**{**values, **changes})


def test_facets_are_the_four_that_may_enter_cache_keys() -> None:
    gpu = Gpu(name="NVIDIA A100", memory_bytes=40 * GIB, driver="560.35")
    assert host(gpus=(gpu,)).facets() == {
        "host.cpu": "Imaginary CPU",
        "host.gpu": [{"name": "NVIDIA A100", "driver": "560.35"}],
        "host.cores": 4,
        "host.instruction_sets": ["avx2"],
    }


def test_facets_do_not_change_with_the_hour() -> None:
    later = host(available_memory_bytes=GIB, load_average=(9.0, 9.0, 9.0), clock_mhz=800.0, governor="powersave")
    assert later.facets() == host().facets()


def test_facets_and_the_host_survive_json() -> None:
    this = describe_host()
    assert json.loads(json.dumps(this.facets())) == this.facets()
    assert Host.model_validate_json(this.model_dump_json()) == this


def test_a_host_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        host().physical_cores = 8  # type: ignore[misc]


def test_this_machine_has_cores_memory_and_a_model() -> None:
    this = describe_host()
    assert 1 <= this.physical_cores <= this.logical_cores
    assert 0 < this.available_memory_bytes <= this.memory_bytes
    assert this.cpu_model


def test_describing_the_host_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.hardware import describe_host; describe_host();"
        "print([m for m in ('torch', 'onnxruntime', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_describing_the_host_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    assert describe_host().architecture


def test_a_system_without_proc_is_described_as_well(tmp_path: Path) -> None:
    this = describe_host(root=tmp_path)
    assert 1 <= this.physical_cores <= this.logical_cores
    assert 0 < this.available_memory_bytes <= this.memory_bytes
    assert (this.governor, this.clock_mhz, this.distribution) == (None, None, None)
