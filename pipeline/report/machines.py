"""The machine that a run was measured on, and the target that it was meant for, in words."""

from __future__ import annotations

from typing import Any

from pipeline.report.schema import Report, StageReport


def target_facts(hardware: dict[str, Any]) -> list[tuple[str, str]]:
    """What the profile says of the target, in words."""
    known = [
        ("profile", hardware.get("name")),
        ("model", hardware.get("model")),
        ("device", hardware.get("device")),
        ("cores", hardware.get("physical_cores")),
        ("memory", _gibibytes(hardware.get("memory_bytes"))),
        ("memory bandwidth", _unit(hardware.get("bandwidth_gb_per_s"), "GB/s")),
        ("peak arithmetic", _peaks(hardware.get("peak_gflops"))),
    ]
    return [(name, str(value)) for name, value in known if value not in {None, ""}]


def host_facts(report: Report) -> list[tuple[str, str]]:
    """The machine that everything was measured on."""
    host = report.host
    probe = host.get("probe") or {}
    bandwidth = (probe.get("bandwidth_gb_per_s") or {}).get("value")
    gflops = {k: (v or {}).get("value") for k, v in (probe.get("gemm_gflops") or {}).items()}
    load = host.get("load_average")
    gpus = ", ".join(str(g.get("name")) for g in host.get("gpus") or () if isinstance(g, dict))
    system = " ".join(str(host[k]) for k in ("distribution", "architecture") if host.get(k)) or host.get("os")
    known = [
        ("processor", host.get("cpu_model")),
        ("GPU", gpus),
        ("cores", f"{host.get('physical_cores')}, {report.threads} threads used"),
        ("memory", _gibibytes(host.get("memory_bytes"))),
        ("read bandwidth, measured", _unit(bandwidth, "GB/s")),
        ("arithmetic, measured", _peaks(gflops)),
        ("system", system),
        ("Python", host.get("python")),
        ("governor", host.get("governor")),
        ("load before the run", f"{load[0]:.2f}" if load else None),
    ]
    return [(name, str(value)) for name, value in known if value not in {None, ""}]


def measured_on(report: Report) -> str:
    """The device that the models ran on, and the processor beside it where that is another one."""
    processor = str(report.host.get("cpu_model"))
    gpus = [str(gpu.get("name")) for gpu in report.host.get("gpus") or () if isinstance(gpu, dict)]
    on_gpu = report.hardware.get("device") == "cuda" and gpus
    return f"{gpus[0]} beside {processor}" if on_gpu else processor


def measured_to_run(stage: StageReport, report: Report) -> int | None:
    """The memory that the estimate of running it is of: the GPU's where it runs on one, else its process's."""
    on_gpu = report.hardware.get("device") == "cuda"
    return stage.device_peak_memory_bytes if on_gpu else stage.inference_peak_memory_bytes


def _gibibytes(size: Any) -> str | None:
    return f"{size / 2**30:.1f} GiB" if isinstance(size, int | float) else None


def _unit(value: Any, unit: str) -> str | None:
    return f"{value:,.1f} {unit}" if isinstance(value, int | float) else None


def _peaks(peaks: Any) -> str:
    if not isinstance(peaks, dict):
        return ""
    return ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in peaks.items() if isinstance(value, int | float))
