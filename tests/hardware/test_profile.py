"""Profiles: where they are found, what they must say, and how they fail."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipeline.errors import RecipeError
from pipeline.hardware import HardwareProfile, Host, load_profile, local_profile, profile, profile_names
from pipeline.hardware.probe import Figure, ProbeResult, probe, probe_folder

GIB = 1024**3

VALID: dict[str, Any] = {
    "name": "box",
    "device": "cpu",
    "model": "Imaginary CPU",
    "physical_cores": 4,
    "logical_cores": 8,
    "bandwidth_gb_per_s": 50.0,
    "peak_gflops": {"float32": 100, "bfloat16": None},
    "sources": {
        "physical_cores": "data sheet",
        "logical_cores": "data sheet",
        "bandwidth_gb_per_s": "data sheet",
        "peak_gflops": "computed: 4 x 25",
    },
}


def written(folder: Path, name: str = "box.yaml", **changes: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({**VALID, **changes}, sort_keys=False), encoding="utf-8")
    return path


def refused(path: Path) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    return caught.value


def a_host() -> Host:
    return Host(
        cpu_model="Imaginary CPU",
        physical_cores=2,
        logical_cores=4,
        memory_bytes=8 * GIB,
        available_memory_bytes=4 * GIB,
        instruction_sets=("avx2",),
        os="Linux",
        architecture="x86_64",
        python="3.11.7",
        kernel="6.1",
        execution_providers=("CPUExecutionProvider",),
    )


def a_result(**changes: Any) -> ProbeResult:
    values: dict[str, Any] = {
        "measured_at": datetime(2026, 2, 3, 4, 5, tzinfo=UTC),
        "host": a_host().facets(),
        "threads": 2,
        "torch": "2.13.0",
        "load_average_1m": 0.0,
        "bandwidth_gb_per_s": Figure.best_of([40.0, 44.0, 42.0]),
        "buffer_bytes": 256 * 1024**2,
        "gemm_gflops": {"float32": Figure.best_of([90.0, 100.0]), "float16": None},
        "gemm_kernels": {"float32": "torch.mm, 1024 x 1024"},
    }
    return ProbeResult(**{**values, **changes})


# --- the profiles that come with pipeline


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_is_valid_and_named_as_its_file(name: str) -> None:
    assert load_profile(name).name == name


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_says_something_of_every_data_type(name: str) -> None:
    assert set(load_profile(name).peak_gflops) == {"float32", "bfloat16", "float16", "int8"}


def test_the_figures_of_the_i7_1165g7_follow_from_their_arithmetic() -> None:
    laptop = load_profile("i7-1165g7")
    cores, clock_ghz = 4, 4.7
    assert (laptop.physical_cores, laptop.logical_cores, laptop.memory_bytes) == (cores, 8, 16 * GIB)
    assert laptop.bandwidth_gb_per_s == pytest.approx(4267e6 * 128 / 8 / 1e9, abs=0.05)
    assert laptop.peak_gflops["float32"] == pytest.approx(cores * 512 / 32 * 2 * clock_ghz)
    assert laptop.peak_gflops["int8"] == pytest.approx(cores * 512 / 8 * 2 * clock_ghz)
    assert laptop.peak_gflops["bfloat16"] is None
    assert "avx512_bf16" not in laptop.instruction_sets


def test_the_figures_of_the_xeon_w2235_follow_from_their_arithmetic() -> None:
    station = load_profile("xeon-w2235")
    cores, clock_ghz, units = 6, 4.6, 2
    assert (station.physical_cores, station.logical_cores, station.memory_bytes) == (cores, 12, 64 * GIB)
    assert station.bandwidth_gb_per_s == pytest.approx(4 * 2933e6 * 8 / 1e9, abs=0.05)
    assert station.peak_gflops["float32"] == pytest.approx(cores * units * 512 / 32 * 2 * clock_ghz)
    assert station.peak_gflops["int8"] == pytest.approx(cores * units * 512 / 8 * 2 * clock_ghz)
    assert station.peak_gflops["bfloat16"] is None


GPUS = [name for name in profile_names() if load_profile(name).device == "cuda"]


def test_the_gpus_that_people_ask_for_are_there() -> None:
    assert set(GPUS) >= {"rtx-3090", "a100-40gb", "a100-80gb", "h200"}


@pytest.mark.parametrize("name", GPUS)
def test_a_gpus_profile_speaks_of_the_device_and_not_of_the_machine_around_it(name: str) -> None:
    gpu = load_profile(name)
    assert gpu.physical_cores is gpu.logical_cores is None
    assert gpu.instruction_sets == ()
    assert gpu.execution_providers == ("CUDAExecutionProvider",)
    assert gpu.memory_bytes and gpu.bandwidth_gb_per_s and gpu.compute_capability


@pytest.mark.parametrize("name", GPUS)
def test_dense_rates_of_a_gpu_stand_in_the_ratio_of_its_tensor_cores(name: str) -> None:
    """Sparse figures in the place of dense ones, or float16 accumulation, would break these."""
    peaks = load_profile(name).peak_gflops
    assert peaks["bfloat16"] == peaks["float16"]
    factor = 4 if name.startswith("rtx") else 2  # consumer cards halve the rate of float32 accumulation
    assert peaks["int8"] == pytest.approx(factor * (peaks["float16"] or 0), rel=0.002)


def test_the_bandwidth_of_gpus_follows_from_bus_and_clock() -> None:
    for name, bits, gigabits in (("rtx-3090", 384, 19.5), ("a100-40gb", 5120, 2.43), ("a100-80gb", 5120, 3.186)):
        assert load_profile(name).bandwidth_gb_per_s == pytest.approx(bits * gigabits / 8, rel=0.001)


def test_memory_of_gpus_is_what_the_driver_tells() -> None:
    told = {"rtx-3090": 24576, "a100-40gb": 40960, "a100-80gb": 81920, "h200": 143771}
    assert {name: (load_profile(name).memory_bytes or 0) / 2**20 for name in told} == told


# --- finding


def test_a_profile_is_found_by_name_in_either_folder_the_packages_own_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, checkout = tmp_path / "data", tmp_path / "checkout"
    for folder in (data, checkout):
        folder.mkdir()
        written(folder, "both.yaml", model=folder.name)
    written(data, "alpha.yaml")
    written(checkout, "beta.yml")
    monkeypatch.setattr(profile, "_folders", lambda: (data, checkout))
    assert profile_names() == ["alpha", "beta", "both"]
    assert load_profile("both").model == "data"


def test_folders_that_are_not_there_hold_no_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_folders", lambda: (tmp_path / "a", tmp_path / "b"))
    assert profile_names() == []


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(RecipeError) as caught:
        load_profile("i7-1165g")
    assert "'i7-1165g'" in caught.value.message
    assert caught.value.hint is not None
    assert "did you mean 'i7-1165g7'?" in caught.value.hint
    assert all(name in caught.value.hint for name in ["local", *profile_names()])


def test_a_name_with_slashes_finds_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    written(tmp_path)
    monkeypatch.setattr(profile, "_folders", lambda: (folder, folder))
    with pytest.raises(RecipeError, match="no hardware profile"):
        load_profile("../box")


def test_a_relative_path_starts_at_the_folder_that_is_given(tmp_path: Path) -> None:
    written(tmp_path)
    assert load_profile("box.yaml", relative_to=tmp_path).name == "box"


def test_a_relative_path_starts_at_the_current_folder_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "box.yml")
    monkeypatch.chdir(tmp_path)
    assert load_profile("./box.yml").name == "box"


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    assert load_profile(str(written(tmp_path)), relative_to=Path("/nowhere")).name == "box"


def test_a_path_without_a_file_says_so_and_names_a_profile_of_that_name(tmp_path: Path) -> None:
    error = refused(tmp_path / "i7-1165g7.yaml")
    assert "there is no hardware profile at" in error.message
    assert error.hint is not None
    assert "i7-1165g7" in error.hint


# --- validation: each message names the file, the field and where it stands


def test_an_unknown_field_is_answered_with_place_and_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_text(yaml.safe_dump(VALID, sort_keys=False) + "bandwith: 3\n", encoding="utf-8")
    error = refused(path)
    assert "bandwith: there is no such field; did you mean 'bandwidth_gb_per_s'?" in error.message
    assert error.location == (str(path), len(path.read_text().splitlines()), 1)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_text("name: box\ndevice: cpu\n", encoding="utf-8")
    assert "model: this field is required" in refused(path).message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("physical_cores", 0),
        ("physical_cores", True),
        ("physical_cores", "four"),
        ("bandwidth_gb_per_s", -1.0),
        ("bandwidth_gb_per_s", float("inf")),
        ("device", "tpu"),
        ("memory_bytes", 1.5),
    ],
)
def test_a_wrong_value_is_shown_with_its_field(tmp_path: Path, field: str, value: Any) -> None:
    error = refused(written(tmp_path, **{field: value}))
    assert f"{field}: expected" in error.message
    assert repr(value) in error.message


def test_a_wrong_value_deep_inside_is_found_at_its_own_line(tmp_path: Path) -> None:
    path = written(tmp_path, peak_gflops={"float32": 100, "bfloat16": "fast"})
    error = refused(path)
    assert "peak_gflops.bfloat16: expected" in error.message
    assert error.location is not None
    assert path.read_text().splitlines()[error.location.line - 1].strip() == "bfloat16: fast"
    assert error.location.column == 3


def test_an_unknown_data_type_is_refused(tmp_path: Path) -> None:
    assert "peak_gflops.float64" in refused(written(tmp_path, peak_gflops={"float64": 1.0})).message


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    message = refused(written(tmp_path, physical_cores=-1, colour="red")).message
    assert "physical_cores" in message
    assert "colour" in message


def test_fewer_logical_than_physical_cores_are_refused(tmp_path: Path) -> None:
    assert "logical_cores (2) are fewer" in refused(written(tmp_path, logical_cores=2)).message


@pytest.mark.parametrize("value", [8.6, "8", "sm_86", "0.1"])
def test_a_compute_capability_is_a_text_of_two_numbers(tmp_path: Path, value: Any) -> None:
    sources = {**VALID["sources"], "compute_capability": "data sheet"}
    error = refused(written(tmp_path, device="cuda", compute_capability=value, sources=sources))
    assert "compute_capability" in str(error)


def test_a_compute_capability_needs_a_source_and_a_gpu(tmp_path: Path) -> None:
    assert "add sources.compute_capability" in str(refused(written(tmp_path, device="cuda", compute_capability="8.6")))
    sources = {**VALID["sources"], "compute_capability": "data sheet"}
    assert "device: cuda" in str(refused(written(tmp_path, compute_capability="8.6", sources=sources)))
    path = written(tmp_path, device="cuda", compute_capability="8.6", sources=sources)
    assert load_profile(str(path)).compute_capability == "8.6"


def test_a_figure_without_a_source_is_refused_where_it_stands(tmp_path: Path) -> None:
    sources = {key: text for key, text in VALID["sources"].items() if key != "bandwidth_gb_per_s"}
    path = written(tmp_path, sources=sources)
    error = refused(path)
    assert "bandwidth_gb_per_s: sources does not say where" in error.message
    assert error.location is not None
    assert path.read_text().splitlines()[error.location.line - 1].startswith("bandwidth_gb_per_s")


def test_each_peak_needs_a_source_even_if_it_is_null(tmp_path: Path) -> None:
    sources = {key: text for key, text in VALID["sources"].items() if key != "peak_gflops"}
    error = refused(written(tmp_path, sources={**sources, "peak_gflops.float32": "computed"}))
    assert "peak_gflops.bfloat16: sources does not say" in error.message
    assert "peak_gflops.float32: sources" not in error.message


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    error = refused(written(tmp_path, sources={**VALID["sources"], "physical_cores": " "}))
    assert "sources.physical_cores" in error.message


def test_a_source_for_a_field_that_is_not_there_is_refused(tmp_path: Path) -> None:
    error = refused(written(tmp_path, sources={**VALID["sources"], "physical_core": "?"}))
    assert "did you mean 'physical_cores'?" in error.message


def test_a_figure_that_is_not_given_needs_no_source(tmp_path: Path) -> None:
    assert load_profile(str(written(tmp_path))).memory_bytes is None


@pytest.mark.parametrize(
    ("text", "line"),
    [("name: box\nmodel: [a\n", 3), ("name: box\nmodel: !!python/object/apply:os.getcwd []\n", 2)],
)
def test_broken_and_unsafe_yaml_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "box.yaml"
    path.write_text(text, encoding="utf-8")
    error = refused(path)
    assert "not valid YAML" in error.message
    assert error.location is not None
    assert error.location.line == line


@pytest.mark.parametrize("text", ["name: 2020-13-45\n", "[" * 5000, "name: a\n---\nname: b\n", "name: \x07\n"])
def test_yaml_that_breaks_the_parser_is_no_traceback(tmp_path: Path, text: str) -> None:
    path = tmp_path / "box.yaml"
    path.write_text(text, encoding="utf-8")
    assert "not valid YAML" in refused(path).message


def test_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    assert "1: " in refused(written(tmp_path, sources={**VALID["sources"], 1: "one"})).message
    path = tmp_path / "keys.yaml"
    mixed: dict[Any, Any] = {**VALID, 2: "two"}
    path.write_text(yaml.safe_dump(mixed), encoding="utf-8")
    assert "2: " in refused(path).message


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "box.yaml"
    path.write_text(text, encoding="utf-8")
    assert "a hardware profile is a mapping" in refused(path).message


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read" in refused(path).message


def test_a_profile_cannot_be_changed(tmp_path: Path) -> None:
    loaded = load_profile(str(written(tmp_path)))
    with pytest.raises(ValidationError, match="frozen"):
        loaded.name = "other"  # type: ignore[misc]


# --- local


def test_local_before_the_probe_knows_what_the_system_says_and_no_rates(tmp_path: Path) -> None:
    local = load_profile("local", host=a_host(), probe_folder=tmp_path)
    assert (local.name, local.device, local.model) == ("local", "cpu", "Imaginary CPU")
    assert (local.physical_cores, local.logical_cores, local.memory_bytes) == (2, 4, 8 * GIB)
    assert local.execution_providers == ("CPUExecutionProvider",)
    assert local.bandwidth_gb_per_s is None
    assert dict(local.peak_gflops) == {}
    assert local.sources["memory_bytes"] == "read from the operating system"
    assert "bandwidth_gb_per_s" not in local.sources


def test_local_after_the_probe_has_its_rates_and_its_date(tmp_path: Path) -> None:
    probe(a_host(), tmp_path, measure=a_result)
    local = load_profile("local", host=a_host(), probe_folder=tmp_path)
    assert local.bandwidth_gb_per_s == 44.0
    assert dict(local.peak_gflops) == {"float32": 100.0, "float16": None}
    assert local.sources["bandwidth_gb_per_s"].startswith("measured by the probe on 2026-02-03")
    assert "40 to 44" in local.sources["bandwidth_gb_per_s"]
    assert "no fast kernel" in local.sources["peak_gflops.float16"]


def test_local_says_when_the_probe_ran_beside_other_work() -> None:
    busy = local_profile(a_host(), a_result(load_average_1m=2.0))
    quiet = local_profile(a_host(), a_result(load_average_1m=0.1))
    assert "beside other work" in busy.sources["bandwidth_gb_per_s"]
    assert "beside other work" not in quiet.sources["bandwidth_gb_per_s"]


def test_local_finds_the_probes_result_in_its_folder(tmp_path: Path) -> None:
    probe(a_host(), probe_folder(tmp_path), measure=a_result)
    assert load_profile("local", host=a_host(), probe_folder=probe_folder(tmp_path)).bandwidth_gb_per_s == 44.0
    assert load_profile("local", host=a_host()).bandwidth_gb_per_s is None


def test_local_accounts_for_every_figure_as_a_file_must() -> None:
    local: HardwareProfile = local_profile(a_host(), a_result())
    assert list(profile._missing_sources(local)) == []
