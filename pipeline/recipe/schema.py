"""What a recipe may say, version 1."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from pipeline.errors import Location
from pipeline.measure.looks import LEAST_ROUNDS
from pipeline.recipe.names import NAME
from pipeline.recipe.positions import Positions
from pipeline.report.schema import Cell

COMPARISONS_FOLDER = "comparisons"
"""The folder beside those of the recipes' runs."""

SOURCE = "source"
"""The first stage: the untouched model."""

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
ModelSource = Literal["builtin", "path", "huggingface", "onnx", "architecture"]
MODEL_SOURCES: tuple[ModelSource, ...] = ("builtin", "path", "huggingface", "onnx", "architecture")


class Part(BaseModel):
    """A part of a recipe: immutable, strictly typed, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class OutlierChannels(Part):
    """Channels of every norm's output that are larger than the others, as those of trained models are."""

    share: float = Field(0.005, gt=0, le=1, description="of a norm's channels; one at least")
    scale: list[Annotated[float, Field(ge=1)]] = Field(
        [20.0, 60.0], min_length=2, max_length=2, description="least and largest factor, evenly drawn between them"
    )

    @field_validator("scale")
    @classmethod
    def _scale_ascends(cls, scale: list[float]) -> list[float]:
        if scale[0] > scale[1]:
            raise ValueError(f"the least factor comes first; got {scale}")
        return scale


class Architecture(BaseModel):
    """An architecture with random weights. Every key that is not listed here is a field of its configuration."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    type: str = Field(description="model_type of a causal language model in transformers, such as llama")
    seed: int = Field(0, ge=0, lt=2**32, description="of the random weights")
    outlier_channels: OutlierChannels | None = Field(
        None,
        description="some channels of each norm are scaled up, and what reads them down by as much: the model computes "
        "the same, and its activations have outliers to round, as trained ones have; {} takes the defaults",
    )

    @property
    def config(self) -> dict[str, Any]:
        """Fields of the configuration as they were given."""
        return dict(self.model_extra or {})


class Model(Part):
    """The model: exactly one of builtin, path, huggingface, onnx, architecture."""

    builtin: str | None = Field(None, description="a model that ships with the package, such as llama2-tiny")
    path: str | None = Field(None, description="a model folder, relative to the recipe")
    huggingface: str | None = Field(None, description="a hub id, OWNER/NAME")
    onnx: str | None = Field(None, description="an ONNX file of a causal language model")
    architecture: Architecture | None = Field(
        None, description="random weights of an architecture: {type: llama, hidden_size: 512, …, seed: 0}"
    )
    revision: str | None = Field(None, description="the hub's branch, tag or commit")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="data type that the source is loaded and measured in; auto: the checkpoint's own"
    )
    trust_remote_code: bool = Field(
        False, description="run the model's own Python files, which can do anything that you can (path, huggingface)"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        given = [name for name in MODEL_SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(MODEL_SOURCES)} is needed; given: {', '.join(given) or 'none'}"
            )
        if self.revision is not None and self.huggingface is None:
            raise ValueError("revision goes with huggingface only")
        if self.trust_remote_code and self.kind not in {"path", "huggingface"}:
            raise ValueError("trust_remote_code goes with path and huggingface only")
        if self.dtype != "auto" and self.onnx is not None:
            raise ValueError("dtype does not go with onnx: a graph says itself what it computes in")
        return self

    @property
    def kind(self) -> ModelSource:
        return next(name for name in MODEL_SOURCES if getattr(self, name) is not None)

    @property
    def source(self) -> str:
        """Name, path or id; of an architecture its type."""
        given = getattr(self, self.kind)
        return given.type if isinstance(given, Architecture) else str(given)


class Entry(BaseModel):
    """One entry of `passes`. Every key that is not listed here is a parameter of the pass."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    pass_: str = Field(
        alias="pass",
        description="name of a registered pass, see `pipeline passes`; or ./FILE.py:CLASS, a pass in a file in the "
        "recipe's folder or below it, which runs with --allow-code",
    )
    name: str | None = Field(None, pattern=NAME, description="the stage's name; default: the pass's")
    after: str | None = Field(None, description="the stage whose artifact it takes; default: the entry before")
    inputs: dict[str, str] = Field(default_factory=dict, description="further stages that the pass reads, by role")
    allow_broken: bool = Field(False, description="a broken model does not fail the run")
    measure: bool = Field(
        True,
        description="false: the model is made and never run, which is for one that only leads to others, or that this "
        "machine cannot hold",
    )
    timeout_s: float | None = Field(None, gt=0, description="seconds after which the pass is ended; default: never")


