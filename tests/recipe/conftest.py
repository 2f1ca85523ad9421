"""Recipes of several files, written into a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import load_cells

Write = Callable[..., Path]
Complaint = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write NAME=TEXT files into the current folder; returns the path of the first, as a person would type it."""
    monkeypatch.chdir(tmp_path)

    def files(**texts: str) -> Path:
        for name, text in texts.items():
            path = Path(name.replace("__", "/") + ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return Path(next(iter(texts)).replace("__", "/") + ".yaml")

    return files


@pytest.fixture
def complaint(write: Write) -> Complaint:
    """What is said of the first of these files."""

    def told(*overrides: str, **texts: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load_cells(write(**texts), overrides)
        assert caught.value.exit_code == 2
        return str(caught.value)

    return told
