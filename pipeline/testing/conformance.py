"""The checks: a pass is run on a small real model as a run does it, and held against what every pass promises."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, Manifest, canonical_json
from pipeline.errors import PipelineError, RecipeError
from pipeline.execute import StageResult, Watch
from pipeline.file_pass import find_code
from pipeline.files import sha256_of
from pipeline.measure.effect import ComparisonError, Origin, compare_artifacts, with_rules
from pipeline.measure.process import StartWorker
from pipeline.plan import Plan, PlannedStage, facet_value
from pipeline.plugin import Example, ParametersError, Pass, Registry
from pipeline.runtime.protocol import known_formats
from pipeline.store import Store
from pipeline.testing import watch
from pipeline.testing.agreement import ROUNDING, Agreement, score
from pipeline.testing.findings import CHECKS, Finding, Findings, Outcome
from pipeline.testing.known_formats import made_formats, taken_formats
from pipeline.testing.models import odd_artifact
from pipeline.testing.variations import variations
from pipeline.testing.workspace import CHECKED, Workspace, carry_over, entries_of

TIMEOUT_S = 300.0
WAYS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "torch": (),
    "onnx": ({"pass": "export_onnx", "verify": False},),
}
"""Entries that bring the small model into a format."""

NEEDED = frozenset({"declarations", "parameters", "run"})
"""Checks that cannot be left out, for the others build on them."""

MOST_TOLD = 5
"""Of what was found alike, so many are named."""

HASH_SEED = "PYTHONHASHSEED"
SEED, OTHER_SEED = 1, 2
"""Of Python's hashes, which order what a set holds, in the first run and in the second."""

LONGEST = 300
"""Characters of what others said."""

BULK = 20
"""So many environment variables are read by who reads them all."""

OUTSIDE = re.compile(r"(?:wrote|write) (?P<path>.+?),? outside its context")
"""How the engine says that it stopped a pass which wrote where it may not."""


def examples_of(found: type[Pass]) -> tuple[Example, ...]:
    """How the pass is to be tried: as it says, else once with the defaults."""
    return found.examples or (Example(),)


def check_pass(
    given: str | type[Pass],
    params: Mapping[str, Any] | None = None,
    *,
    after: Sequence[str | Mapping[str, Any]] | None = None,
    inputs: Mapping[str, str] | None = None,
    tolerance: float | None = None,
    example: Example | None = None,
    skip: Collection[str] = (),
    timeout_s: float = TIMEOUT_S,
    workspace: Path | None = None,
    start_worker: StartWorker | None = None,
) -> Findings:
    """Try a pass on a small Llama, in worker processes and stores of its own, and say what was found.

    `given` is the name of an installed pass, or its class, or `./FILE.py:CLASS` below this process's folder. What is
    not given of `params`, `after`, `inputs` and `tolerance` is taken from `example`, by default the pass's first; see
    `Example`. `skip` names checks to leave out.
    `timeout_s` is how long a run of the pass may take. `workspace` is a folder that checks may share, in which what
    comes before passes is made once. `start_worker` starts the processes that score models; default: as a run does.

    Raises: RecipeError where there is no such pass or check, or the parameters or entries are not right.
    """
    if unknown := set(skip) - CHECKS.keys():
        raise RecipeError(f"unknown checks {_listed(sorted(unknown))}", hint=f"checks: {', '.join(CHECKS)}")
    registry = Registry(code="run")
    name = given if isinstance(given, str) else given.name
    code = find_code(name, Path.cwd())
    origin = registry.info(name).origin if code is None else code.path
    began = time.monotonic()
    try:
        found = registry.load(name, code)
    except PipelineError as error:
        return _nothing_but(name, origin, "declarations", str(error))
    if not isinstance(given, str) and found is not given:
        raise RecipeError(
            f"the installed pass {name!r} is {found.__module__}.{found.__qualname__}, and not the class that was given",
            hint="workers find passes by their entry points: install the class's package, as by `pip install -e .`",
        )
    base = example or examples_of(found)[0]
    update = {
        "params": None if params is None else dict(params),
        "after": None if after is None else tuple(e if isinstance(e, str) else dict(e) for e in after),
        "inputs": None if inputs is None else dict(inputs),
        "tolerance": tolerance,
    }
    chosen = base.model_copy(update={key: value for key, value in update.items() if value is not None})
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        trial = _Trial(
            found,
            chosen,
            pass_name=name,
            workspace=Workspace(workspace or Path(folder) / "shared"),
            folder=Path(folder),
            skip=skip,
            timeout_s=timeout_s,
            start_worker=start_worker,
        )
        findings = trial.findings()
    return Findings(
        pass_name=name,
        origin=origin,
        example=in_words(chosen),
        findings=findings,
        host_lacks=trial.host_lacks,
        seconds=round(time.monotonic() - began, 2),
    )


