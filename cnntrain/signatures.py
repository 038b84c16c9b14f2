"""The signature of a class, read from its source and not by importing it.

A mistyped option is to be answered in a moment, and importing torch takes seconds. So names are
followed through the source files as Python itself would (imports, re-exports, base classes), and
annotations become types that pydantic can check plain data against. Where the source doesn't tell
(compiled or generated code), the object is imported and inspected.
"""

import ast
import builtins
import importlib
import importlib.util
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeAlias, Union

OPAQUE: Any = object()  # a type that no plain value in a YAML file can have: a Tensor, a Module
REAL_MODULES = {"typing", "typing_extensions", "collections.abc", "pydantic", "pathlib"}

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Signature:
    """What a call accepts by keyword: `types` by name (Any where unknown); `open` if any name."""

    types: dict[str, Any] = field(default_factory=dict)
    open: bool = False


@dataclass(frozen=True)
class Definition:
    """Where a name is defined: its module, and its node there (None: the module itself)."""

    module: str
    name: str
    node: Any = field(compare=False, default=None)


class NotInSource(LookupError):
    """The source files don't tell what a name is."""


def signature(target: str) -> Signature:
    """Signature of the class or function with the dotted name `target`.

    Raises ImportError if there is no such module or name.
    """
    try:
        return _signature(_locate(target))
    except NotInSource:
        return _inspect(load(target))


def is_subclass(target: str, kind: str) -> bool:
    """Whether `target` names the class `kind` or one derived from it. ImportError as above."""
    try:
        wanted = _locate(kind)
        definition = _locate(target)
        return isinstance(definition.node, ast.ClassDef) and _derives(definition, wanted)
    except NotInSource:
        found = load(target)
        return isinstance(found, type) and issubclass(found, load(kind))


def load(target: str) -> Any:
    """Import the object with the dotted name `target`; ImportError if there is none."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(error.name + ".")):
                continue
            raise
        for name in parts[cut:]:
            if not hasattr(found, name):
                raise ImportError(f"{module} has no {name!r}")
            found = getattr(found, name)
        return found
    raise ImportError(f"there is no module {parts[0]!r}")


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


def _locate(target: str) -> Definition:
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


def _resolve(expression: ast.expr, module: str) -> Definition:
    match expression:
        case ast.Name(id=name):
            return _lookup(module, name, ())
        case ast.Attribute(value=value, attr=name):
            owner = _resolve(value, module)
            if owner.name:
                raise NotInSource(name)
            return _member(owner.module, name, ())
        case ast.Subscript(value=value):  # Generic[T] as a base class
            return _resolve(value, module)
    raise NotInSource(ast.dump(expression))


def _bases(definition: Definition) -> Iterator[Definition | None]:
    """The classes that a class is derived from; None for one whose source isn't found."""
    for base in definition.node.bases:
        if ast.unparse(base) == "object":
            continue
        try:
            found = _resolve(base, definition.module)
            yield found if isinstance(found.node, ast.ClassDef) else None
        except NotInSource:
            yield None


def _derives(definition: Definition, wanted: Definition) -> bool:
    if definition == wanted:
        return True
    bases = list(_bases(definition))
    if any(_derives(base, wanted) for base in bases if base):
        return True
    if None in bases:
        raise NotInSource(definition.name)
    return False


def _signature(definition: Definition) -> Signature:
    node = definition.node
    if isinstance(node, Function):
        return _parameters(node, definition.module)
    if not isinstance(node, ast.ClassDef):
        raise NotInSource(definition.name)
    own = [f for f in node.body if isinstance(f, Function) and f.name == "__init__"]
    if not own and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        raise NotInSource(definition.name)
    inherited = Signature()
    if not own or own[-1].args.kwarg:
        # **kwargs is taken as "whatever the base class accepts", which is what it is there for.
        base = next(_bases(definition), Definition("", ""))
        if base is None:
            raise NotInSource(definition.name)
        inherited = _signature(base) if base.node else inherited
    if not own:
        return inherited
    parameters = _parameters(own[-1], definition.module)
    is_open = parameters.open and (inherited.open or not inherited.types)
    return Signature({**inherited.types, **parameters.types}, is_open)


def _parameters(function: Any, module: str) -> Signature:
    arguments = function.args
    names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    if names and names[0].arg in ("self", "cls"):
        names = names[1:]
    found = {a.arg: _plain(_type(a.annotation, module) if a.annotation else Any) for a in names}
    return Signature(found, arguments.kwarg is not None)


def _inspect(found: Any) -> Signature:
    """Signature of an imported object, for what the source does not tell."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return Signature(open=True)
    types_by_name = {
        p.name: p.annotation if isinstance(p.annotation, (type, types.UnionType)) else Any
        for p in parameters
        if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
    }
    types_by_name = {
        n: Any if t is inspect.Parameter.empty else t for n, t in types_by_name.items()
    }
    return Signature(types_by_name, any(p.kind is p.VAR_KEYWORD for p in parameters))


def _plain(kind: Any) -> Any:
    return Any if kind is OPAQUE else kind


def _type(expression: ast.expr, module: str) -> Any:
    """The type that an annotation means: OPAQUE for a class that no YAML value can be, Any if the
    source doesn't tell."""
    try:
        match expression:
            case ast.Constant(value=None):
                return None
            case ast.Constant(value=str(text)):
                return _type(ast.parse(text, mode="eval").body, module)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return _union([_type(left, module), _type(right, module)])
            case ast.Subscript(value=value, slice=inner):
                return _generic(_type(value, module), inner, module)
            case ast.Name(id=name) if hasattr(builtins, name):
                return getattr(builtins, name)
            case ast.Name() | ast.Attribute():
                definition = _resolve(expression, module)
                if definition.module in REAL_MODULES and definition.name:
                    return getattr(importlib.import_module(definition.module), definition.name)
                if isinstance(definition.node, ast.expr):
                    return _type(definition.node, definition.module)
                if isinstance(definition.node, ast.ClassDef):
                    return OPAQUE
    except (NotInSource, SyntaxError, AttributeError, TypeError):
        pass
    return Any


def _generic(generic: Any, inner: ast.expr, module: str) -> Any:
    items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if generic is typing.Literal:
        return generic[tuple(ast.literal_eval(item) for item in items)]
    if generic is typing.Annotated:
        kind = _type(items[0], module)
        marks = [mark for item in items[1:] if (mark := _mark(item, module)) is not None]
        return kind if kind in (OPAQUE, Any) else generic[(kind, *marks)]
    kinds = [... if ast.unparse(item) == "..." else _type(item, module) for item in items]
    if generic in (typing.Union, typing.Optional):
        return _union([*kinds, None] if generic is typing.Optional else kinds)
    if generic in (OPAQUE, Any):
        return generic
    return generic[tuple(_plain(kind) for kind in kinds)]


def _mark(item: ast.expr, module: str) -> Any:
    """A constraint such as Field(ge=0, le=1) in an Annotated type."""
    if not isinstance(item, ast.Call):
        return None
    call = _type(item.func, module)
    return call(**{k.arg: ast.literal_eval(k.value) for k in item.keywords if k.arg})


def _union(kinds: list[Any]) -> Any:
    if Any in kinds:
        return Any
    known = [kind for kind in kinds if kind is not OPAQUE]
    return Union[tuple(known)] if known and known != [None] else OPAQUE  # noqa: UP007
