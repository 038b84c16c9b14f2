"""`cnntrain lesson`: what a convolution is, in numbers and a picture."""

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

import yaml

from cnntrain.commands.app import exit_with_problems, short
from cnntrain.commands.finished import telling_errors
from cnntrain.config import ConfigError, folder_problem
from cnntrain.config.checks import mismatch
from cnntrain.config.errors import format_value, unknown
from cnntrain.config.signatures import signature

LESSONS = {
    "patterns": "a kernel finds what looks like it",
    "activations": "relu, leaky_relu, sigmoid, tanh and their derivatives",
    "window": "every number of an im2col, for a convolution of your own",
    "cost": "the MACs of a model's layers, and the time that they take",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "--help", "-h"):
        print(
            "cnntrain lesson NAME [option=value ...]     (cnntrain lesson NAME --help tells more)\n"
        )
        for lesson, what in LESSONS.items():
            print(f"  {lesson:14}{what}")
        sys.exit(0 if name else 2)
    try:
        if name not in LESSONS:
            raise ConfigError([f"{name}: {unknown('there is', 'lesson', name, [*LESSONS])}"])
        if {"--help", "-h"} & set(sys.argv[2:]):
            _help(name)
            return
        out, options = _parsed(name, sys.argv[2:])
        _teach(name, out, options)
    except ConfigError as error:
        exit_with_problems(error)


def _teach(name: str, out: Path, options: dict[str, Any]) -> None:
    from cnntrain.lab import lessons

    lesson = getattr(lessons, name)(**options)
    print(lesson.text)
    file = out / f"{name}.png"
    with telling_errors():
        lesson.write(file)
    print(f"\n{short(file)}")


def _source(name: str) -> ast.FunctionDef:
    """A lesson's function, from its source: importing it imports torch."""
    file = Path(__file__).parents[1] / "lab" / "lessons" / f"{name}.py"
    functions = [n for n in ast.parse(file.read_bytes()).body if isinstance(n, ast.FunctionDef)]
    return next(function for function in functions if function.name == name)


def _help(name: str) -> None:
    function = _source(name)
    given = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    options = [
        f"{arg.arg}={format_value(ast.literal_eval(default))}" for arg, default in given if default
    ]
    print(f"cnntrain lesson {name} [option=value ...]\n")
    print(inspect.cleandoc(ast.get_docstring(function) or ""))
    print("\nOptions as they stand now: " + " ".join([*options, "out=outputs/lessons"]))


def _parsed(name: str, arguments: list[str]) -> tuple[Path, dict[str, Any]]:
    """The folder for the picture, and the options; ConfigError with all that is wrong."""
    known = [*(argument.arg for argument in _source(name).args.kwonlyargs), "out"]
    options: dict[str, Any] = {}
    problems = []
    for text in arguments:
        option, equals, value = text.partition("=")
        if text.startswith("-"):
            problems.append(f"{text}: options have no dashes: option=value")
        elif not equals and option in known:
            problems.append(f"{text}: has to be given a value: {text}=...")
        elif option not in known:
            problems.append(f"{text}: {unknown(f'{name} has', 'option', option, known)}")
        elif option == "out":
            options["out"] = value
            problems += [problem] if (problem := folder_problem(value, "out")) else []
        else:
            try:
                options[option] = yaml.safe_load(value)
            except yaml.YAMLError:
                options[option] = value
    types = {} if problems else signature(f"cnntrain.lab.lessons.{name}.{name}").types
    for option, kind in types.items():
        if option in options and (wrong := mismatch(kind, options[option])):
            problems.append(f"{option}={format_value(options[option])}: {wrong}")
    if problems:
        raise ConfigError(problems)
    return Path(options.pop("out", "outputs/lessons")), options