class GroupEntry(Part):
    """An entry of `passes` that stands for the entries of another file."""

    group: str = Field(min_length=1, description="a group's file, relative to this one, or the name of a shipped group")
    name: str | None = Field(None, pattern=NAME, description="prefix of its stages' names: NAME_stage")
    after: str | None = Field(None, description="the stage that its first entry takes; default: the entry before")


class GroupFile(Part):
    """A list of passes that several recipes use."""

    version: Literal[1] = Field(description="version of this schema")
    description: str = Field("", description="what it is for, in a line")
    passes: list[dict[str, Any]] = Field(min_length=1, description="entries as in a recipe, groups among them")


class Cross(Part):
    """A matrix of all combinations."""

    cross: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        min_length=1, description="dotted key: its values; the last key varies fastest"
    )


Count = Annotated[int, Field(ge=1)]


class Workload(Part):
    """What the runners are asked to do: every combination of prompt length, batch size and new tokens, or `forward`."""

    prompt_lengths: list[Count] = Field([128], min_length=1, description="tokens")
    new_tokens: Count | Annotated[list[Count], Field(min_length=1)] = Field(
        64, description="decoded tokens after each prompt; a list: each number in turn"
    )
    batch_sizes: list[Count] = Field([1], min_length=1, description="sequences at once")
    forward: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] | None = Field(
        None, description="[batch, length] of whole passes without a cache, instead of prompts and new tokens"
    )

    @field_validator("prompt_lengths", "new_tokens", "batch_sizes", "forward")
    @classmethod
    def _no_point_twice(cls, given: Any) -> Any:
        twice = [item for i, item in enumerate(given) if item in given[:i]] if isinstance(given, list) else []
        if twice:
            raise ValueError(f"{twice[0]} stands twice: a workload point is measured once")
        return given

    @model_validator(mode="after")
    def _one_kind(self) -> Workload:
        others = sorted(self.model_fields_set - {"forward"})
        if self.forward is not None and others:
            raise ValueError(f"forward stands alone: it does not go with {', '.join(others)}")
        return self

    @property
    def new_token_counts(self) -> list[int]:
        return self.new_tokens if isinstance(self.new_tokens, list) else [self.new_tokens]


class Thresholds(Part):
    """Where a quality verdict begins. `broken` ends a run with exit code 1; `equivalent` is as good as the baseline."""

    broken_perplexity_ratio: float = Field(2.0, gt=1, description="broken: the perplexity ratio exceeds it")
    broken_top1_agreement: float = Field(
        0.5, ge=0, le=1, description="broken: less agreement, together with a divergence beyond broken_kl_divergence"
    )
    broken_kl_divergence: float = Field(0.1, ge=0, description="nats; see broken_top1_agreement")
    equivalent_perplexity_ratio: float = Field(
        1.01, gt=1, description="equivalent: the ratio's interval lies between its inverse and it"
    )
    equivalent_kl_divergence: float = Field(0.01, ge=0, description="nats; equivalent: the divergence is at most that")
    broken_random_agreement: float = Field(
        0.1, ge=0, le=1, description="random weights: broken where fewer of the most likely tokens agree"
    )
    equivalent_random_agreement: float = Field(
        0.99, ge=0, le=1, description="random weights: equivalent where so many agree"
    )


