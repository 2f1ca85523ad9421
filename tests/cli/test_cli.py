"""What a person types, what comes back, and with which exit code."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from pipeline.hardware import Gpu, describe_host
from pipeline.store import Store

pytestmark = pytest.mark.usefixtures("plugins", "store")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(
        f"version: 1\nname: r\nmodel: {{path: {checkpoint}}}\npasses:\n"
        "  - pass: mark\n    value: 3\n  - pass: write\n    after: source\n"
    )
    return file


def files_below(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()] if folder.exists() else []


def test_help_and_version_answer(cli: Cli) -> None:
    assert "Optimize models by recipe" in cli("--help")[1]
    assert cli("--version")[1].startswith("pipeline ")
    for verb in ("run", "plan", "why", "passes", "hardware", "schema", "report", "cache"):
        code, out, _ = cli(verb, "--help")
        assert (code, "Usage: pipeline " + verb in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "r.yaml", "--seet", "a=1"], "No such option"),
        (["run", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (["passes", "show", "exprt_onnx"], "did you mean 'export_onnx'?"),
        (["hardware", "show", "i7-1165g8"], "did you mean 'i7-1165g7'?"),
        (["report", "nothing"], "there is no run nothing"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_a_message(arguments: list[str], expected: str, cli: Cli) -> None:
    code, _, err = cli(*arguments)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("passes.mark.valu=1", "unknown key 'valu'; did you mean 'value'?"),
        ("passes.mark.value=99", "value should be less than or equal to 9; got 99"),
        ("passes.mark.pass=makr", "unknown pass 'makr'"),
        ("hardware=i7", "there is no hardware profile 'i7'"),
        ("evaluate.quality.text=nowhere.txt", "cannot be read: No such file or directory"),
        ("model.path=nowhere", "does not exist"),
        ("model.builtin=llama3-tiny", "unknown built-in model 'llama3-tiny'"),
        ("gates=[mark.speed > 1]", "there is no metric 'speed'"),
        ("evaluate.workload.prompt_lengths=[250]", "250 and 64 new tokens take 314 positions; the model has 256"),
        ("passes.write.after=write", "the stage 'write' is the one that asks for it"),
    ],
)
def test_a_wrong_recipe_ends_with_2_and_nothing_written(
    override: str, expected: str, cli: Cli, recipe: Path, store: Store
) -> None:
    code, _, err = cli("run", recipe, "--set", override)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert files_below(Path.cwd()) == []
    assert files_below(store.root / "stages") + files_below(store.blobs) == []


@pytest.mark.usefixtures("no_gpu")
def test_a_device_that_the_host_lacks_ends_with_4_and_says_what_helps(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    profile = tmp_path / "gpu.yaml"
    shipped = Path(__file__).parents[2] / "hardware_profiles" / "i7-1165g7.yaml"
    profile.write_text(
        shipped.read_text().replace("device: cpu", "device: cuda").replace("name: i7-1165g7", "name: gpu")
    )
    code, _, err = cli("run", recipe, "--set", f"hardware={profile}")
    assert code == 4
    assert "CUDA device and this host has none" in err
    assert "--set hardware=local" in err
    assert files_below(Path.cwd()) == []
    code, out, err = cli("plan", recipe, "--set", f"hardware={profile}")
    assert code == 4
    assert "mark" in out


def test_plan_before_between_and_after(cli: Cli, recipe: Path) -> None:
    def statuses() -> dict[str, str]:
        code, out, _ = cli("plan", recipe, "--json")
        assert code == 0
        return {s["name"]: s["status"] for s in json.loads(out)["stages"]}

    assert statuses() == {"source": "will run", "mark": "will run", "write": "will run"}
    assert cli("run", recipe, "--no-measure", "--until", "mark")[0] == 0
    assert statuses() == {"source": "cached", "mark": "cached", "write": "will run"}
    assert cli("run", recipe, "--no-measure")[0] == 0
    assert statuses() == {"source": "cached", "mark": "cached", "write": "cached"}


def test_a_plan_runs_and_stores_nothing(cli: Cli, recipe: Path, store: Store) -> None:
    code, out, _ = cli("plan", recipe)
    assert code == 0
    assert "will run" in out
    assert files_below(Path.cwd()) == []
    assert files_below(store.root / "stages") + files_below(store.blobs) == []


def test_an_unmeasured_run_leaves_a_report_a_model_and_latest(cli: Cli, recipe: Path) -> None:
    code, out, _ = cli("run", recipe, "--no-measure")
    assert code == 0
    assert "speed, load time and memory were not measured (--no-measure)" in out
    latest = Path("runs/r/latest")
    report = json.loads((latest / "report.json").read_text())
    jsonschema.validate(report, json.loads(cli("schema", "--report")[1]))
    assert [s["status"] for s in report["stages"]] == ["ran", "ran", "ran"]
    assert all(s["speed"] is None for s in report["stages"])
    assert report["export"] == "write"
    assert (latest / "model" / "note.txt").read_text() == "x"
    assert (latest / "logs" / "mark.log").read_text() == "marking with 3\n"
    assert str(latest.readlink()) == report["run"]


def test_only_runs_a_stage_and_what_it_is_made_from(cli: Cli, recipe: Path) -> None:
    code, out, _ = cli("run", recipe, "--no-measure", "--only", "write", "--json")
    assert code == 0
    assert [s["name"] for s in json.loads(out)["stages"]] == ["source", "write"]


def test_the_recipe_of_a_run_can_be_run_again(cli: Cli, recipe: Path) -> None:
    cli("run", recipe, "--no-measure", "--set", "passes.mark.value=5")
    code, out, _ = cli("plan", "runs/r/latest/recipe.yaml", "--json")
    assert code == 0
    assert {s["status"] for s in json.loads(out)["stages"]} == {"cached"}


def test_a_failed_stage_ends_with_3_and_the_others_go_on(cli: Cli, recipe: Path) -> None:
    code, out, _ = cli("run", recipe, "--no-measure", "--set", "passes.mark={pass: crash}")
    assert code == 3
    assert "ZeroDivisionError: one over nothing" in out
    assert "(log: logs/crash.log)" in out
    report = json.loads(Path("runs/r/latest/report.json").read_text())
    assert {s["name"]: s["status"] for s in report["stages"]} == {"source": "ran", "crash": "failed", "write": "ran"}
    assert "ZeroDivisionError" in Path("runs/r/latest/logs/crash.log").read_text()


def test_a_failed_gate_ends_with_1(cli: Cli, recipe: Path) -> None:
    assert cli("run", recipe, "--no-measure", "--set", "gates=[mark.size_bytes < 1]")[0] == 1
    assert cli("run", recipe, "--no-measure", "--set", "gates=[mark.size_bytes > 1]")[0] == 0


def test_a_gate_over_what_was_not_measured_is_not_evaluated(cli: Cli, recipe: Path) -> None:
    code, out, _ = cli("run", recipe, "--no-measure", "--json", "--set", "gates=[mark.decode_speedup > 1]")
    assert code == 0
    assert json.loads(out)["gates"][0]["result"] == "not_evaluated"


@pytest.mark.slow
@pytest.mark.usefixtures("measured_briefly")
def test_a_model_that_no_runner_can_load_is_unmeasured_and_ends_with_3(
    cli: Cli, recipe: Path, store: Store, probed_store: Callable[[Path], Store]
) -> None:
    probed_store(store.root)
    code, out, _ = cli("run", recipe, "--set", "evaluate.budget_s=1")
    assert code == 3
    assert "unmeasured" in out
    assert "quality was not measured" in out or "config.json describes" in out
    assert "Traceback" not in out


def test_report_shows_the_latest_run_of_a_recipe_again(cli: Cli, recipe: Path) -> None:
    cli("run", recipe, "--no-measure")
    for name in ("r", "runs/r/latest", "runs/r/latest/report.json"):
        code, out, _ = cli("report", name)
        assert code == 0
        assert "what it changed" in out
    assert json.loads(cli("report", "r", "--json")[1])["recipe"] == "r"
    (Path("runs/r/latest") / "report.json").write_text('{"schema_version": 2}')
    code, _, err = cli("report", "r")
    assert code == 2
    assert "not a report that this version reads" in err


def test_why_tells_what_changed(cli: Cli, recipe: Path) -> None:
    assert "the store has no run of the pass 'mark'" in cli("why", recipe, "mark")[1]
    cli("run", recipe, "--no-measure")
    assert cli("why", recipe, "mark")[1].startswith("mark: cached")
    out = cli("why", recipe, "mark", "--set", "passes.mark.value=4")[1]
    assert "mark: will run" in out
    assert "params.value: 3 -> 4" in out
    code, _, err = cli("why", recipe, "marc")
    assert (code, "did you mean 'mark'?" in err) == (2, True)


def test_why_tells_of_a_parent_that_changed(cli: Cli, recipe: Path) -> None:
    chain = ["--set", "passes.write.after=mark"]
    cli("run", recipe, "--no-measure", *chain)
    out = cli("why", recipe, "write", *chain, "--set", "passes.mark.value=4", "--json")[1]
    changes = json.loads(out)["changes"]
    assert [c["what"] for c in changes] == ["its parent mark"]


def test_passes_are_listed_and_shown(cli: Cli) -> None:
    listed = {p["name"]: p for p in json.loads(cli("passes", "--json")[1])}
    assert listed["quantize_weights"]["accepts"] == ["onnx"]
    assert "Put a mark into the execution block." in cli("passes")[1]
    out = cli("passes", "show", "mark")[1]
    assert "integer >= 0 and <= 9" in out
    shown = json.loads(cli("passes", "show", "quantize_weights", "--json")[1])
    defaults = {p["name"]: p["default"] for p in shown["parameters"]}
    assert (defaults["bits"], defaults["exclude"]) == ("4", "[]")


def test_profiles_are_listed_and_shown(cli: Cli) -> None:
    names = [p["name"] for p in json.loads(cli("hardware", "--json")[1])]
    assert "i7-1165g7" in names
    assert names[-1] == "local"
    assert "Intel ARK" in cli("hardware", "show", "i7-1165g7")[1]


def test_the_gpu_of_this_machine_is_shown_with_its_profile(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (
        Gpu(name="NVIDIA H200", memory_bytes=150_754_820_096, driver="580.1"),
        Gpu(name="NVIDIA GB10", memory_bytes=None, driver=None),
    )
    host = describe_host().model_copy(update={"gpus": gpus})
    monkeypatch.setattr("pipeline.hardware.describe_host", lambda: host)
    out = cli("hardware")[1]
    assert "this machine has a NVIDIA H200, 140 GiB, driver 580.1: `hardware: h200` runs on it" in out
    assert "this machine has a NVIDIA GB10: a profile of your own with `device: cuda` runs on it" in out


def test_schemas_are_printed(cli: Cli) -> None:
    for arguments in (["schema"], ["schema", "--report"]):
        jsonschema.Draft202012Validator.check_schema(json.loads(cli(*arguments)[1]))


def test_ctrl_c_ends_with_130_and_says_what_is_kept(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.run.run", interrupt)
    code, _, err = cli("run", recipe)
    assert code == 130
    assert "interrupted; finished stages stay in the store" in err
    assert "Traceback" not in err


def test_a_store_that_cannot_be_written_ends_with_4(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "file"))
    code, _, err = cli("run", recipe, "--no-measure")
    assert code == 4
    assert str(tmp_path / "file") in err
    assert "Traceback" not in err


def test_the_runs_folder_of_a_user_survives_an_interrupted_run(
    cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.run.execute", interrupt)
    Path("mine").mkdir()
    assert cli("run", recipe, "--no-measure", "--runs", "mine")[0] == 130
    assert list(Path("mine").iterdir()) == []
    assert cli("run", recipe, "--no-measure", "--runs", "new")[0] == 130
    assert not Path("new").exists()


def test_a_full_disk_ends_with_4(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.run.execute", full)
    code, _, err = cli("run", recipe, "--no-measure")
    assert code == 4
    assert "error: No space left on device" in err
    assert "PIPELINE_STORE" in err


def test_a_full_disk_at_the_export_keeps_the_report(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.run.materialize", full)
    code, out, _ = cli("run", recipe, "--no-measure")
    assert code == 4
    assert "no model was exported" in out
    assert json.loads(Path("runs/r/latest/report.json").read_text())["export"] is None


def test_our_own_mistakes_show_a_traceback_and_end_with_3(
    cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.execute", lambda *a, **k: 1 / 0)
    code, _, err = cli("run", recipe, "--no-measure")
    assert code == 3
    assert "ZeroDivisionError" in err


def test_an_artifact_that_cannot_be_read_fails_its_stage_and_no_other(cli: Cli, recipe: Path) -> None:
    code, out, _ = cli("run", recipe, "--no-measure", "--set", "passes.mark={pass: bad_onnx}", "--json")
    assert code == 3
    stages = {s["name"]: s for s in json.loads(out)["stages"]}
    assert stages["bad_onnx"]["status"] == "failed"
    assert "its artifact cannot be read" in stages["bad_onnx"]["reason"]
    assert stages["write"]["effect"]["kind"] == "graph" or stages["write"]["status"] == "ran"


def test_relative_paths_are_absolute_in_the_recipe_of_a_run(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "hardware_profiles" / "i7-1165g7.yaml"
    (tmp_path / "my.yaml").write_text(shipped.read_text())
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "f").write_text("read me")
    sets = ["hardware=my.yaml", "evaluate.quality.text=text.txt", "passes.write={pass: reads, file: f}"]
    assert cli("run", recipe, "--no-measure", *[a for s in sets for a in ("--set", s)])[0] == 0
    code, out, _ = cli("plan", "runs/r/latest/recipe.yaml", "--json")
    assert code == 0
    assert {s["status"] for s in json.loads(out)["stages"]} == {"cached"}


def test_an_option_that_takes_one_value_is_given_once(cli: Cli, recipe: Path) -> None:
    done = cli("plan", str(recipe), "--only", "mark", "--only", "write")
    assert done.code == 2
    assert "--only was given 2 times; it takes one value" in done.err
    assert cli("plan", str(recipe), "--set", "evaluate.budget_s=1", "--set", "evaluate.budget_s=2").code == 0
    assert cli("plan", str(recipe), "--json", "--json").code == 0
