"""Declarative optimization of models: a YAML recipe in, an optimized model and the evidence for it out.

The names below are the public ones: what the author of a pass and a user of the Python API import. They load on first
use, so that importing `pipeline` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import Field

    from pipeline.artifact import Artifact, CacheLayout, Component, FileEntry, Interface, Manifest, TensorRef
    from pipeline.errors import HostError, PipelineError, RecipeError, StageError, did_you_mean
    from pipeline.further_passes import FurtherPass
    from pipeline.installed import missing_packages
    from pipeline.memory_estimate import ModelSize, Prediction
    from pipeline.models.checkpoint import read_weights, weight_files
    from pipeline.models.onnx_file import read_onnx_file
    from pipeline.onnx_model import load_onnx, new_tensor, referenced_tensor, reshaped_tensor, save_onnx
    from pipeline.onnx_wire import check_external_tensors
    from pipeline.passes_catalogue import Parameter
    from pipeline.plugin import Example, Pass, PassContext, PassParams, Requires, StageRef, check_roles
    from pipeline.recipe import load_recipe
    from pipeline.runtime import ExecutionSpec, load_model, load_runner
    from pipeline.runtime.torch import checkpoint_folder
    from pipeline.runtime.transforms import with_transform
    from pipeline.store.folder import materialize
    from pipeline.store.store import default_store_path

__version__ = "0.1.0"

_HOMES = {
    "pydantic": ["Field"],
    "pipeline.artifact": ["Artifact", "CacheLayout", "Component", "FileEntry", "Interface", "Manifest", "TensorRef"],
    "pipeline.errors": ["HostError", "PipelineError", "RecipeError", "StageError", "did_you_mean"],
    "pipeline.further_passes": ["FurtherPass"],
    "pipeline.installed": ["missing_packages"],
    "pipeline.memory_estimate": ["ModelSize", "Prediction"],
    "pipeline.models.checkpoint": ["read_weights", "weight_files"],
    "pipeline.models.onnx_file": ["read_onnx_file"],
    "pipeline.onnx_model": ["load_onnx", "new_tensor", "referenced_tensor", "reshaped_tensor", "save_onnx"],
    "pipeline.onnx_wire": ["check_external_tensors"],
    "pipeline.passes_catalogue": ["Parameter"],
    "pipeline.plugin": ["Example", "Pass", "PassContext", "PassParams", "Requires", "StageRef", "check_roles"],
    "pipeline.recipe": ["load_recipe"],
    "pipeline.runtime": ["ExecutionSpec", "load_model", "load_runner"],
    "pipeline.runtime.torch": ["checkpoint_folder"],
    "pipeline.store.folder": ["materialize"],
    "pipeline.store.store": ["default_store_path"],
    "pipeline.runtime.transforms": ["with_transform"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Artifact",
    "CacheLayout",
    "Component",
    "Example",
    "ExecutionSpec",
    "Field",
    "FileEntry",
    "FurtherPass",
    "HostError",
    "Interface",
    "Manifest",
    "ModelSize",
    "Parameter",
    "Pass",
    "PassContext",
    "PassParams",
    "PipelineError",
    "Prediction",
    "RecipeError",
    "Requires",
    "StageError",
    "StageRef",
    "TensorRef",
    "check_external_tensors",
    "check_roles",
    "checkpoint_folder",
    "default_store_path",
    "did_you_mean",
    "load_model",
    "load_onnx",
    "load_recipe",
    "load_runner",
    "materialize",
    "missing_packages",
    "new_tensor",
    "read_onnx_file",
    "read_weights",
    "referenced_tensor",
    "reshaped_tensor",
    "save_onnx",
    "weight_files",
    "with_transform",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