class Quality(Part):
    """The held-out text that every stage is scored on."""

    text: str = Field("builtin", description="builtin, or a UTF-8 text file relative to the recipe")
    window: int = Field(512, ge=2, description="tokens of one forward pass")
    stride: int = Field(256, ge=1, description="tokens between the beginnings of two windows")
    tokens: int = Field(20000, ge=2, description="at most so many tokens are scored")
    thresholds: Thresholds = Field(Thresholds(), description="where a verdict begins")

    @model_validator(mode="after")
    def _stride_within_window(self) -> Quality:
        if self.stride >= self.window:
            raise ValueError(f"stride ({self.stride}) has to be smaller than window ({self.window}): windows overlap")
        return self


class Evaluation(Part):
    """How the stages are compared."""

    baseline: str = Field(SOURCE, description="the stage that the others are compared with")
    budget_s: float = Field(60.0, gt=0, description="seconds for the speed measurements of all stages together")
    margin: float = Field(
        0.01, gt=0, lt=1, description="speeds within this share of each other are equivalent; faster is beyond it"
    )
    looks: Annotated[list[Annotated[int, Field(ge=LEAST_ROUNDS)]], Field(min_length=1, max_length=4)] = Field(
        [12, 30, 80, 200],
        description="rounds after which it is looked whether all is decided: at most four, ascending; "
        "one: exactly so many rounds, where the budget allows",
    )
    threads: int | None = Field(None, ge=1, description="default: the lesser of the profile's and the host's cores")
    workload: Workload = Field(Workload(), description="what speed is measured on")
    quality: Quality = Field(Quality(), description="what predictions are compared on")

    @field_validator("looks")
    @classmethod
    def _looks_ascend(cls, looks: list[int]) -> list[int]:
        if any(a >= b for a, b in pairwise(looks)):
            raise ValueError(f"looks have to ascend; got {looks}")
        return looks


class RecipeModel(Part):
    """A recipe: a model, the target hardware, an ordered list of passes, evaluation and gates."""

    version: Literal[1] = Field(description="version of this schema")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder of its runs")
    description: str = Field("", description="what it is for, in a line")
    model: Model = Field(description="where the model comes from")
    hardware: str = Field("local", description="a profile's name, a path to one, or local: this machine")
    seed: int = Field(
        0, ge=0, lt=2**32, description="for passes that draw random numbers, and for the workload's tokens"
    )
    passes: list[Entry] = Field(default_factory=list, description="the stages after `source`, and groups of them")
    export: str | None = Field(None, description="the stage whose model lands in the run's model/ folder")
    evaluate: Evaluation = Field(Evaluation(), description="how the stages are compared")
    gates: list[str] = Field(default_factory=list, description="STAGE.METRIC[{kind selector}] OP NUMBER")

    @field_validator("name")
    @classmethod
    def _has_a_folder_of_its_own(cls, name: str) -> str:
        if name.lower() == COMPARISONS_FOLDER:  # some file systems take them for one
            raise ValueError(f"no recipe can be named {name!r}: that is the folder of what `pipeline compare` writes")
        return name


class RecipeFile(RecipeModel):
    """A recipe as a person writes it: with the keys that compose it from several files and variants."""

    extends: str | None = Field(
        None, description="a recipe that this one changes: its file, relative to this one, or a shipped recipe's name"
    )
    matrix: Annotated[list[dict[str, Any]], Field(min_length=1)] | Cross = Field(
        default_factory=list, description="variants of the recipe: a mapping of dotted keys to values for each cell"
    )


class Stage(Part):
    """An entry with its defaults resolved."""

    name: str
    pass_name: str
    params: dict[str, Any]
    parent: str
    inputs: dict[str, str]
    allow_broken: bool
    measure: bool = True
    timeout_s: float | None = None
    index: int = Field(description="place in the recipe's list of passes, from 0")


