"""`pipeline reproduce`: what differs here, and what comes out the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import reproduce
from pipeline.hardware.probe import probe_folder
from pipeline.report.schema import Report
from pipeline.reproduce import FigureOutcome, _artifacts, _figures
from pipeline.run import run
from pipeline.store import Store

pytestmark = pytest.mark.usefixtures("plugins", "store")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": 8}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    save_file({"a": np.arange(6, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def ran(cli: Cli, model: Path, tmp_path: Path) -> Path:
    """A finished run of three stages; its folder."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nname: r\nmodel: {{path: {model}}}\npasses:\n"
        "  - pass: mark\n    value: 3\n  - pass: write\n    after: source\n"
    )
    assert cli("run", recipe, "--no-measure")[0] == 0
    return Path("runs/r/latest").resolve()


def change(folder: Path, **changes: Any) -> None:
    """Edit report.json by dotted paths written with double underscores."""
    data = json.loads((folder / "report.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = data
        for key in parents:
            inner = inner[int(key) if key.isdigit() else key]
        inner[last] = value
    (folder / "report.json").write_text(json.dumps(data))


def outcomes(text: str) -> dict[str, str]:
    return {a["stage"]: a["outcome"] for a in json.loads(text)["artifacts"]}


def test_the_same_machine_makes_the_same_artifacts_anew(cli: Cli, ran: Path) -> None:
    code, out, _ = cli("reproduce", "r", "--no-measure", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["differences"] == []
    assert outcomes(out) == {"source": "same", "mark": "same", "write": "same"}
    assert all(a["made"] for a in found["artifacts"])
    assert Path(found["run"]).parent.resolve() == ran.parent
    assert Path(found["run"]).name != ran.name
    assert not list(Path("runs").glob(".reproduce*"))


def test_the_words_for_people_name_every_stage(cli: Cli, ran: Path) -> None:
    code, out, _ = cli("reproduce", ran, "--no-measure")
    assert code == 0
    assert "nothing differs on this machine" in out
    assert "3 of 3 artifacts are the same" in out


def test_from_the_store_nothing_is_proved_and_that_is_said(cli: Cli, ran: Path) -> None:
    code, out, _ = cli("reproduce", ran, "--no-measure", "--cached")
    assert code == 0
    assert "same, from the store" in out


def test_a_cached_stage_that_could_not_be_measured_was_not_made(ran: Path) -> None:
    report = Report.model_validate_json((ran / "report.json").read_text())
    stages = tuple(s.model_copy(update={"status": "unmeasured"}) for s in report.stages)
    found = {a.stage: a.made for a in _artifacts(report, report.model_copy(update={"stages": stages}), {}, {"write"})}
    assert found == {"source": False, "mark": False, "write": True}


def test_the_store_that_is_thrown_away_knows_what_the_host_was_measured_to_do(
    cli: Cli, ran: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_folder(store.root).mkdir(parents=True)
    (probe_folder(store.root) / "host.json").write_text("{}")
    seen = []

    def look(recipe: object, *, store: Store, **options: object) -> object:
        seen.append((store.root, [p.name for p in probe_folder(store.root).iterdir()]))
        return run(recipe, store=store, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(reproduce, "run", look)
    assert cli("reproduce", ran, "--no-measure")[0] == 0
    ((root, probed),) = seen
    assert probed == ["host.json"]
    assert root.parent == store.root / "tmp"  # where any process sweeps what a killed one left
    assert not root.exists()


def test_a_recipe_that_trusts_remote_code_is_announced(cli: Cli, ran: Path) -> None:
    recipe = ran / "recipe.yaml"
    assert "trust_remote_code: true" not in cli("reproduce", ran, "--plan")[1]
    recipe.write_text(recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    if "trust_remote_code: true" not in recipe.read_text():
        text = re.sub(r"(?m)^model:\n", "model:\n  trust_remote_code: true\n", recipe.read_text())
        recipe.write_text(text)
    out = cli("reproduce", ran, "--plan")[1]
    assert "trust_remote_code: true: doing it again runs Python files that" in out


def test_a_plan_tells_the_differences_and_runs_nothing(cli: Cli, ran: Path) -> None:
    change(ran, lock__packages__torch="1.0", host__cpu_model="Another CPU", threads=7)
    change(ran, lock__packages__olden="3", lock__digests__evaluation_text="0" * 64)
    code, out, _ = cli("reproduce", ran, "--plan", "--json")
    assert code == 0
    found = {d["what"]: (d["then"], d["now"]) for d in json.loads(out)["differences"]}
    assert found["package torch"][0] == "1.0"
    assert found["package olden"] == ("3", "not installed")
    assert found["processor"][0] == "Another CPU"
    assert found["threads"][0] == "7"
    assert found["evaluation text"][0] == "0" * 12
    assert len(found) == 5
    assert len([p for p in ran.parent.iterdir() if not p.is_symlink()]) == 1


def test_a_model_that_changed_since_is_named(cli: Cli, ran: Path, model: Path) -> None:
    save_file({"a": np.ones(6, dtype=np.float32)}, model / "model.safetensors")
    code, out, _ = cli("reproduce", ran, "--no-measure", "--json")
    found = json.loads(out)
    assert [d["what"] for d in found["differences"]] == ["source: files.model.safetensors"]
    assert outcomes(out) == {"source": "differs", "mark": "differs", "write": "differs"}
    assert code == 0  # something differs here, so the artifacts may


def test_an_artifact_that_differs_though_nothing_else_does_ends_with_1(cli: Cli, ran: Path) -> None:
    change(ran, stages__1__artifact__digest="0" * 64)
    code, out, _ = cli("reproduce", ran, "--no-measure", "--json")
    assert code == 1
    assert outcomes(out)["mark"] == "differs"


def test_a_pass_that_says_it_is_not_deterministic_may_differ(
    cli: Cli, ran: Path, tmp_path: Path, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
        import os
        from pipeline import Pass
        class Dice(Pass):
            "Roll."
            name, deterministic = "dice", False
            accepts, produces = frozenset({"torch"}), "torch"
            def run(self, artifact, params, context):
                execution = {**artifact.manifest.execution, "rolled": os.urandom(8).hex()}
                return type(artifact)(artifact.manifest.model_copy(update={"execution": execution}), artifact.blobs)
        """
    install(tmp_path, "dice_passes", source, {"dice": "dice_passes:Dice"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert cli("run", ran / "recipe.yaml", "--no-measure", "--set", "passes=[{pass: dice}]")[0] == 0
    code, out, _ = cli("reproduce", "r", "--no-measure")
    assert code == 0
    assert "differs (its pass is not deterministic)" in out


def test_a_part_of_a_recipe_is_done_again_as_that_part(cli: Cli, ran: Path) -> None:
    assert cli("run", ran / "recipe.yaml", "--no-measure", "--until", "mark")[0] == 0
    assert outcomes(cli("reproduce", "r", "--no-measure", "--json")[1]) == {"source": "same", "mark": "same"}
    assert cli("run", ran / "recipe.yaml", "--no-measure", "--only", "write")[0] == 0
    assert outcomes(cli("reproduce", "r", "--no-measure", "--json")[1]) == {"source": "same", "write": "same"}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / "recipe.yaml").unlink(), "has no recipe.yaml"),
        (lambda f: (f / "plan.json").write_text("{}"), "plan.json is damaged"),
        (lambda f: (f / "plan.json").write_text("[" * 100_000 + "]" * 100_000), "plan.json is damaged"),
        (lambda f: (f / "report.json").write_text("{}"), "is not a report that this version reads"),
        (lambda f: (f / "recipe.yaml").write_text("version: 1\nnme: r\n"), "unknown key 'nme'"),
    ],
)
def test_a_run_that_is_not_whole_ends_with_2(
    spoil: Callable[[Path], object], expected: str, cli: Cli, ran: Path
) -> None:
    spoil(ran)
    code, _, err = cli("reproduce", ran)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err


def test_without_its_plan_a_run_is_compared_as_far_as_can_be(cli: Cli, ran: Path) -> None:
    (ran / "plan.json").unlink()
    code, out, _ = cli("reproduce", ran, "--plan")
    assert code == 0
    assert "plan.json is missing: passes, parameters and model files were not compared" in out


def test_a_run_that_is_not_there_ends_with_2(cli: Cli) -> None:
    code, _, err = cli("reproduce", "nothing")
    assert (code, "there is no run nothing" in err) == (2, True)


def quality(perplexity: float | None, ratio: float, low: float, high: float) -> dict[str, Any]:
    paired = {"perplexity_ratio": {"ratio": ratio, "low": low, "high": high}, "kl_divergence": 0.1}
    paired |= {"top1_agreement": 0.9, "max_abs_logit_error": 1.0, "first_divergence": None, "verdict": "equivalent"}
    return {"perplexity": perplexity, "tokens": 9, "sample_text": f"{perplexity}", "vs_baseline": paired}


def with_figures(folder: Path, size: int, scored: dict[str, Any], rate: float) -> Report:
    data = json.loads((folder / "report.json").read_text())
    interval = {"median": rate, "low": rate - 1, "high": rate + 1}
    point = {"kind": "decode", "batch": 1, "prompt": 8, "rounds": 3, "launches": 1}
    data["stages"][1] |= {"quality": scored, "speed": [{**point, "tokens_per_s": interval, "latency_s": interval}]}
    data["stages"][1]["artifact"]["size_bytes"] = size
    return Report.model_validate(data)


def told(then: Report, now: Report) -> dict[str, FigureOutcome]:
    return {f.figure: f for f in _figures(then, now) if f.stage == "mark"}


def test_figures_are_compared_exactly_and_by_their_interval(ran: Path) -> None:
    then = with_figures(ran, 1000, quality(40.0, 1.01, 1.0, 1.02), 100.0)
    same = told(then, then)
    assert same["size"].says == "the same"
    assert same["perplexity"].says == "exactly the same"
    assert "sample text" not in same
    near = told(then, with_figures(ran, 1003, quality(40.1, 1.015, 1.0, 1.02), 110.0))
    assert near["size"].says == "differs by +3 bytes"
    assert near["perplexity"].says == "its ratio to the baseline lies within the old interval"
    assert near["sample text"].says == "differs"
    far = told(then, with_figures(ran, 1000, quality(44.0, 1.1, 1.09, 1.12), 110.0))
    assert far["perplexity"].says == "its ratio to the baseline lies outside the old interval"


def test_speeds_of_two_runs_are_called_unpaired(ran: Path) -> None:
    then = with_figures(ran, 1, quality(40.0, 1.0, 1.0, 1.0), 100.0)
    now = with_figures(ran, 1, quality(40.0, 1.0, 1.0, 1.0), 110.0)
    found = told(then, now)["decode, batch 1, prompt 8"]
    assert (found.then, found.now) == ("100.0 tok/s (99.0–101.0)", "110.0 tok/s (109.0–111.0)")
    assert found.says == "1.10 ×, unpaired"