def in_words(example: Example) -> str:
    """Parameters, and what comes before, in a line."""
    told = [f"{name}={json.dumps(value)}" for name, value in example.params.items()]
    if example.after is not None:
        names = [entry.get("name") or entry["pass"] for entry in entries_of(example.after)]
        told += [f"after {', '.join(names)}"] if names else []
    return ", ".join(told)


def _nothing_but(name: str, origin: str, check: str, message: str) -> Findings:
    """A failed check, and the others skipped for it."""
    findings = [
        Finding(check=c, outcome="failed", message=message)
        if c == check
        else Finding(check=c, outcome="skipped", message=f"see {check}")
        for c in CHECKS
    ]
    return Findings(pass_name=name, origin=origin, findings=tuple(findings))


class _Trial:
    """One pass with one set of parameters, and what is known of it so far."""

    def __init__(
        self,
        found: type[Pass],
        example: Example,
        *,
        pass_name: str,
        workspace: Workspace,
        folder: Path,
        skip: Collection[str],
        timeout_s: float,
        start_worker: StartWorker | None,
    ) -> None:
        self.found = found
        self.example = example
        self.pass_name = pass_name
        self.workspace = workspace
        self.folder = folder
        self.timeout_s = timeout_s
        self.start_worker = start_worker
        self.host_lacks = ""
        self._plan_error: Exception | None = None
        self._found: dict[str, Finding] = {}
        self._left_out = [c for c in skip if c not in NEEDED]
        for check in self._left_out:
            self._note(check, "skipped", "as asked")

    def findings(self) -> tuple[Finding, ...]:
        """Raises: RecipeError where parameters or entries are not right."""
        checks: dict[str, Callable[[], Finding]] = {
            "declarations": self._declarations,
            "parameters": self._parameters,
            "key": self._key,
            "formats": self._formats,
        }
        for name, check in checks.items():
            if name in self._left_out:
                continue
            self._found[name] = check()
            if name in ("declarations", "parameters") and self._found[name].outcome == "failed":
                return self._with_the_rest_skipped(f"see {name}")
        self.host_lacks = "; ".join(self.plan.problems)
        if self.host_lacks:
            return self._with_the_rest_skipped(f"it cannot run here: {self.host_lacks}")
        before = self.workspace.make_what_comes_before(self.plan, Watch(environment={HASH_SEED: str(OTHER_SEED)}))
        broken = next((result for result in before.values() if result.status in ("failed", "skipped")), None)
        if broken is not None:
            self._note("run", "failed", f"{broken.name}, which comes before it, {broken.status}: {broken.reason}")
            return self._with_the_rest_skipped("it did not run")
        self._run()
        if self._found["run"].outcome == "passed" and "odd_model" not in self._left_out:
            self._odd_model()
        return self._with_the_rest_skipped("it did not run")

    def _with_the_rest_skipped(self, why: str) -> tuple[Finding, ...]:
        skipped = {c: Finding(check=c, outcome="skipped", message=why) for c in CHECKS if c not in self._found}
        known = {**self._found, **skipped}
        return tuple(known[c] for c in CHECKS)

    def _note(self, check: str, outcome: Outcome, message: str = "") -> None:
        if check in self._left_out and check in self._found:
            return
        self._found[check] = Finding(check=check, outcome=outcome, message=message)

    # What needs no run

    def entries(
        self, params: Mapping[str, Any] | None = None, before: Sequence[Mapping[str, Any]] | None = None
    ) -> list:
        """The recipe's entries, the pass itself the last."""
        own = {
            **(self.example.params if params is None else params),
            "pass": self.pass_name,
            "name": CHECKED,
            "timeout_s": self.timeout_s,
        }
        if self.example.inputs:
            own["inputs"] = dict(self.example.inputs)
        return [*(self._before if before is None else before), own]

    @cached_property
    def _before(self) -> list[dict[str, Any]]:
        if self.example.after is not None:
            return entries_of(self.example.after)
        accepts, _ = self.found.formats(self._validated)
        way = next((WAYS[name] for name in WAYS if name in accepts), None)
        if way is None:
            raise RecipeError(
                f"the kit has no small model in {' or '.join(sorted(accepts))}",
                hint="say in `examples` (or --after) which passes bring a torch model into that format",
            )
        return entries_of(way)

    @cached_property
    def _validated(self) -> Any:
        """The parameters as the pass gets them.

        Raises: RecipeError where they are not right.
        """
        from pipeline.recipe.positions import Positions
        from pipeline.recipe.validation import validate

        return validate(self.found.Params, self.example.params, Positions("the parameters"))

    @cached_property
    def plan(self) -> Plan:
        return self.workspace.plan(self.entries())

    @property
    def stage(self) -> PlannedStage:
        return self.plan.stages[-1]

    def _declarations(self) -> Finding:
        found, faults, doubts = self.found, [], []
        try:
            accepts, produces = found.formats(self._validated)
            facets = found.facets(self._validated)
            found.requirements(self._validated)
        except RecipeError:
            raise
        except Exception as error:
            return _failed("declarations", f"formats, facets or requirements cannot be asked for: {_sentence(error)}")
        if unknown := sorted(accepts - made_formats(but=found.name)):
            faults.append(
                f"it accepts {_listed(unknown)}, which no installed pass yields and no model comes in "
                f"(known: {_listed(sorted(made_formats(but=found.name)))})"
            )
        if not accepts:
            faults.append("it accepts no format")
        if produces not in taken_formats(but=found.name):
            faults.append(
                f"it produces {produces!r}, which no installed runner loads and no other pass takes "
                f"(known: {_listed(sorted(taken_formats(but=found.name)))})"
            )
        for name in facets:
            try:
                facet_value(name, self.workspace.recipe([]), self.workspace.profile, self.workspace.host)
            except PipelineError as error:
                faults.append(str(error).replace("\n ", ";"))
        if not isinstance(found.version, int) or isinstance(found.version, bool):
            faults.append(f"its version is {found.version!r}; it has to be an integer, raised when results change")
        if not found.summary():
            doubts.append("it has no docstring, whose first line `pipeline passes` shows")
        if faults:
            return _failed("declarations", "; ".join(faults))
        try:
            plan = self.plan
        except RecipeError:
            raise
        except (TypeError, ValueError, ParametersError) as error:  # parameters without JSON; the next check says so
            self._plan_error = error
        except Exception as error:
            return _failed("declarations", f"the plan cannot be made: {_sentence(error)}")
        else:
            doubts += [note.partition(": ")[2] for note in plan.notes if "cannot foresee its memory" in note]
            missing = [name for name, v in self.stage.ingredients["libraries"].items() if v == "not installed"]
            if missing:
                doubts.append(f"libraries: {_listed(missing)} is not installed, so that no version enters the key")
        if doubts:
            return Finding(check="declarations", outcome="warning", message="; ".join(doubts))
        return _passed("declarations", f"takes {_listed(sorted(accepts))}, yields {produces}")

    def _parameters(self) -> Finding:
        given = self._validated
        hint = (
            "give the field a type that JSON has (bool, int, float, str, Literal, list, dict, Path, a model of these)"
        )
        try:
            data = given.model_dump(mode="json")
            canonical_json(data)
        except Exception as error:  # pydantic's own error, TypeError, or what a serializer raises
            return _failed("parameters", f"they cannot be put into JSON: {_sentence(error)}; {hint}")
        try:
            again = self.found.Params.model_validate_json(json.dumps(data))
        except ValueError as error:
            return _failed("parameters", f"what they are in JSON is not accepted again: {_sentence(error)}; {hint}")
        if again != given:
            names = [n for n in type(given).model_fields if getattr(again, n, None) != getattr(given, n, None)]
            return _failed("parameters", f"{_listed(names)} come out of JSON as something else; {hint}")
        if self._plan_error is not None:
            return _failed("parameters", f"the plan cannot hold them: {_sentence(self._plan_error)}; {hint}")
        return _passed("parameters")

    def _key(self) -> Finding:
        faults = []
        if self.workspace.plan(self.entries(), self.workspace.model(other=True)).stages[-1].key == self.stage.key:
            faults.append("another model gives the same key")
        found = variations(self.found.Params, self.example.params, self.folder, self.example.others)
        keys: dict[str, str] = {}

        def key(params: Mapping[str, Any]) -> str:
            text = json.dumps(params, sort_keys=True)
            if text not in keys:
                try:
                    keys[text] = self.workspace.plan(self.entries(params)).stages[-1].own
                except ParametersError:  # its JSON lacks a field, so that the key would
                    keys[text] = self.stage.own
            return keys[text]

        untried = [name for name, variation in found.items() if variation is None]
        for name, variation in found.items():
            if variation is not None and key(variation.before) == key(variation.after):
                faults.append(
                    f"the parameter {name!r} does not enter it: {json.dumps(variation.before.get(name))} and "
                    f"{json.dumps(variation.after[name])} give the same key (is the field left out of its JSON?)"
                )
        if faults:
            return _failed("key", "; ".join(faults))
        tried = len(found) - len(untried)
        told = f"{tried} of {len(found)} parameters changed it" if found else "it has no parameters"
        if untried:
            told += f"; no other valid value was found for {_listed(untried)}: name one in `others` of an example"
            return Finding(check="key", outcome="warning", message=told)
        return _passed("key", told)

    def _formats(self) -> Finding:
        accepts, _ = self.found.formats(self._validated)
        tried = []
        for name, way in WAYS.items():
            if name in accepts:
                continue
            before = [*entries_of(way)]
            parent = before[-1]["pass"] if before else "source"
            entries = self.entries(before=before)
            if self.example.inputs:
                entries[-1]["inputs"] = dict.fromkeys(self.example.inputs, parent)
            try:
                self.workspace.plan(entries)
            except RecipeError:
                tried.append(name)
            except Exception as error:
                return _failed("formats", f"the plan over a model in {name} ends with {_sentence(error)}")
            else:
                return _failed("formats", f"the plan lets it run on a model in {name}, which it does not accept")
        return _passed("formats", f"refuses {_listed(tried)}" if tried else "it takes all formats that are known here")

    # What needs runs

    def _run(self) -> None:
        store = self.workspace.new_store(self.folder)
        self.workspace.provide(self.plan, store)
        inputs = self._inputs(store)
        given = {str(a.locate(entry)) for a in inputs.values() for _, entry in a.manifest.entries()}
        before = {path: _state(Path(path)) for path in given}
        result = self._try(store, seed=SEED, observer=watch.OBSERVER)
        changed = {path: how for path in sorted(given) if (how := _change(before[path], _state(Path(path))))}
        self.workspace.model()  # put back, where the pass changed a file of it
        if result.host_lacks:
            self.host_lacks = str(result.reason)
            self._note("run", "skipped", self.host_lacks)
            return
        self._reads(result)
        self._writes_and_input(result, given, changed)
        if result.artifact is None:
            self._note("run", "failed", self._why_it_failed(result))
            return
        self._note("run", "passed", f"in {result.cost.wall_s or 0:.1f} s")
        made = store.artifact(result.artifact)
        parent = store.artifact(inputs[""].digest)
        if made is None or parent is None:  # the pass changed what it read
            return
        later: dict[str, Callable[[], None]] = {
            "determinism": lambda: self._determinism(made),
            "effect": lambda: self._effect(made, {**inputs, "": parent}, result),
            "tolerance": lambda: self._tolerance(parent, made),
        }
        for name, check in later.items():
            if name not in self._left_out:
                check()

    def _try(self, store: Store, *, seed: int, observer: str | None = None) -> StageResult:
        """Run the pass."""
        environment = {HASH_SEED: str(seed)}
        watched = Watch(stages=frozenset({CHECKED}), observer=observer, environment=environment)
        return self.workspace.try_pass(self.plan, store, watched)

    def _inputs(self, store: Store) -> dict[str, Artifact]:
        """What the pass reads, by role; what it comes after has the empty one."""
        roles = {"": str(self.stage.parent), **self.stage.inputs}
        found = {}
        for role, name in roles.items():
            record = store.stage_record(self.plan.stage(name).key)
            artifact = store.artifact(record.artifact) if record else None
            assert artifact is not None, f"{name} was made and is not there"
            found[role] = artifact
        return found

    def _why_it_failed(self, result: StageResult) -> str:
        reason = str(result.reason)
        if OUTSIDE.search(reason):
            return f"it was stopped; see writes and input: {reason}"
        if "took longer than timeout_s" in reason:
            return f"it did not end: {reason}"
        if result.refused:
            what = "where it needs another one, give `examples` (or --set, --after) with which it can run"
            return f"it failed on the small model: {reason}; {what}"
        return reason

    def _reads(self, result: StageResult) -> None:
        seen: Mapping[str, Mapping[str, str]] = result.observed
        faults, doubts = [], []
        if facets := seen.get(watch.FACETS):
            faults.append(f"context facets {_places(facets)}: name them in depends_on")
        if variables := seen.get(watch.ENVIRONMENT):
            names = (
                "all environment variables" if len(variables) > BULK else f"environment variables {_places(variables)}"
            )
            faults.append(f"{names}: make each a parameter, or give a program that it starts an `env` of its own")
        if files := seen.get(watch.FILES):
            faults.append(
                f"files {_places(files)}: let a parameter of type Path name them, whose contents enter the key"
            )
        if files := seen.get(watch.LIBRARIES):
            doubts.append(f"files {_places(files)}: if they decide the result, let a parameter name them")
        if faults:
            self._note("reads", "failed", "it read, and its key does not hold, " + "; ".join(faults))
        elif doubts:
            self._note("reads", "warning", "libraries read for it " + "; ".join(doubts))
        elif not seen:
            self._note("reads", "skipped", "it did not run to its end")
        else:
            self._note("reads", "passed")

    def _writes_and_input(self, result: StageResult, given: set[str], changed: Mapping[str, str]) -> None:
        wrote = dict(result.observed.get(watch.WRITES, {}))
        if stopped := OUTSIDE.search(str(result.reason)):
            wrote.setdefault(os.path.realpath(stopped["path"]), "stopped by the engine")
        real = {os.path.realpath(path) for path in given}
        changed = {**{path: where for path, where in wrote.items() if path in real}, **changed}
        elsewhere = {path: where for path, where in wrote.items() if path not in real}
        if elsewhere:
            hint = (
                "write through context.output; `with context.output.scratch() as folder` gives a folder for libraries"
            )
            self._note("writes", "failed", f"it wrote or changed {_places(elsewhere)}: {hint}")
        if changed:
            hint = "what it reads is shared with other stages, and may be a user's own file: write a new file"
            self._note("input", "failed", f"it changed its input: {_places(changed)}; {hint}")
        ended = bool(result.observed)
        for check, fault in (("writes", elsewhere), ("input", changed)):
            if not fault:
                self._note(check, "passed" if ended else "skipped", "" if ended else "it did not run to its end")

    def _determinism(self, made: Artifact) -> None:
        if not self.found.deterministic:
            self._note("determinism", "passed", "it says that two runs differ")
            return
        again = self._made_before_another_pass()
        if again is None:
            store = self.workspace.new_store(self.folder)
            self.workspace.provide(self.plan, store)
            result = self._try(store, seed=OTHER_SEED)
            self.workspace.model()
            again = store.artifact(result.artifact) if result.artifact else None
            if again is None:
                self._note("determinism", "failed", f"a second run failed: {_short(str(result.reason))}")
                return
        if again.digest == made.digest:
            self._keep_for_others(made)
            self._note("determinism", "passed")
            return
        self._note(
            "determinism",
            "failed",
            f"two runs gave different {_listed(different(made.manifest, again.manifest))}: draw from context.seed, "
            "sort what comes from sets, keep times and paths out; or say `deterministic = False`",
        )

    def _made_before_another_pass(self) -> Artifact | None:
        """What the same stage gave where it came before a pass that was checked in this workspace."""
        record = self.workspace.store.stage_record(self.stage.key)
        return self.workspace.store.artifact(record.artifact) if record else None

    def _keep_for_others(self, made: Artifact) -> None:
        """Let what a stage gave twice be what comes before other passes."""
        if self._made_before_another_pass() is None:
            carry_over(self.stage, Store(made.blobs.parent), self.workspace.store)

    def _effect(self, made: Artifact, inputs: Mapping[str, Artifact], result: StageResult) -> None:
        names = {"": str(self.stage.parent), **self.stage.inputs}
        origins = {role: Origin(names[role], artifact) for role, artifact in inputs.items()}
        several = len(made.manifest.components) > 1
        device = self.plan.hardware.device
        try:
            effect = compare_artifacts(inputs[""], made, device=device, origins=origins if several else None)
        except ComparisonError as error:
            self._note("effect", "warning", f"what it changed cannot be found out: {error}")
            return
        except Exception as error:  # a pass can yield anything
            self._note("effect", "failed", f"its artifact cannot be read: {_sentence(error)}")
            return
        contradiction = with_rules(effect, result.rules).contradiction
        if contradiction:
            self._note("effect", "failed", f"{contradiction}: count what was done, where it is done")
        elif effect.kind == "none":
            self._note("effect", "warning", "it changed nothing of the small model: give an example in which it does")
        else:
            rules = ", ".join(f"{rule} {done} of {of}" for rule, (done, of) in result.rules.items() if done)
            self._note("effect", "passed", f"{effect.kind} changed" + (f": {rules}" if rules else ""))

    def _tolerance(self, parent: Artifact, made: Artifact) -> None:
        tolerance = self.example.tolerance or ROUNDING
        formats = {parent.format, made.format} - known_formats()
        if formats:
            self._note("tolerance", "skipped", f"no installed runner loads {_listed(sorted(formats))}")
        elif made.digest == parent.digest:
            self._note("tolerance", "passed", "it is the same model")
        elif parent.interface.vocab_size is None or made.interface.task != "causal-lm":
            self._note("tolerance", "skipped", "it is no language model")
        else:
            self._found["tolerance"] = self._scored(parent, made, tolerance)

    def _scored(self, parent: Artifact, made: Artifact, tolerance: float) -> Finding:
        try:
            agreement = score(
                parent,
                made,
                device=self.plan.hardware.device,
                threads=self.plan.threads,
                logs=self.folder / "logs",
                start_worker=self.start_worker,
            )
        except PipelineError as error:
            return _failed("tolerance", f"its model cannot be scored: {error}")
        return judged(agreement, tolerance)

    def _odd_model(self) -> None:
        store = self.workspace.new_store(self.folder)
        taken = self.plan.stage(str(self.stage.parent)).produces
        odd = odd_artifact(taken, store)
        if odd is None:
            self._note("odd_model", "skipped", f"the kit has no other model in {taken}")
            return
        self.workspace.provide(self.plan, store, swapped=odd.digest)
        result = self._try(store, seed=SEED)
        self.workspace.model()
        if result.artifact is not None:
            made = store.artifact(result.artifact)
            fault = "it is not in the store" if made is None else _unreadable(made)
            if fault:
                self._note("odd_model", "failed", f"what it made of {ODD[taken]} cannot be read: {fault}")
            else:
                self._note("odd_model", "passed", f"it makes an artifact of {ODD[taken]}")
        elif result.refused:
            self._note("odd_model", "passed", f"it says: {_short(str(result.reason))}")
        else:
            self._note(
                "odd_model",
                "failed",
                f"on {ODD[taken]}: {_short(str(result.reason))}; raise a PipelineError that says what the pass needs",
            )


