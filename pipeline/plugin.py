"""What a pass is, what it is given, and how it is found.

A pass is a class in any installed package, named in the entry-point group `pipeline.passes`. The engine knows passes
only through this module; the built-in ones are registered in the same way.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from pipeline.artifact import Artifact, Frozen
from pipeline.errors import PipelineError, RecipeError, did_you_mean
from pipeline.memory_estimate import ModelSize, Prediction
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


class Registry:
    """The passes that are installed, by name. Only those asked for are imported."""

    def __init__(self, points: Iterable[EntryPoint] | None = None) -> None:
        self._points = points

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
        if not infos:
            raise RecipeError(f"unknown pass {name!r}", hint=did_you_mean(name, self.names(), noun="passes"))
        if len(infos) > 1:
            owners = " and ".join(f"{i.entry_point.value} ({i.origin})" for i in infos)
            raise RecipeError(f"two plugins are named {name!r}: {owners}", hint="uninstall one of them")
        return infos[0]

    def load(self, name: str) -> type[Pass]:
        """Import the pass `name`.

        Raises: RecipeError where it is unknown; PipelineError where it cannot be imported or is not a pass.
        """
        info = self.info(name)
        try:
            found = info.entry_point.load()
        except Exception as error:  # a stranger's module may raise anything
            raise PipelineError(
                f"the pass {name!r} of {info.origin} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, Pass)):
            raise PipelineError(f"{info.entry_point.value} of {info.origin} is not a subclass of pipeline.Pass")
        if missing := [field for field in ("name", "accepts", "produces") if not hasattr(found, field)]:
            raise PipelineError(f"the pass {name!r} of {info.origin} does not say its {' and '.join(missing)}")
        if found.name != name:  # the name enters keys and finds the pass again in the worker
            raise PipelineError(
                f"{info.origin} registers {info.entry_point.value} as {name!r}; the pass calls itself {found.name!r}",
                hint="the entry point's name and the pass's have to be the same",
            )
        if clash := RESERVED & set(found.Params.model_fields):
            raise PipelineError(f"the pass {name!r} has parameters with reserved names: {', '.join(sorted(clash))}")
        return found


def code_digest(cls: type) -> str:
    """SHA-256 over the sources of the class's module and of those modules of its package that it imports.

    Imports are read from the source, inside functions too, so nothing is imported to find out.
    """
    package = cls.__module__.partition(".")[0]
    seen: dict[str, bytes] = {}
    waiting = [cls.__module__]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        path = _source_of(module)
        if path is None:
            continue
        seen[module] = path.read_bytes()
        waiting += _imports_within(seen[module], module, package, is_package=path.name == "__init__.py")
    total = hashlib.sha256()
    for module, source in sorted(seen.items()):
        total.update(f"{module}\0{hashlib.sha256(source).hexdigest()}\0".encode())
    return total.hexdigest()


def _source_of(module: str) -> Path | None:
    """The file of a module, found below its top-level package's folder: looking for it otherwise would import it."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is not None:
        return Path(loaded) if loaded.endswith(".py") else None
    top, *rest = module.split(".")
    package = sys.modules.get(top)
    if package is None or not rest:
        return None
    for folder in getattr(package, "__path__", ()):
        base = Path(folder).joinpath(*rest)
        for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@cache
def _imports_within(source: bytes, module: str, package: str, *, is_package: bool) -> list[str]:
    mentioned = rb"\b(?:from\s+\.|(?:from|import)\b[^\n]*\b" + re.escape(package.encode()) + rb"\b)"
    if re.search(mentioned, source) is None:  # parsing is slow, and most modules import none of their own package
        return []
    found: list[str] = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in found if name == package or name.startswith(package + ".")]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement below `node`. Imports are statements: to look into expressions would take five times as long."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(node, part, ()):
            yield inner
            yield from _statements(inner)
