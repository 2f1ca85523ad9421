"""What names in a recipe look like."""

from __future__ import annotations

NAME = r"^[a-z][a-z0-9_]*$"
"""Of stages, passes and groups: the words of gates and of `--set`."""

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of a recipe: it names the folder of its runs."""
