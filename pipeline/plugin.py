"""What a pass is, what it is given, and how it is found.

A pass is a class in any installed package, named in the entry-point group `pipeline.passes`. The engine knows passes
only through this module; the built-in ones are registered in the same way.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from pipeline.artifact import Artifact, Frozen, canonical_json
from pipeline.errors import PipelineError, RecipeError, did_you_mean
from pipeline.file_pass import CodeFile, import_class, names_file, read_class
from pipeline.memory_estimate import ModelSize, Prediction
from pipeline.runtime.protocol import known_formats
from pipeline.store.writer import OutputWriter

PASSES = "pipeline.passes"
RESERVED = frozenset({"pass", "name", "after", "inputs", "allow_broken", "measure", "timeout_s", "group"})
"""Keys of a recipe's entry that are not parameters."""


class PassParams(BaseModel):
    """Parameters of a pass: immutable, strictly typed, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Requires(Frozen):
    """What the host must have; checked when the plan is made."""

    device: Literal["any", "cpu", "cuda"] = "any"
    providers: tuple[str, ...] = Field((), description="ONNX Runtime execution providers")
    instruction_sets: tuple[str, ...] = ()
    programs: tuple[str, ...] = Field((), description="on the PATH; alternatives parted by |, e.g. g++|clang++")
    packages: tuple[str, ...] = Field((), description="of Python, as pip takes them, e.g. optimum>=2")


class StageRef(NamedTuple):
    """A stage that a pass is to read, before anything runs: its name, and the format of what it yields."""

    name: str
    format: str


class Example(Frozen):
    """A way to try a pass on a small model: what `pipeline passes check` does without being told more."""

    params: dict[str, Any] = Field(default_factory=dict, description="parameters, as in a recipe")
    after: tuple[str | dict[str, Any], ...] | None = Field(
        None,
        description="entries of a recipe that come before it, each a pass's name or a mapping; None: what brings the "
        "small model, a Llama for torch, into the format that the pass takes",
    )
    inputs: dict[str, str] = Field(default_factory=dict, description="further stages that the pass reads, by role")
    others: dict[str, Any] = Field(
        default_factory=dict,
        description="another valid value of each parameter for which none can be guessed from its type",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="largest difference of a logit from the model before, whose logits vary by about 1; None: what "
        "rounding makes of the same computation",
    )


class Pass(ABC):
    """Turns an artifact into a new one. The first line of a subclass's docstring is what `pipeline passes` shows."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    accepts: ClassVar[frozenset[str] | set[str]]
    produces: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()
    depends_on: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[Requires] = Requires()
    deterministic: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ()
    """Roles of the further stages that an entry's `inputs` has to name; a pass that says none takes any."""
    comes_before: ClassVar[Mapping[str, str]] = {}
    """Names of passes that no stage may have gone through when it comes to this one, each with the reason."""
    comes_after: ClassVar[Mapping[str, str]] = {}
    """Names of passes that no stage may go through once it went through this one, each with the reason."""
    examples: ClassVar[tuple[Example, ...]] = ()
    """How the conformance kit tries the pass; none: once, with the parameters' defaults."""

    class Params(PassParams):
        """No parameters."""

    @abstractmethod
    def run(self, artifact: Artifact, params: Any, context: PassContext) -> Artifact:
        """Make the new artifact.

        Raises: PipelineError with a message for the user where it cannot.
        """

    @classmethod
    def formats(cls, params: PassParams) -> tuple[frozenset[str], str]:
        """(formats accepted, format produced) with these parameters, which may define either as a method."""
        accepts = getattr(params, "accepts", None)
        produces = getattr(params, "produces", None)
        return (
            frozenset(accepts() if callable(accepts) else cls.accepts),
            produces() if callable(produces) else cls.produces,
        )

    @classmethod
    def requirements(cls, params: PassParams) -> Requires:
        """What the host must have with these parameters, which may define `requires` as a method."""
        asked = getattr(params, "requires", None)
        return asked() if callable(asked) else cls.requires

    @classmethod
    def facets(cls, params: PassParams) -> tuple[str, ...]:
        """Context facets that enter the key with these parameters, which may define `facets` as a method."""
        asked = getattr(params, "facets", None)
        return tuple(asked()) if callable(asked) else cls.depends_on

    @classmethod
    def check_stages(cls, parent: StageRef, inputs: Mapping[str, StageRef]) -> None:
        """Say whether the pass can read the stage that it comes after and, by role, those that its entry's `inputs`
        name. That the parent's format is accepted is checked apart.

        Default: a pass that says its `roles` is given all of these and no others.

        Raises: RecipeError where it cannot.
        """
        check_roles(cls.roles, inputs)

    @classmethod
    def predict(cls, params: Any, model: ModelSize) -> Prediction:
        """What becomes of a model of this size, and the memory that making it takes. Nothing heavy is imported here.

        Default: the model keeps its size, in the format that the pass produces, and the memory is not known.
        """
        return Prediction(model=model.model_copy(update={"format": cls.formats(params)[1]}))

    @classmethod
    def predict_from(cls, params: Any, model: ModelSize, inputs: Mapping[str, ModelSize]) -> Prediction:
        """What `predict` says, for a pass that also reads models of these sizes, by role. Default: it ignores them."""
        return cls.predict(params, model)

    @classmethod
    def summary(cls) -> str:
        return (cls.__doc__ or "").strip().partition("\n")[0]


