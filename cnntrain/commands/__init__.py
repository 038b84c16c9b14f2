"""Command line. Imports torch only where it is needed."""

import difflib
import pkgutil
import sys

import cnntrain
from cnntrain.interruption import watching
from cnntrain.terminal import safe_streams

COMMANDS = {
    "train": "train a network from a config",
    "verify": "check a backend against reference implementations",
    "benchmark": "time backends on the layers of a model",
    "evaluate": "evaluate a trained network on the test set, on any backend",
    "predict": "classify images of any size with a trained network",
    "export": "export a trained network as ONNX or with torch.export",
    "lesson": "explain convolution in numbers and pictures",
    "data": "inspect a data set before training",
    "report": "rank the runs of a sweep or folder: table and HTML page",
}
ON_FINISHED_RUNS = ("evaluate", "predict", "export")


def main(command: str | None = None) -> None:
    """`cnntrain COMMAND ...`, the console script; `python train.py ...` with `command` given.

    A closed pipe (`| head`) does not change the exit code.
    """
    with watching("leave"), safe_streams():  # also while what the command needs is imported
        if command is None:
            command = sys.argv[1] if len(sys.argv) > 1 else "--help"
            sys.argv[:2] = [f"cnntrain {command}"]
        if command in ("--version", "version") or "--version" in sys.argv[1:]:
            print(f"cnntrain {cnntrain.__version__}")
        elif command in COMMANDS:
            entry = f"finished_run:{command}" if command in ON_FINISHED_RUNS else f"{command}:main"
            pkgutil.resolve_name(f"cnntrain.commands.{entry}")()
        elif command in ("--help", "-h", "help"):
            print("cnntrain COMMAND [...]      (cnntrain COMMAND --help shows its options)\n")
            for name, purpose in COMMANDS.items():
                print(f"  {name:12}{purpose}")
        else:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there is: {', '.join(COMMANDS)}"
            print(f"cnntrain: no command {command!r}; {hint}", file=sys.stderr)
            sys.exit(2)
