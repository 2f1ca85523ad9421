"""The files that a recipe is made of: found by path or by a shipped name, and read."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import Location, RecipeError, did_you_mean
from pipeline.recipe.parsing import parse
from pipeline.recipe.tree import Node

LARGEST_FILE = 4_000_000  # bytes; a recipe is written by a person


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return _shipped(".")


def shipped_groups() -> dict[str, Path]:
    """Name -> file of the groups of passes that come with the package."""
    return _shipped("groups")


def find_recipe(path: Path) -> Path:
    """The file at `path`, or the shipped recipe of that name.

    Raises: RecipeError where there is neither.
    """
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; give the recipe's file")
    shipped = shipped_recipes()
    # `recipes/llama2-cpu.yaml` means the shipped recipe, too, where an installed package has no such folder beside it
    if path.parent in {Path(), Path("recipes")} and path.stem in shipped:
        return shipped[path.stem]
    if path.exists():
        raise RecipeError(f"{path} is no ordinary file")
    raise RecipeError(f"there is no recipe {path}", hint=did_you_mean(path.stem, shipped, noun="shipped recipes"))


def read_text(file: Path, *, at: Location | None = None) -> str:
    """The text of a recipe's file. `at` is the place that named it.

    Raises: RecipeError where it cannot be read, is not UTF-8, or is too large for a recipe.
    """
    try:
        if (size := file.stat().st_size) > LARGEST_FILE:
            raise RecipeError(f"{file} has {size} bytes; a recipe has at most {LARGEST_FILE}", location=at)
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}", location=at) from None
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}", location=at) from None


class Library:
    """The files that one recipe is made of.

    It remembers where relative paths start for what each file says: in that file's own folder.
    """

    def __init__(self, label: str, folder: Path) -> None:
        """`label` is what messages call the recipe itself, whose relative paths start from `folder`."""
        self._folders = {label: folder.resolve()}
        self._home = folder.resolve()

    @property
    def folders(self) -> dict[str, Path]:
        """What messages call a file -> the folder where its relative paths start."""
        return dict(self._folders)

    def read(self, named: Node, shipped: dict[str, Path], noun: str) -> tuple[Node, Path]:
        """The tree of the file that `named` gives by path or shipped name, and the file, resolved.

        Raises: RecipeError where there is no such file, or it is no mapping.
        """
        given = str(named.value)
        folder = self._folders.get(named.at.file, self._home)
        file = folder / Path(given).expanduser()
        if file.is_file():
            label = os.path.normpath(Path(named.at.file).parent / Path(given).expanduser())
            if named.at.file not in self._folders:  # an override: its label is no path
                label = str(file)
        elif given in shipped:
            file = shipped[given]
            label = str(file)
        else:
            what = "is a folder" if file.is_dir() else "is no ordinary file" if file.exists() else "does not exist"
            raise RecipeError(
                f"the {noun} {given!r} is not there: {file} {what}",
                location=named.at,
                hint=did_you_mean(given, shipped, noun=f"shipped {noun}s"),
            )
        tree = parse(read_text(file, at=named.at), label)
        if tree is None or not isinstance(tree.value, dict):
            raise RecipeError(f"a {noun} is a mapping of keys to values", location=Location(label, 1, 1))
        self._folders[label] = file.resolve().parent
        return tree, file.resolve()


def _shipped(folder: str) -> dict[str, Path]:
    package = Path(__file__).parent.parent
    homes = [package / "data" / "recipes", package.parent / "recipes"]
    return {f.stem: f for home in reversed(homes) for f in sorted((home / folder).glob("*.yaml"))}
