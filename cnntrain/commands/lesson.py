"""`cnntrain lesson`: lessons on convolutions, printed and drawn."""

import ast
import contextlib
import inspect
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from cnntrain.commands.app import exit_with_problems, short
from cnntrain.commands.finished_run import report_errors
from cnntrain.config import ConfigError, Root, check, folder_problem
from cnntrain.config.errors import format_value, unknown

LESSONS = {
    "patterns": "a kernel responds to patterns that look like it",
    "activations": "relu, leaky_relu, sigmoid, tanh and their derivatives",
    "window": "every number of an im2col, for a convolution of your own",
    "cost": "MACs and time of each layer of a model",
}
USAGE = "cnntrain lesson NAME [option=value ...]     (options: cnntrain lesson NAME --help)\n"


def main() -> None:
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in ("", "--help", "-h"):
        print(USAGE, *(f"  {lesson:14}{what}" for lesson, what in LESSONS.items()), sep="\n")
        sys.exit(0 if name else 2)
    try:
        if name not in LESSONS:
            raise ConfigError([f"{name}: {unknown('there is', 'lesson', name, [*LESSONS])}"])
        if {"--help", "-h"} & {*arguments}:
            _print_help(name)
            return
        out, options = _parse(name, arguments)
        from cnntrain.lab import lessons

        lesson = getattr(lessons, name)(**options)
        print(lesson.text)
        with report_errors():
            lesson.write(out / f"{name}.png")
        print(f"\n{short(out / f'{name}.png')}")
    except ConfigError as error:
        exit_with_problems(error)


def _definition(name: str) -> ast.FunctionDef:
    """A lesson's function, parsed from its source, as importing it would import torch."""
    files = (Path(__file__).parents[1] / "lab/lessons").glob("*.py")
    statements = (node for file in files for node in ast.parse(file.read_bytes()).body)
    functions = (node for node in statements if isinstance(node, ast.FunctionDef))
    return next(function for function in functions if function.name == name)


def _print_help(name: str) -> None:
    function = _definition(name)
    parameters = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    options = [f"{p.arg}={format_value(ast.literal_eval(d))}" for p, d in parameters if d]
    print(f"cnntrain lesson {name} [option=value ...]\n")
    print(inspect.cleandoc(ast.get_docstring(function) or ""))
    print("\nOptions and their defaults: " + " ".join([*options, "out=outputs/lessons"]))


def _parse(name: str, arguments: list[str]) -> tuple[Path, dict[str, Any]]:
    """The folder for the picture, and the options; ConfigError with all problems found."""
    known = [*(argument.arg for argument in _definition(name).args.kwonlyargs), "out"]
    options: dict[str, Any] = {}
    problems = []
    for text in arguments:
        option, equals, value = text.partition("=")
        if text.startswith("-"):
            problems.append(f"{text}: options have no dashes: option=value")
        elif option not in known:
            problems.append(f"{text}: {unknown(f'{name} has', 'option', option, known)}")
        elif not equals:
            problems.append(f"{text}: has no value: {text}=...")
        elif option == "out":
            options["out"] = value
            problems += [problem] if (problem := folder_problem(value, "out")) else []
        else:
            options[option] = value
            with contextlib.suppress(yaml.YAMLError):
                options[option] = yaml.safe_load(value)
    out = Path(options.pop("out", "outputs/lessons"))
    target = f"cnntrain.lab.lessons.{name}"
    if problems := problems or check(OmegaConf.create(options), Root([], target)):
        raise ConfigError(problems)
    return out, options
