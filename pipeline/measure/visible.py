"""Strangers' names and values as text that does nothing to a terminal."""

from __future__ import annotations

import re
from typing import Any

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""The control characters C0 and C1, other ends of lines, and what turns the direction of text round."""


def visible(text: str) -> str:
    r"""The text with every control character as its escape: \x1b."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def all_visible(value: Any) -> Any:
    """The same of every text in a JSON value, keys among them."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(key)): all_visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(all_visible, value))
    return value
