"""Olive: its pass ModelBuilder, the way to a decoder in int4 that its documentation gives, run by onnxruntime-genai.

Its own export with a cache (OnnxConversion) does not take the caches of transformers 5.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.peers import onnxruntime_genai_models
from benchmarks.peers.running import Running


def convert(checkpoint: Path, folder: Path, *, block_size: int = 32, accuracy_level: int = 4) -> None:
    """Run Olive's workflow, matrices in int4.

    Raises: RuntimeError where it leaves no model; Olive itself ends well after a pass that failed.
    """
    os.environ["CI"] = "1"  # else Olive sends usage data
    from olive.workflows import run

    run(
        {
            "input_model": {"type": "HfModel", "model_path": str(checkpoint)},
            "passes": {
                "builder": {
                    "type": "ModelBuilder",
                    "precision": "int4",
                    "int4_block_size": block_size,
                    "int4_accuracy_level": accuracy_level,
                }
            },
            "output_dir": str(folder / "out"),
            "cache_dir": str(folder / "cache"),
        }
    )
    _model_folder(folder)


def _model_folder(folder: Path) -> Path:
    found = sorted((folder / "out").rglob("genai_config.json"))
    if len(found) != 1:
        raise RuntimeError(f"Olive left {len(found)} models, not one; its log says why")
    return found[0].parent


def load(folder: Path, checkpoint: Path, threads: int) -> Running:
    """onnxruntime-genai's generator over the model."""
    return onnxruntime_genai_models.load(_model_folder(folder), checkpoint, threads)
