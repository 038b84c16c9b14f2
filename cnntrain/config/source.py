"""Names followed through source files, as Python itself would follow them, without importing."""

import ast
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

# Modules that are cheap to import and written in ways that no reader of source could follow.
REAL_MODULES = {"typing", "typing_extensions", "collections.abc", "pydantic", "pathlib"}


@dataclass(frozen=True)
class Definition:
    """Where a name is defined: its module, and its node there (None: the module itself)."""

    module: str
    name: str
    node: Any = field(compare=False, default=None)


class NotInSource(LookupError):
    """The source files don't tell what a name is."""


@cache
def _source(module: str) -> Path | None:
    """The file of a module, found without importing its parents."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        name = top
        for part in rest:
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = f"{name}.{part}"
            spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


@cache
def _statements(module: str) -> list[ast.stmt]:
    """The statements that run when a module is imported, those under `if` and `try` included."""
    path = _source(module)
    if path is None:
        raise NotInSource(module)

    def walk(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for statement in body:
            if isinstance(statement, (ast.If, ast.Try)):
                yield from walk(statement.body)
                yield from walk(statement.orelse)
            else:
                yield statement

    try:
        return list(walk(ast.parse(path.read_bytes()).body))
    except SyntaxError as error:
        raise NotInSource(module) from error


def locate(target: str) -> Definition:
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        if _source(".".join(parts[:cut])):
            definition = Definition(".".join(parts[:cut]), "")
            for name in parts[cut:]:
                if definition.name:
                    raise NotInSource(target)
                definition = _lookup(definition.module, name, ())
            return definition
    raise NotInSource(target)


def _lookup(module: str, name: str, seen: tuple[tuple[str, str], ...]) -> Definition:
    """Follow a name that `module` binds to the place that defines it."""
    if (module, name) in seen:
        raise NotInSource(name)
    seen = (*seen, (module, name))
    stars = []
    for statement in reversed(_statements(module)):
        match statement:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if statement.name == name:
                    return Definition(module, name, statement)
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                return Definition(module, name, value)
            case ast.AnnAssign(target=ast.Name(id=found), value=value) if found == name and value:
                return Definition(module, name, value)
            case ast.Import(names=aliases):
                for alias in aliases:
                    if (alias.asname or alias.name.split(".")[0]) == name:
                        return Definition(alias.name if alias.asname else name, "")
            case ast.ImportFrom(names=aliases):
                origin = _absolute(module, statement)
                for alias in aliases:
                    if alias.name == "*":
                        stars.append(origin)
                    elif (alias.asname or alias.name) == name:
                        return _member(origin, alias.name, seen)
    for origin in stars:
        try:
            return _member(origin, name, seen)
        except NotInSource:
            continue
    return _member(module, name, seen, only_submodule=True)


def _member(
    module: str, name: str, seen: tuple[tuple[str, str], ...], only_submodule: bool = False
) -> Definition:
    if module in REAL_MODULES:
        return Definition(module, name)
    if not only_submodule:
        try:
            return _lookup(module, name, seen)
        except NotInSource:
            pass
    if _source(f"{module}.{name}"):
        return Definition(f"{module}.{name}", "")
    raise NotInSource(f"{module}.{name}")


def _absolute(module: str, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    path = _source(module)
    package = module.split(".")
    up = statement.level - (1 if path and path.name == "__init__.py" else 0)
    base = package[: len(package) - up]
    return ".".join([*base, *([statement.module] if statement.module else [])])


def resolve(expression: ast.expr, module: str) -> Definition:
    match expression:
        case ast.Name(id=name):
            return _lookup(module, name, ())
        case ast.Attribute(value=value, attr=name):
            owner = resolve(value, module)
            if owner.name:
                raise NotInSource(name)
            return _member(owner.module, name, ())
        case ast.Subscript(value=value):  # Generic[T] as a base class
            return resolve(value, module)
    raise NotInSource(ast.dump(expression))


def load(target: str) -> Any:
    """Import the object with the dotted name `target`; ImportError, in one line, if that fails."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        try:
            found = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # what a module's author did on its top level
            absent = error.name if isinstance(error, ModuleNotFoundError) else None
            if absent and (module == absent or module.startswith(f"{absent}.")):
                continue
            said = " ".join(str(error).split())
            place = _place(error, parts[0])
            raise ImportError(f"{place} raises {type(error).__name__}: {said}") from error
        for name in parts[cut:]:
            if not hasattr(found, name):
                near = difflib.get_close_matches(name, dir(found), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                file = getattr(found, "__file__", None)
                raise ImportError(f"{module}{f' ({file})' if file else ''} has no {name!r}{hint}")
            found = getattr(found, name)
        return found
    own = [path for path in sys.path if not path.startswith((sys.prefix, sys.base_prefix))]
    places = ", ".join(dict.fromkeys(os.path.abspath(path) for path in own if path != sys.argv[0]))
    raise ImportError(
        f"there is no module {parts[0]!r} among the installed packages, nor in {places}; to look "
        "in other folders, set PYTHONPATH=<folder>"
    )


def _place(error: BaseException, package: str) -> str:
    """The file and line of an error that a package raised while it was imported."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    source = _source(package)
    home = str(source.parent if source and source.name == "__init__.py" else source)
    own = [f for f in frames if f.filename.startswith(home)] or frames
    return f"{own[-1].filename}:{own[-1].lineno}"
