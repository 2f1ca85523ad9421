"""Hardware profiles: what a target can do, and where each figure comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import Location, RecipeError, did_you_mean, nearest
from pipeline.hardware.host import Host, describe_host

if TYPE_CHECKING:
    from pipeline.hardware.probe import ProbeResult

DataType = Literal["float32", "bfloat16", "float16", "int8"]

# Strict, because pydantic would otherwise take `true` for one core and "4" for four.
_Count = Annotated[int, Field(strict=True, gt=0)]
_Rate = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

# The fields that hold figures, each of which a profile must account for.
_FIGURES = (
    "physical_cores",
    "logical_cores",
    "memory_bytes",
    "bandwidth_gb_per_s",
    "peak_gflops",
    "compute_capability",
)

LOCAL = "local"
_READ = "read from the operating system"


class HardwareProfile(BaseModel):
    """A target: its cores, memory and arithmetic. A figure that is not known (yet) is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    device: Literal["cpu", "cuda"]
    model: str
    """The maker's name for it, such as 'Intel Core i7-1165G7'."""
    physical_cores: _Count | None = None
    """Of a CPU. A GPU's profile leaves the cores out: the machine around it is the host, whatever it has."""
    logical_cores: _Count | None = None
    memory_bytes: _Count | None = None
    """The host's memory for a CPU, the device's for a GPU (that of the machine around it is the host's own)."""
    bandwidth_gb_per_s: _Rate | None = None
    """Of that memory; GB = 1e9 bytes."""
    peak_gflops: Mapping[DataType, _Rate | None] = {}
    """By data type; None where the device has no arithmetic for it, absent where nothing is known."""
    instruction_sets: tuple[str, ...] = ()
    """By the names of /proc/cpuinfo: avx2, avx512f, avx512_vnni, avx512_bf16 …"""
    execution_providers: tuple[str, ...] = ()
    """By ONNX Runtime's names: CPUExecutionProvider …"""
    compute_capability: Annotated[str, Field(strict=True, pattern=r"^[1-9][0-9]*\.[0-9]$")] | None = None
    """Of an NVIDIA GPU, in quotes: "8.6". It says which arithmetic and which kernels there are."""
    sources: Mapping[str, str] = {}
    """Field -> where its figure comes from or how it is computed; 'peak_gflops' or, one by one, 'peak_gflops.int8'."""

    @model_validator(mode="after")
    def _cores_are_consistent(self) -> Self:
        if self.physical_cores and self.logical_cores and self.logical_cores < self.physical_cores:
            raise ValueError(
                f"logical_cores ({self.logical_cores}) are fewer than physical_cores ({self.physical_cores})"
            )
        return self

    @model_validator(mode="after")
    def _fields_are_the_devices(self) -> Self:
        if self.device == "cpu" and self.compute_capability is not None:
            raise ValueError("compute_capability belongs to a profile with device: cuda")
        return self


def profile_names() -> list[str]:
    """The names of the profiles that come with pipeline, sorted. `local` works, too, but is no file."""
    return sorted(_shipped())


def load_profile(
    name_or_path: str, *, host: Host | None = None, relative_to: Path | None = None, probe_folder: Path | None = None
) -> HardwareProfile:
    """The profile `local`, or one from a .yaml/.yml file, or one that comes with pipeline, by its name.

    A relative path starts at `relative_to` (default: the current folder). `host` is what `local` describes (default:
    this machine), with measured figures where the probe has left its result in `probe_folder`;
    nothing is measured here. Raises RecipeError for a name that is not known and a file that is not right.
    """
    if name_or_path == LOCAL:
        from pipeline.hardware.probe import cached_probe

        host = host or describe_host()
        return local_profile(host, cached_probe(host, probe_folder) if probe_folder else None)
    if name_or_path.endswith((".yaml", ".yml")):
        return _read_profile((relative_to or Path()) / Path(name_or_path).expanduser())
    shipped = _shipped()
    if name_or_path not in shipped:
        raise RecipeError(
            f"there is no hardware profile {name_or_path!r}",
            hint=did_you_mean(name_or_path, [LOCAL, *shipped], noun="hardware profiles")
            + "; or give the path of a .yaml file",
        )
    return _read_profile(shipped[name_or_path])


