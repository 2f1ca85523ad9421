"""Where everything in a recipe was written."""

from __future__ import annotations

from pipeline.errors import Location

Path = tuple[str | int, ...]


class Positions:
    """Where each key of a nested value stands. A value made by an override stands in that override."""

    def __init__(self, file: str, known: dict[Path, Location] | None = None) -> None:
        self.file = file
        self._known = dict(known or {})

    def put(self, path: Path, location: Location) -> None:
        self._known[path] = location

    def find(self, path: Path) -> Location:
        """The place of `path`, or of the nearest thing around it."""
        while path not in self._known and path:
            path = path[:-1]
        return self._known.get(path, Location(self.file, 1, 1))

    def __contains__(self, path: object) -> bool:
        return path in self._known
