"""The command line: one file per command. Nothing here imports torch before it is needed."""

import difflib
import importlib
import os
import sys

import cnntrain
from cnntrain.interruption import watching
from cnntrain.terminal import safe_streams

COMMANDS = {
    "train": "train a network from a config",
    "verify": "prove that a backend is a convolution, check by check",
    "benchmark": "time backends side by side on the layers of a model",
    "evaluate": "say how good a trained network is, on any backend",
    "predict": "say what is on pictures of any size",
    "export": "write a trained network as ONNX or as a program of torch.export",
    "lesson": "show what a convolution is, in numbers and pictures",
    "report": "rank the runs of a sweep or a folder: table, page with pictures",
}


def main(command: str | None = None) -> None:
    """`cnntrain COMMAND ...`, the console script; `python train.py ...` with `command` given.

    A closed pipe (`| head`) changes neither what a command does nor its exit code.
    """
    use_utf8_file_names()
    with watching("leave"), safe_streams():  # also while what the command needs is imported
        _main(command)


def _main(command: str | None) -> None:
    if command is None:
        command = sys.argv[1] if len(sys.argv) > 1 else "--help"
        sys.argv[:2] = [f"cnntrain {command}"]
    if command in ("--version", "version") or "--version" in sys.argv[1:]:
        print(f"cnntrain {cnntrain.__version__}")
    elif command in COMMANDS:
        importlib.import_module(f"cnntrain.commands.{command}").main()
    elif command in ("--help", "-h", "help"):
        print("cnntrain COMMAND [...]      (cnntrain COMMAND --help tells more)\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:12}{purpose}")
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is: {', '.join(COMMANDS)}"
        print(f"cnntrain: no command {command!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def use_utf8_file_names() -> None:
    """Restart Python in its UTF-8 mode where it reads file names in an encoding that they are not
    in: ASCII (LC_ALL=C with PYTHONUTF8=0), or one that the command line is not valid in.

    The standard streams keep the encoding of the locale.
    """
    encoding = sys.getfilesystemencoding()
    invalid = any("\ud800" <= character <= "\udfff" for text in sys.argv for character in text)
    if encoding == "ascii" or (invalid and encoding != "utf-8"):
        streams = getattr(sys.stdout, "encoding", None) or encoding
        os.environ.setdefault("PYTHONIOENCODING", f"{streams}:backslashreplace")
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
