"""A pass in a Python file beside a recipe: `pass: ./my_pass.py:MyPass`.

Whoever wrote the recipe wrote this code, too, so it runs only where its user allows that. Without that, what the class
says of itself in plain words is read from the file's text, and nothing of it is run.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Callable
from importlib.abc import SourceLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.artifact import Frozen
from pipeline.errors import Location, PipelineError, RecipeError, did_you_mean

FILE_PASS = r"^[^:]*\.py:[A-Za-z_][A-Za-z0-9_]*$"
"""What `pass` says where the pass is in a file."""


def _are_names(value: Any) -> bool:
    return isinstance(value, set | frozenset | tuple | list) and all(isinstance(name, str) for name in value)


SAID: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "version": lambda value: type(value) is int,
    "accepts": _are_names,
    "produces": lambda value: isinstance(value, str),
}
"""What is read from the text of a class that is not run, and what it has to be."""


class CodeFile(Frozen):
    """A class in a Python file."""

    path: str
    """Absolute."""
    class_name: str
    digest: str
    """SHA-256 of the file when it was found."""

    def __str__(self) -> str:
        return f"{Path(self.path).name}:{self.class_name}"

    @property
    def module(self) -> str:
        """What its file is called once it is imported."""
        return f"pipeline_code_{self.digest[:16]}"


def names_file(pass_name: str) -> bool:
    """Whether a recipe's `pass` means a file and not a registered pass."""
    return ".py:" in pass_name or "/" in pass_name or pass_name.endswith(".py")


def find_code(pass_name: str, folder: Path, *, named_by: str = "the recipe that names it") -> CodeFile | None:
    """The file that `pass_name` means, which lies below `folder`; None where it names a registered pass.

    `named_by` says whose folder that is.

    Raises: RecipeError where there is no such file, or it lies elsewhere.
    """
    if not names_file(pass_name):
        return None
    if re.match(FILE_PASS, pass_name) is None:
        raise RecipeError(f"{pass_name!r} is no pass in a file", hint="write ./FILE.py:CLASS")
    name, _, class_name = pass_name.rpartition(":")
    given, home = PurePosixPath(name), folder.resolve()
    path = (home / given).resolve()
    if given.is_absolute() or ".." in given.parts or not path.is_relative_to(home):
        raise RecipeError(
            f"{name} lies outside the folder of {named_by}, {home}",
            hint="a pass in a file lies below that folder; one for several recipes is best made a package: "
            "`pipeline passes new NAME`",
        )
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"the pass's file {path} cannot be read: {error.strerror}") from None
    return CodeFile(path=str(path), class_name=class_name, digest=hashlib.sha256(source).hexdigest())


def read_class(code: CodeFile) -> dict[str, Any]:
    """What the class says of itself in literals, its docstring as `__doc__`: nothing is run.

    Raises: RecipeError where the file is no Python, or has no such class.
    """
    path = Path(code.path)
    try:
        tree = ast.parse(path.read_bytes(), filename=path.name)
    except SyntaxError as error:
        where = Location(str(path), error.lineno or 0, error.offset or 0)
        raise RecipeError(f"this is no Python: {error.msg}", location=where) from None
    except ValueError as error:  # a zero byte
        raise RecipeError(f"{path} is no Python: {error}") from None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if code.class_name not in classes:
        hint = did_you_mean(code.class_name, classes, noun="classes")
        raise RecipeError(f"{path} has no class {code.class_name!r}", hint=hint)
    found = classes[code.class_name]
    said: dict[str, Any] = {"__doc__": ast.get_docstring(found)}
    for statement in found.body:
        for name, value in _assigned(statement):
            if name in SAID and (literal := _literal(value)) is not None and SAID[name](literal):
                said[name] = literal
    return said


def _literal(value: ast.expr) -> Any:
    """The value of a literal, or of `frozenset` or `set` of one; None where it is computed."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in ("frozenset", "set"):
        value = value.args[0] if len(value.args) == 1 and not value.keywords else value
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError):  # a set of lists is no set
        return None


def _assigned(statement: ast.stmt) -> list[tuple[str, ast.expr]]:
    """(name, value) pairs of `a = 1`, `a: int = 1` and `a, b = 1, 2`."""
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
        return [(statement.target.id, statement.value)]
    if not isinstance(statement, ast.Assign):
        return []
    pairs: list[tuple[str, ast.expr]] = []
    for target in statement.targets:
        if isinstance(target, ast.Name):
            pairs.append((target.id, statement.value))
        elif isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
            both = zip(target.elts, statement.value.elts, strict=False)
            pairs += [(name.id, value) for name, value in both if isinstance(name, ast.Name)]
    return pairs


def import_class(code: CodeFile) -> object:
    """Run the file, once a process, and give its class. No bytecode is left beside it.

    Raises: PipelineError where the file is not what it was when it was found, it raises, or has no such class.
    """
    path = Path(code.path)
    name = code.module
    module = sys.modules.get(name)
    if module is None:
        source = path.read_bytes()
        if hashlib.sha256(source).hexdigest() != code.digest:
            raise PipelineError(f"{path} was changed while the plan ran", hint="run again")
        spec = spec_from_loader(name, _Loader(path, source), origin=str(path))
        assert spec is not None
        spec.has_location = True
        module = module_from_spec(spec)
        sys.modules[name] = module  # pydantic looks names of annotations up there
        try:
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception | SystemExit):
                raise
            hint = None
            if isinstance(error, SyntaxError):
                where = Location(str(path), error.lineno or 0, error.offset or 0)
                raise RecipeError(f"this is no Python: {error.msg}", location=where) from None
            if isinstance(error, ModuleNotFoundError) and error.name and path.with_name(f"{error.name}.py").exists():
                hint = "such a pass is one file; with more than one make a package: `pipeline passes new NAME`"
            raise PipelineError(
                f"{path.name} cannot be imported: {type(error).__name__}: {error}" + _line_of(error, path), hint=hint
            ) from error
    if not hasattr(module, code.class_name):
        classes = [n for n, value in vars(module).items() if isinstance(value, type) and value.__module__ == name]
        hint = did_you_mean(code.class_name, classes, noun="classes")
        raise PipelineError(f"{path} has no class {code.class_name!r}", hint=hint)
    found: object = getattr(module, code.class_name)
    return found


def _line_of(error: BaseException, path: Path) -> str:
    """Where in the file it happened."""
    lines, traceback = [], error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            lines.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    return f" (line {lines[-1]})" if lines else ""


class _Loader(SourceLoader):
    """Gives the text that was read already; knows no time of it, so that Python keeps no bytecode."""

    def __init__(self, path: Path, source: bytes) -> None:
        self._path, self._source = str(path), source

    def get_filename(self, fullname: str) -> str:
        return self._path

    def get_data(self, path: str) -> bytes:
        return self._source