def local_profile(host: Host, probed: ProbeResult | None = None) -> HardwareProfile:
    """This host's CPU as a profile; bandwidth and arithmetic are known only with a result of the probe."""
    sources = dict.fromkeys(("model", "physical_cores", "logical_cores", "memory_bytes", "instruction_sets"), _READ)
    sources["execution_providers"] = "told from the installed distributions of ONNX Runtime"
    measured: dict[str, Any] = {}
    if probed is not None:
        source = f"measured by the probe on {probed.measured_at.date().isoformat()}"
        if probed.was_busy:
            source += ", beside other work (it may be too low)"
        sources["bandwidth_gb_per_s"] = f"{source}: {_spread(probed.bandwidth_gb_per_s)}, {probed.threads} threads"
        peaks: dict[str, float | None] = {}
        for data_type, figure in probed.gemm_gflops.items():
            peaks[data_type] = figure.value if figure else None
            sources[f"peak_gflops.{data_type}"] = (
                f"{source}: {_spread(figure)}, {probed.gemm_kernels.get(data_type, 'torch')}, torch {probed.torch}"
                if figure
                else f"{source}: torch {probed.torch} has no fast kernel for it here"
            )
        measured = {"bandwidth_gb_per_s": probed.bandwidth_gb_per_s.value, "peak_gflops": peaks}
    return HardwareProfile(
        name=LOCAL,
        description="The machine that pipeline runs on.",
        device="cpu",
        model=host.cpu_model,
        physical_cores=host.physical_cores,
        logical_cores=host.logical_cores,
        memory_bytes=host.memory_bytes or None,
        instruction_sets=host.instruction_sets,
        execution_providers=host.execution_providers,
        sources=sources,
        **measured,
    )


def _spread(figure: Any) -> str:
    return f"{figure.statistic} of {figure.repetitions} ({figure.low:.4g} to {figure.high:.4g})"


def _folders() -> tuple[Path, Path]:
    """Where profiles that come with pipeline are: in an installed wheel, and in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "data" / "hardware_profiles", package.parent / "hardware_profiles"


def _shipped() -> dict[str, Path]:
    """Name -> file. The package's own data goes before a folder that happens to lie beside the package."""
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
            found.setdefault(path.stem, path)
    return found


# --- reading a file --------------------------------------------------------------------------------------------------


def _read_profile(path: Path) -> HardwareProfile:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = did_you_mean(path.stem, [LOCAL, *_shipped()], noun="hardware profiles by name")
        raise RecipeError(f"there is no hardware profile at {path}", hint=hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the hardware profile {path} cannot be read: {error}") from error

    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Not only YAMLError: PyYAML lets through what impossible dates and thousands of brackets raise.
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        location = Location(str(path), mark.line + 1, mark.column + 1) if mark else Location(str(path), 1, 1)
        raise RecipeError(f"not valid YAML: {problem}", location=location) from error
    if not isinstance(values, dict):
        raise RecipeError("a hardware profile is a mapping of fields to values", location=Location(str(path), 1, 1))

    try:
        profile = HardwareProfile.model_validate(values)
    except ValidationError as error:
        problems = [_problem(details) for details in error.errors()]
    else:
        problems = list(_missing_sources(profile))
        if not problems:
            return profile
    where = Location(str(path), *_position(tree, problems[0][0]))
    raise RecipeError("; ".join(f"{_dotted(field)}{text}" for field, text in problems), location=where)


_Problem = tuple[tuple[str, ...], str]  # the field, outermost key first, and what is wrong with it


def _dotted(field: tuple[str, ...]) -> str:
    return f"{'.'.join(field)}: " if field else ""


def _problem(details: Any) -> _Problem:
    """What pydantic found, in words for the author of the file."""
    kind, value = details["type"], details["input"]
    # pydantic marks the key of a mapping by "[key]", which is no part of the path in the file.
    field = tuple(str(part) for part in details["loc"] if part != "[key]")
    if kind == "missing":
        return field, "this field is required"
    if kind == "extra_forbidden":
        near = nearest(field[-1], HardwareProfile.model_fields)
        return field, "there is no such field" + (f"; did you mean {near!r}?" if near else "")
    if kind == "value_error":
        return field, str(details["ctx"]["error"])
    expected = details["msg"].replace("Input should be ", "expected ").replace("valid ", "")
    return field, f"{expected}, not {value!r}"


def _missing_sources(profile: HardwareProfile) -> Iterator[_Problem]:
    """Every figure of a file says where it comes from, and every source belongs to a field."""
    known = [*HardwareProfile.model_fields, *(f"peak_gflops.{data_type}" for data_type in profile.peak_gflops)]
    for key, source in profile.sources.items():
        if key not in known:
            near = nearest(key, known)
            yield ("sources", key), "there is no such field" + (f"; did you mean {near!r}?" if near else "")
        elif not source.strip():
            yield ("sources", key), "expected where the figure comes from, not an empty text"
    for figure in _FIGURES:
        if figure == "peak_gflops":
            # A null is a statement, too: that the device has no such arithmetic.
            wanted = [f"peak_gflops.{data_type}" for data_type in profile.peak_gflops]
        else:
            wanted = [figure] if getattr(profile, figure) is not None else []
        for key in wanted:
            if key not in profile.sources and figure not in profile.sources:
                yield tuple(key.split(".")), f"sources does not say where this figure comes from (add sources.{key})"


def _position(tree: yaml.Node | None, field: tuple[str, ...]) -> tuple[int, int]:
    """(line, column), from 1, of the deepest key of this path that is in the file."""
    line, column = 1, 1
    node = tree
    for part in field:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next((pair for pair in pairs if getattr(pair[0], "value", None) == part), None)
        if match is None:
            break
        line, column = match[0].start_mark.line + 1, match[0].start_mark.column + 1
        node = match[1]
    return line, column
