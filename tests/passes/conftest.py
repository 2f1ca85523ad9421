"""Tiny random models, saved as a user's checkpoint is, and their artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import Artifact, PassContext
from pipeline.artifact import Manifest, blob_path
from pipeline.models.source import find_source, source_artifact
from pipeline.store.store import Store
from pipeline.store.writer import OutputWriter

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