ODD = {
    "onnx": "a graph of one node, without weights and without a cache",
    "torch": "a checkpoint of one tensor, whose model_type nobody knows",
}
"""Models that no pass expects, in words."""


def judged(agreement: Agreement, tolerance: float) -> Finding:
    """What the figures say against the tolerance."""
    figures = agreement.figures
    if figures is None:
        return _failed("tolerance", agreement.failure or "its model was not scored")
    error = figures.max_abs_logit_error
    if error is None:
        return _failed("tolerance", "its model gives logits that are not finite")
    divergence = figures.kl_divergence
    told = f"a logit differs by {error:.2g} at most" + (f", KL divergence {divergence:.2g}" if divergence else "")
    if error > tolerance:
        return _failed(
            "tolerance",
            f"{told}; {tolerance:g} is allowed: if so much is meant, state it as the `tolerance` of an example",
        )
    if error <= ROUNDING and figures.first_divergence is not None:
        return _failed(
            "tolerance",
            f"whole passes agree, and text written token by token differs from token {figures.first_divergence} on: "
            "look at the key-value cache and the positions",
        )
    return _passed("tolerance", f"{told}; {tolerance:g} is allowed")


def different(one: Manifest, two: Manifest) -> list[str]:
    """Names of what differs between two manifests."""
    files = dict(one.entries()), dict(two.entries())
    names = [f"{n}" for n in files[0].keys() | files[1].keys() if _digest(files[0], n) != _digest(files[1], n)]
    fields = [
        name for name in ("format", "interface", "transforms", "execution") if getattr(one, name) != getattr(two, name)
    ]
    return [
        *fields,
        *sorted({name.split("/weights/")[0] + "/weights" if "/weights/" in name else name for name in names}),
    ]