class Gate(Part):
    """A condition on the report."""

    text: str
    stage: str
    metric: str
    selector: dict[str, str] = Field(default_factory=dict, description="narrows the workload points, e.g. {batch: 1}")
    comparison: str
    bound: float

    def holds(self, value: float) -> bool:
        return COMPARISONS[self.comparison](value, self.bound)


class Recipe(RecipeModel):
    """A validated recipe that remembers where everything in it was written."""

    stages: list[Stage] = Field(exclude=True)
    parsed_gates: list[Gate] = Field(exclude=True)

    _positions: Positions = PrivateAttr(default_factory=lambda: Positions("recipe"))
    _folder: Path = PrivateAttr(default_factory=Path)
    _folders: dict[str, Path] = PrivateAttr(default_factory=dict)
    _text: str = PrivateAttr("")
    _cell: Cell | None = PrivateAttr(None)

    @property
    def folder(self) -> Path:
        """Where relative paths in the recipe's own file start."""
        return self._folder

    def folder_of(self, *path: str | int) -> Path:
        """Where a relative path at `path` starts: in the folder of the file that says it, which may be a base's."""
        return self._folders.get(self.location(*path).file, self._folder)

    @property
    def cell(self) -> Cell | None:
        """The cell of the matrix that this recipe is; None where there is no matrix."""
        return self._cell

    @property
    def text(self) -> str:
        """The recipe as it was written."""
        return self._text

    @property
    def positions(self) -> Positions:
        return self._positions

    def location(self, *path: str | int) -> Location:
        """Where `path`, for example ("passes", 0, "bits"), was written."""
        return self._positions.find(path)

    def stage(self, name: str) -> Stage:
        """Raises: KeyError where there is no such stage."""
        return next(s for s in self.stages if s.name == name)

    @property
    def stage_names(self) -> list[str]:
        return [SOURCE, *(s.name for s in self.stages)]


_GATE = re.compile(
    r"^\s*(?P<stage>[a-z][a-z0-9_]*)\.(?P<metric>[a-z][a-z0-9_]*)\s*(\{(?P<selector>[^}]*)\})?\s*"
    r"(?P<comparison>>=|<=|==|>|<)\s*(?P<bound>[-+]?[0-9.]+([eE][-+]?[0-9]+)?)\s*$"
)


_PARTS = re.compile(r"^\s*[^\s{<>=!]+\s*(\{[^}]*\})?\s*(?P<comparison>[<>=!]+)\s*(?P<bound>.*?)\s*$")


def _nearest_fault(text: str) -> str:
    """Which part of a gate cannot be read, if that can be told."""
    known = " ".join(COMPARISONS)
    parts = _PARTS.match(text)
    if parts is None:
        return f" with OP one of {known}"
    if parts["comparison"] not in COMPARISONS:
        return f": {parts['comparison']!r} is none of {known}"
    try:
        float(parts["bound"])
    except ValueError:
        return f": {parts['bound']!r} is no number; numbers have no unit, as in 7e6 for 7 MB"
    return f" with OP one of {known}"


def parse_gate(text: str) -> Gate:
    """Raises: ValueError where the text is not STAGE.METRIC[{key: value, …}] OP NUMBER."""
    match = _GATE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not STAGE.METRIC OP NUMBER{_nearest_fault(text)}")
    selector = {}
    for pair in filter(None, (p.strip() for p in (match["selector"] or "").split(","))):
        key, colon, value = pair.partition(":")
        if not colon:
            raise ValueError(f"{pair!r} in {text!r} is not KEY: VALUE")
        selector[key.strip()] = value.strip()
    return Gate(
        text=" ".join(text.split()),
        stage=match["stage"],
        metric=match["metric"],
        selector=selector,
        comparison=match["comparison"],
        bound=float(match["bound"]),
    )
