"""What names in a recipe look like."""

from __future__ import annotations

import re

from pipeline.file_pass import names_file

NAME = r"^[a-z][a-z0-9_]*$"
"""Of stages, passes and groups: the words of gates and of `--set`."""

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of a recipe: it names the folder of its runs."""


def stage_name(pass_name: str) -> str:
    """The name of a stage whose entry gives it none: the pass's, or in snake case that of a class in a file."""
    class_name = pass_name.rpartition(":")[2] if names_file(pass_name) else ""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name).lower() or pass_name
