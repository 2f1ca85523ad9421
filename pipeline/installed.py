"""Which Python packages are installed, told without importing any of them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def missing_packages(requirements: Iterable[str]) -> list[str]:
    """Those of the requirements, as pip takes them (`optimum>=2`), that are not fulfilled here.

    Raises: ValueError for what is no requirement.
    """
    from packaging.requirements import Requirement

    return [text for text in requirements if not _fulfilled(Requirement(text))]


def _fulfilled(requirement: object) -> bool:
    try:
        return bool(requirement.specifier.contains(version(requirement.name), prereleases=True))  # type: ignore[attr-defined]
    except PackageNotFoundError:
        return False
