"""The signature of a class, read from its source and not by importing it.

A mistyped option is to be answered in a moment, and importing torch takes seconds. So names are
followed through the source files as Python itself would (imports, re-exports, base classes), and
annotations become types that pydantic can check plain data against. Where the source doesn't tell
(compiled or generated code), the object is imported and inspected.
"""

import ast
import builtins
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, Union

from cnntrain.config.source import REAL_MODULES, Definition, NotInSource, load, locate, resolve

OPAQUE: Any = object()  # a type that no plain value in a YAML file can have: a Tensor, a Module

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Signature:
    """What a call accepts by keyword: names in `types`, or any if it is `open`.

    A name's type is worked out when it is called for: that may lead through many source files, and
    a config names only some of the parameters. It is Any where the source doesn't tell.
    """

    types: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    open: bool = False


def signature(target: str) -> Signature:
    """Signature of the class or function with the dotted name `target`.

    Raises ImportError if there is no such module or name.
    """
    try:
        return _signature(locate(target))
    except (NotInSource, RecursionError):
        return _inspect(load(target))


def is_subclass(target: str, kind: str) -> bool:
    """Whether `target` names the class `kind` or one derived from it. ImportError as above."""
    try:
        wanted = locate(kind)
        definition = locate(target)
        if isinstance(definition.node, ast.expr):  # made by a call
            raise NotInSource(target)
        return isinstance(definition.node, ast.ClassDef) and _derives(definition, wanted)
    except (NotInSource, RecursionError):  # a class that is derived from itself
        found = load(target)
        return isinstance(found, type) and issubclass(found, load(kind))


def _bases(definition: Definition) -> Iterator[Definition | None]:
    """The classes that a class is derived from; None for one whose source isn't found."""
    for base in definition.node.bases:
        if ast.unparse(base) == "object":
            continue
        try:
            found = resolve(base, definition.module)
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
    found = {a.arg: partial(_annotated, a.annotation, module) for a in names}
    return Signature(found, arguments.kwarg is not None)


def _inspect(found: Any) -> Signature:
    """Signature of an imported object, for what the source does not tell."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return Signature(open=True)
    types_by_name = {
        p.name: partial(_inspected, p.annotation)
        for p in parameters
        if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
    }
    return Signature(types_by_name, any(p.kind is p.VAR_KEYWORD for p in parameters))


def _inspected(annotation: Any) -> Any:
    known = isinstance(annotation, (type, types.UnionType))
    return annotation if known and annotation is not inspect.Parameter.empty else Any


def _annotated(annotation: ast.expr | None, module: str) -> Any:
    return _plain(_type(annotation, module)) if annotation else Any


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
                definition = resolve(expression, module)
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
    if Iterable in (
        generic,
        typing.get_origin(generic),
    ):  # which pydantic would look into only when used
        generic = list
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
