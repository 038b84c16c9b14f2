"""Run the tests with the lowest and the newest versions that pyproject.toml allows.

    python scripts/test_versions.py lowest newest -- tests/conv tests/config

Makes a virtual environment for each below the system's temporary folder (5 GB, minutes) and prints
a row of docs/support.md. What follows `--` is passed to pytest; without it all tests are run.
"""

import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = ["torch", "torchvision", "lightning", "hydra-core", "tensorboard", "optuna", "numpy"]


def lowest() -> str:
    """The lower bounds of the dependencies and of Optuna as pip constraints."""
    text = (ROOT / "pyproject.toml").read_text()
    dependencies = text.partition("dependencies = [")[2].partition("\n]")[0]
    optuna = re.search(r'"optuna>=[^"]*"', text)
    found = re.findall(r'"([\w-]+)>=([\d.]+)', dependencies + (optuna.group() if optuna else ""))
    return "\n".join(f"{name}=={version}" for name, version in found)


def row(name: str, pytest_arguments: list[str]) -> str:
    """Install, run the tests, and return the row of the support table."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        python = str(Path(folder) / "venv/bin/python")
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(lowest() if name == "lowest" else "")
        install = [python, "-m", "pip", "install", "--quiet", "-c", str(constraints)]
        subprocess.run([*install, "-e", f"{ROOT}[dev]"], check=True)
        listed = subprocess.check_output([python, "-m", "pip", "freeze"], text=True)
        versions = dict(line.split("==") for line in listed.splitlines() if "==" in line)
        tests = [python, "-m", "pytest", *pytest_arguments]
        done = subprocess.run(tests, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout[-3000:], file=sys.stderr)
        cells = [name, platform.python_version(), *(versions[p] for p in SHOWN)]
        return f"| {' | '.join([*cells, done.stdout.strip().splitlines()[-1]])} |"


def main() -> None:
    names, _, pytest_arguments = " ".join(sys.argv[1:]).partition(" -- ")
    print(f"| versions | Python | {' | '.join(SHOWN)} | pytest |")
    print("|" + " --- |" * (len(SHOWN) + 3))
    for name in names.split():
        print(row(name, pytest_arguments.split()), flush=True)


if __name__ == "__main__":
    main()