def check_roles(roles: Iterable[str], inputs: Mapping[str, object]) -> None:
    """Raises: RecipeError where `inputs` lacks one of the roles, or has another, and there are roles at all."""
    wanted = tuple(roles)
    missing = [role for role in wanted if role not in inputs]
    unknown = [role for role in inputs if role not in wanted] if wanted else []
    if missing or unknown:
        what = [f"lacks {' and '.join(missing)}"] if missing else []
        what += [f"has {' and '.join(unknown)}, which it does not read"] if unknown else []
        example = ", ".join(f"{role}: STAGE" for role in wanted)
        raise RecipeError(f"its `inputs` {' and '.join(what)}", hint=f"write `inputs: {{{example}}}`")


@dataclass(frozen=True)
class PassContext:
    """What a pass may use besides its artifact. It writes through `output` and nowhere else."""

    output: OutputWriter
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    facets: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    report_progress: Callable[[float, str], None] = lambda fraction, message: None
    rules: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What `count_rule` was told: rule -> (done, of)."""
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger("pipeline.pass"))

    def facet(self, name: str) -> Any:
        """The value of a context facet, such as `seed` or `profile.memory_bytes`.

        Raises: PipelineError where the pass does not declare it in `depends_on`: it would not be part of the key.
        """
        if name not in self.facets:
            declared = ", ".join(sorted(self.facets)) or "none"
            raise PipelineError(
                f"the pass read the context facet {name!r}, which it does not declare",
                hint=f"add it to depends_on (declared: {declared}), so that it enters the stage key",
            )
        return self.facets[name]

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return int(self.facet("seed"))

    @property
    def calibration_text(self) -> str:
        """Text to calibrate with; never the text that quality is measured on."""
        return str(self.facet("calibration_text"))

    def progress(self, fraction: float, message: str = "") -> None:
        """Say how far the pass is, from 0 to 1."""
        self.report_progress(fraction, message)

    def count_rule(self, name: str, done: int, of: int) -> None:
        """Tell how often a rule of the pass did something, out of how many candidates.

        Told again for the same rule, `done` adds up and `of` stays the largest. The report shows it beside what was
        found by comparing the artifacts, and says so where the two contradict each other.

        Raises: PipelineError where `done` is not between 0 and `of`.
        """
        if not 0 <= done <= of:
            raise PipelineError(f"the rule {name!r} was counted as done {done} times out of {of}")
        earlier_done, earlier_of = self.rules.get(name, (0, 0))
        self.rules[name] = (int(earlier_done + done), int(max(earlier_of, of, earlier_done + done)))


@dataclass(frozen=True)
class PassInfo:
    """A registered pass, not yet imported."""

    name: str
    entry_point: EntryPoint

    @property
    def origin(self) -> str:
        """Package and version that it comes from."""
        dist = self.entry_point.dist
        return f"{dist.name} {dist.version}" if dist else self.entry_point.module


class UnreadPass(Pass):
    """Stands for a pass in a file whose code is not run: known as far as its text tells."""

    class Params(PassParams):
        """Whatever the recipe gives; the pass itself checks it, once it may run."""

        model_config = ConfigDict(extra="allow")

    said: ClassVar[dict[str, Any]] = {}

    @classmethod
    def formats(cls, params: PassParams) -> tuple[frozenset[str], str]:
        formats = known_formats()
        accepts, produces = cls.said.get("accepts"), cls.said.get("produces")
        taken = frozenset(accepts) & formats if isinstance(accepts, set | tuple | list | frozenset) else frozenset()
        return taken or formats, str(produces) if produces in formats else next(iter(sorted(taken)), "onnx")

    def run(self, artifact: Artifact, params: Any, context: PassContext) -> Artifact:
        raise NotImplementedError


Code = Literal["refuse", "read", "run"]
"""What becomes of passes in files: an error, their text is read and nothing of it run, or they are imported."""


class Registry:
    """The passes that are installed, by name, and those in files. Only those asked for are imported."""

    def __init__(self, points: Iterable[EntryPoint] | None = None, *, code: Code = "refuse") -> None:
        self._points = points
        self._code = code

    @cached_property
    def _by_name(self) -> dict[str, list[PassInfo]]:
        found: dict[str, list[PassInfo]] = {}
        for point in entry_points(group=PASSES) if self._points is None else self._points:
            infos = found.setdefault(point.name, [])
            if all(point.value != info.entry_point.value for info in infos):  # a package may be found twice on the path
                infos.append(PassInfo(point.name, point))
        return found

    def names(self) -> list[str]:
        return sorted(self._by_name)

    def info(self, name: str) -> PassInfo:
        """Raises: RecipeError where no pass, or more than one, has that name."""
        infos = self._by_name.get(name, [])
        if not infos and names_file(name):
            raise RecipeError(
                f"{name!r} is a pass in a file, which has no place among the installed ones",
                hint="a recipe's `pass` names it, and `pipeline passes show` and `check`",
            )
        if not infos:
            raise RecipeError(f"unknown pass {name!r}", hint=did_you_mean(name, self.names(), noun="passes"))
        if len(infos) > 1:
            owners = " and ".join(f"{i.entry_point.value} ({i.origin})" for i in infos)
            raise RecipeError(f"two plugins are named {name!r}: {owners}", hint="uninstall one of them")
        return infos[0]

    def origin(self, name: str) -> str:
        """Where the pass comes from; more than one package where their passes have the same name.

        Raises: RecipeError where no pass has that name.
        """
        infos = self._by_name.get(name) or [self.info(name)]
        return " and ".join(dict.fromkeys(info.origin for info in infos))

    def load(self, name: str, code: CodeFile | None = None) -> type[Pass]:
        """Import the pass `name`, from the file `code` where it is in one.

        Raises: RecipeError where it is unknown, or is in a file and not allowed to run; PipelineError where it cannot
        be imported or is not a pass.
        """
        if code is not None:
            return self._load_file(code)
        info = self.info(name)
        try:
            found = info.entry_point.load()
        except Exception as error:  # a stranger's module may raise anything
            raise PipelineError(
                f"the pass {name!r} of {info.origin} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        checked = _checked(found, name, info.entry_point.value, info.origin)
        if checked.name != name:  # the name enters keys and finds the pass again in the worker
            raise PipelineError(
                f"{info.origin} registers {info.entry_point.value} as {name!r}; the pass calls itself {checked.name!r}",
                hint="the entry point's name and the pass's have to be the same",
            )
        return checked

    def _load_file(self, code: CodeFile) -> type[Pass]:
        if self._code == "refuse":
            raise RecipeError(
                f"the pass is code in {code.path}, which can do anything that you can",
                hint="read it; with --allow-code it runs",
            )
        if self._code == "read":
            said = read_class(code)
            known = {"said": said, "name": code.class_name, "__doc__": said.pop("__doc__")}
            return type(code.class_name, (UnreadPass,), known)
        return _checked(import_class(code), code.class_name, code.class_name, Path(code.path).name)


def _checked(found: object, name: str, what: str, origin: str) -> type[Pass]:
    """`found`, where it is a pass.

    Raises: PipelineError where it is none, or says of itself what cannot be.
    """
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PipelineError(f"{what} of {origin} is not a subclass of pipeline.Pass")
    if missing := [field for field in ("name", "accepts", "produces") if not hasattr(found, field)]:
        raise PipelineError(f"the pass {name!r} of {origin} does not say its {' and '.join(missing)}")
    if isinstance(found.accepts, str):
        raise PipelineError(
            f"the pass {name!r} of {origin} accepts a text, {found.accepts!r}, where a set of formats is expected",
            hint=f"write accepts = {{{found.accepts!r}}}",
        )
    if not (isinstance(found.Params, type) and issubclass(found.Params, PassParams)):
        raise PipelineError(f"the Params of the pass {name!r} of {origin} are not a subclass of pipeline.PassParams")
    said = set() if callable(getattr(found.Params, "accepts", None)) else set(found.accepts)
    said |= set() if callable(getattr(found.Params, "produces", None)) else {found.produces}
    if unknown := sorted(said - known_formats()):  # where they depend on parameters, these tell
        raise unknown_format(name, origin, unknown)
    if clash := RESERVED & set(found.Params.model_fields):
        raise PipelineError(f"the pass {name!r} has parameters with reserved names: {', '.join(sorted(clash))}")
    return found


def unknown_format(name: str, origin: str, unknown: Iterable[str]) -> PipelineError:
    """What to raise of a pass that takes or yields formats that no installed runner loads."""
    formats = list(unknown)
    return PipelineError(
        f"the pass {name!r} of {origin} declares the unknown format {' and '.join(map(repr, formats))}",
        hint=did_you_mean(formats[0], known_formats(), noun="formats, for which there is a runner"),
    )


class ParametersError(PipelineError):
    """Parameters of a pass that JSON cannot hold."""


def params_as_json(params: PassParams, found: type[Pass]) -> dict[str, Any]:
    """The parameters as JSON, as which they go to the worker and enter the key.

    Raises: ParametersError where one of them cannot be put into JSON and back.
    """
    try:
        values = params.model_dump(mode="json")
        text = canonical_json(values)
        if found.Params.model_validate_json(text) != params:
            raise ValueError("they come back as others")
    except (ValueError, TypeError) as error:
        guilty = next((name for name, value in params if not _in_json(found, name, value)), None)
        which = f"its parameter {guilty!r}" if guilty else "its parameters"
        reason = str(error).partition("\n")[0]
        raise ParametersError(
            f"the pass {found.name!r}: {which} cannot be put into JSON and read back: {reason}",
            hint="parameters enter the stage key and go to another process; use numbers, texts, paths, lists, mappings "
            "and models of these",
        ) from error
    return values


def _in_json(found: type[Pass], name: str, value: Any) -> bool:
    from pydantic import TypeAdapter

    try:
        field = TypeAdapter(found.Params.model_fields[name].rebuild_annotation(), config=found.Params.model_config)
        canonical_json(field.dump_python(value, mode="json"))
    except (ValueError, TypeError, KeyError):
        return False
    return True
