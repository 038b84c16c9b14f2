"""Signatures of configured classes: the parameters and types that a config is checked against."""

import collections.abc
import difflib
import importlib
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Signature:
    """Parameters that a call accepts by keyword, with their types; any others too if `open`."""

    types: Mapping[str, Any] = field(default_factory=dict)
    open: bool = False


@cache
def signature(target: str) -> Signature:
    """The signature of the class or function with the dotted name `target`, which is imported.

    `**kwargs` of a constructor stands for what the base class accepts, and then the class that the
    attribute `kwargs_class` names, if there is one.

    Raises:
        ImportError: There is no such module or name, or its import fails.
    """
    found = load(target)
    if not isinstance(found, type):
        return _of(found)
    parameters: dict[str, Any] = {}
    for cls in (*found.__mro__[:-1], getattr(found, "kwargs_class", object)):
        if "__init__" in vars(cls):
            own = _of(vars(cls)["__init__"], skip=1)
            parameters = {**own.types, **parameters}
            if not own.open:
                return Signature(parameters)
    return Signature(parameters, open=True) if parameters else _of(found)


def is_subclass(target: str, kind: str) -> bool:
    """Whether `target` names the class `kind` or one derived from it. ImportError as above."""
    found = load(target)
    return isinstance(found, type) and issubclass(found, load(kind))


def _of(call: Any, skip: int = 0) -> Signature:
    try:
        parameters = [*inspect.signature(call).parameters.values()][skip:]
    except (TypeError, ValueError):  # compiled, without a signature
        return Signature(open=True)
    names = {**vars(collections.abc), **getattr(inspect.unwrap(call), "__globals__", {})}
    try:  # names of collections.abc are often imported for type checkers only
        hints = typing.get_type_hints(call, names, include_extras=True)
    except Exception:  # another such name: the types are not checked
        hints = {}
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    kinds = {p.name: hints.get(p.name, Any) for p in named}
    return Signature(kinds, any(p.kind is p.VAR_KEYWORD for p in parameters))


def plain(kind: Any) -> Any:
    """A type without the parts that no plain value can be of, such as Tensor; Any if all are."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        parts = [part for part in map(plain, arguments) if part is not Any]
        known = Any not in arguments and not set(parts) <= {type(None)}
        return typing.Union[tuple(parts)] if known else Any  # noqa: UP007
    if origin in (list, tuple, dict, Iterable):  # pydantic looks into an Iterable only when used
        inner = tuple(part if part is ... else plain(part) for part in arguments)
        return (list if origin is Iterable else origin)[inner]
    from pydantic import PydanticUserError, TypeAdapter

    try:
        TypeAdapter(kind, config={})
        return kind
    except PydanticUserError:
        return Any


def load(target: str) -> Any:
    """Import the object with the dotted name `target`; ImportError, in one line, if that fails."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        try:
            found = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # what a module's author did on its top level
            absent = error.name if isinstance(error, ModuleNotFoundError) else None
            if absent and f"{module}.".startswith(f"{absent}."):
                continue
            message = f"raises {type(error).__name__}: {' '.join(str(error).split())}"
            raise ImportError(f"{_origin(error)} {message}") from error
        for name in parts[cut:]:
            if not hasattr(found, name):
                near = difflib.get_close_matches(name, dir(found), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ImportError(f"{getattr(found, '__file__', module)} has no {name!r}{hint}")
            found = getattr(found, name)
        return found
    raise ImportError(
        f"there is no module {parts[0]!r} in the current folder, PYTHONPATH or what is installed"
    )


def _origin(error: BaseException) -> str:
    """The file and line of an error in an import, outside of the installed packages if possible."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)[1:]
    installed = (sys.prefix, sys.base_prefix, "<frozen")
    own = [frame for frame in frames if not frame.filename.startswith(installed)]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"
