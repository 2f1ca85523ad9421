"""What is compared: which tool, in which environment, converted and loaded how."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

PROMPT, NEW_TOKENS = 128, 64
"""Tokens of a prompt, and those that are fed after it one by one."""

OURS = "ours"
"""The environment that is this project's own: the interpreter that runs the comparison."""

REFERENCE = "torch fp32"
"""Whose logits the others' are compared with; it is not timed."""

BEST = "pipeline two_phases"
"""Our artifact that the peers are compared with, and whose second process shows the noise."""


@dataclass(frozen=True)
class Conversion:
    """One way of making a tool's files; those who convert alike share it."""

    adapter: str
    environment: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def folder(self) -> str:
        """The name of the folder that it fills."""
        return "-".join([self.adapter, *(str(value).lower() for value in self.options.values())])

    @property
    def command(self) -> list[str]:
        """Arguments of benchmarks.peers.converting, without checkpoint and folder."""
        return [self.adapter, json.dumps(self.options)]


@dataclass(frozen=True)
class Candidate:
    """One row of the tables."""

    name: str
    adapter: str
    environment: str
    conversion: Conversion | None = None
    options: dict[str, Any] = field(default_factory=dict)
    compiles: bool = False
    """Whether it compiles for the shapes that it meets when it is loaded."""

    @property
    def is_ours(self) -> bool:
        return self.adapter == "ours"


def _of(conversion: Conversion, name: str, **options: Any) -> Candidate:
    return Candidate(name, conversion.adapter, conversion.environment, conversion, options)


def _ours() -> list[Candidate]:
    conversion = Conversion("ours", OURS, {"stage": "two_phases"})
    return [
        _of(conversion, BEST),
        _of(conversion, "pipeline int8_dynamic", stage="int8_dynamic_compiled"),
        _of(conversion, "pipeline int4_256", stage="int4_256_compiled"),
    ]


def _llama_cpp(kind: str) -> list[Candidate]:
    conversion = Conversion("llama_cpp", "llama_cpp", {"kind": kind})
    return [_of(conversion, f"llama.cpp {kind}")]


def _openvino() -> list[Candidate]:
    conversion = Conversion("openvino_models", "openvino", {"bits": 4, "group_size": 128})
    grouped = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}
    return [
        _of(conversion, "OpenVINO int4"),
        _of(conversion, "OpenVINO int4, dynamic groups of 128", properties=grouped),
        _of(conversion, "OpenVINO int4, dynamic groups of 128, last logits", properties=grouped, last_logits=True),
    ]


def _genai(block_size: int) -> Candidate:
    conversion = Conversion(
        "onnxruntime_genai_models", "onnxruntime_genai", {"block_size": block_size, "accuracy_level": 4}
    )
    return _of(conversion, f"onnxruntime-genai int4, block {block_size}")


def _olive() -> Candidate:
    conversion = Conversion("olive_models", "olive", {"block_size": 32, "accuracy_level": 4})
    return _of(conversion, "Olive int4, block 32")


def _torch(name: str, *, compiled: bool = False) -> Candidate:
    options = {"dtype": "bfloat16", "compiled": compiled}
    return Candidate(name, "torch_models", OURS, options=options, compiles=compiled)


CANDIDATES = (
    *_ours(),
    *_llama_cpp("Q4_0"),
    *_llama_cpp("Q4_K_M"),
    *_openvino(),
    _genai(32),
    _genai(128),
    _olive(),
    _torch("torch bf16"),
    _torch("torch bf16, compiled", compiled=True),
)

ALONE = {"pipeline int4_256 alone": Conversion("ours", OURS, {"stage": "int4_256"})}
"""Conversions that are only timed: here one quantization, as the others make, and no second one beside it."""

FP32 = Candidate(REFERENCE, "torch_models", OURS, options={"dtype": "float32"})