def _digest(files: Mapping[str, Any], name: str) -> str | None:
    return files[name].digest if name in files else None


def _unreadable(artifact: Artifact) -> str:
    """Why its graphs cannot be read; empty where they can."""
    from pipeline.measure.effect import graphs_of

    try:
        graphs_of(artifact)
    except Exception as error:  # a pass can yield anything
        return _sentence(error)
    return ""


State = tuple[str, int, int, int]
"""SHA-256, size in bytes, time of modification in ns, mode."""


def _state(path: Path) -> State | None:
    """What a file is now, its bytes read; None where it is not there."""
    try:
        stat = path.stat()
        return sha256_of(path), stat.st_size, stat.st_mtime_ns, stat.st_mode
    except FileNotFoundError:
        return None


def _change(before: State | None, after: State | None) -> str:
    """How a file changed, in words; empty where it did not."""
    if before == after:
        return ""
    if before is None or after is None:
        return "removed"
    if before[0] != after[0]:
        return "other bytes"
    return "other permissions" if before[3] != after[3] else "written again"


def _sentence(error: BaseException) -> str:
    return _short(f"{type(error).__name__}: {error}")


def _short(text: str) -> str:
    """In one line, of LONGEST characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:MOST_TOLD])
    more = [f"{len(names) - MOST_TOLD} more"] if len(names) > MOST_TOLD else []
    return ", ".join([*shown, *more])


def _places(found: Mapping[str, str]) -> str:
    """What, and where in the pass."""
    return _listed([f"{what} ({where})" for what, where in found.items()])


def _passed(check: str, message: str = "") -> Finding:
    return Finding(check=check, outcome="passed", message=message)


def _failed(check: str, message: str) -> Finding:
    return Finding(check=check, outcome="failed", message=message)
