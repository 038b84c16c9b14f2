"""Robustness test: train on damaged or odd image folders and CSV files.

    python scripts/damaged_images.py --cases 200
    python scripts/damaged_images.py --only 17        # repeat one case

Each case is trained on with data.on_error=stop and with skip. A problem is a traceback, a run that
does not end, an image that is used although Pillow cannot decode it, or an image that is neither
used nor named in the output of the run. The exit code is 1 if there is any; their folders are kept.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's other threads

import numpy as np
from PIL import Image
from torturing.corruptions import CONTENT
from torturing.runs import finish, launch

from cnntrain.config import compose
from cnntrain.data.decoded import DecodedData
from cnntrain.terminal import printable
from cnntrain.training import dry_run

OPTIONS = [
    *("data=image_folder", "data.batch_size=4", "data.size=12", "data.color=rgb", "model=shallow"),
    *("trainer=cpu", "trainer.max_epochs=1", "trainer.progress_bar=false", "tensorboard=scalars"),
]
KINDS = ("png", "jpg", "bmp", "gif", "tiff", "webp", "ppm")
PER_CLASS = 7


class Case:
    """A folder of images that is damaged.

    Attributes:
        root: What is trained on.
        expected: Label of each image that a user would expect to be used, by its path.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder / "photos", rng
        self.root = self.folder
        self.expected: dict[Path, str] = {}
        prefixes = rng.choice([[""], [""], ["train/"], ["train/", "val/", "test/"]])
        for prefix in prefixes:
            for label in ("ant", "bee"):
                for i in range(PER_CLASS):
                    self.add(f"{prefix}{label}/{i}.{rng.choice(KINDS)}", label)

    def add(self, name: str, label: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.frombuffer(self.rng.randbytes(12 * 14 * 3), np.uint8).reshape(12, 14, 3)
        kind = path.suffix[1:].lower() if path.suffix[1:].lower() in KINDS else "png"
        Image.fromarray(pixels).save(path, {"jpg": "JPEG", "tiff": "TIFF"}.get(kind, kind))
        self.expected[path] = label
        return path

    def some(self) -> Path:
        return self.rng.choice(sorted(self.expected))

    def rename(self, path: Path, name: str) -> Path:
        target = path.with_name(name)
        path.rename(target)
        self.expected[target] = self.expected.pop(path)
        return target


def content(case: Case) -> None:
    for _ in range(case.rng.choice([1, 1, 3])):
        path = case.some()
        path.write_bytes(case.rng.choice([*CONTENT.values()])(path.read_bytes(), case.rng))


def class_damaged(case: Case) -> None:
    for path, label in case.expected.items():
        if label == "bee":
            path.write_bytes(path.read_bytes()[:20])


def replaced(case: Case) -> None:
    path = case.some()
    path.unlink()
    kind = case.rng.choice(["folder", "pipe", "broken", "loop", "device", "text", "other suffix"])
    if kind == "folder":
        path.mkdir()
        del case.expected[path]
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "text":
        path.write_text(case.rng.choice(["", "text", "<svg/>", "%!PS-Adobe-3.0 EPSF-3.0\n"]))
    elif kind == "other suffix":
        Image.new("RGB", (20, 30)).save(path, case.rng.choice(["PNG", "JPEG", "GIF"]))
    else:
        path.symlink_to({"broken": "none", "loop": path.name, "device": "/dev/zero"}[kind])


def unusual(case: Case) -> None:
    """Pictures of another size or mode."""
    path, rng = case.some(), case.rng
    kind = rng.choice(["wide", "bomb", "I", "F", "I;16", "1", "LA", "P", "CMYK", "tiny"])
    if kind in ("wide", "bomb", "tiny"):
        size = {"wide": (100_000, 2), "bomb": (20_000, 20_000), "tiny": (1, 1)}[kind]
        Image.new("1", size).save(path, "PNG")
    else:
        Image.new(kind, (15, 12)).save(path, "PNG" if kind in ("LA", "P") else "TIFF")


def file_name(case: Case) -> None:
    path = case.some()
    odd = [
        "a\nb",
        "\udcff\udce9",
        "é" * 60,
        "日本",
        "a,b",
        " ",
        "%s {0}",
        "${x}",
        "-x",
        "\u202e",
        "'",
    ]
    suffix = case.rng.choice([path.suffix, path.suffix.upper(), "", ".txt", ".jpg.bak"])
    case.rename(path, case.rng.choice(odd) + suffix)


def class_name(case: Case) -> None:
    odd = ["???", "${x}", "null", "1e3", "01", "日本", "\udce9", "a\nb", "x" * 200, "'\"", "{a: b}"]
    odd += ["cafe\u0301", " ", "-", "*", "train", "\u200cها", "[1]", "<b>", "~", "a=b", "a/b"]
    for name in case.rng.sample(odd, 2):
        for i in range(PER_CLASS):
            case.add(f"{name}/{i}.png", name)


def hidden(case: Case) -> None:
    for name in (".hidden.png", "ant/.hidden.png", ".git/ant/1.png", "__MACOSX/ant/._1.png"):
        del case.expected[case.add(name, "")]
    (case.folder / "ant").mkdir(exist_ok=True)
    (case.folder / "Thumbs.db").write_bytes(b"x")


def tree(case: Case) -> None:
    kind = case.rng.choice(["loose", "empty", "nested", "up", "twice", "one", "few", "stray part"])
    first = case.some().parent
    if kind == "loose":
        case.add("loose.png", "?")
    elif kind == "empty":
        (first.parent / "fly").mkdir()
    elif kind == "nested":
        path = case.add(f"{first.relative_to(case.folder)}/a/b/c/d.png", first.name)
        case.expected[path] = first.name
    elif kind == "up":
        (first / "up").symlink_to(case.rng.choice([case.folder, first, Path("/"), first.parent]))
    elif kind == "twice":
        (first.parent / "fly").symlink_to(first)
    elif kind == "stray part":
        case.add(case.rng.choice(["val/1.png", "test/ant/1.png", "old/1.png"]), "?")
    else:
        for path in [p for p, label in case.expected.items() if label == "bee" or kind == "few"]:
            if kind == "one" or case.rng.random() < 0.9:
                path.unlink()
                del case.expected[path]


def csv_file(case: Case) -> None:
    """A CSV file of the images, with some damage."""
    case.root, rng = case.folder / "list.csv", case.rng
    rows = [[str(p.relative_to(case.folder)), label] for p, label in case.expected.items()]
    separator = rng.choice([",", ",", ";", "\t"])
    row = rng.choice(rows)
    kind = rng.randrange(12)
    if kind == 0:
        rows.append(row)
    elif kind == 1:
        rows.append([row[0], "other"])
    elif kind == 2:
        row[1] = rng.choice(["", "a,b;c\td", '"', "'", "a b", "01", "null", '"two\nlines"'])
        case.expected[case.folder / row[0]] = row[1].strip('"') if "\n" in row[1] else row[1]
    elif kind == 3:
        del case.expected[case.folder / row[0]]
        row[0] = rng.choice(["none.png", "", "ant", "\0", "x" * 300, "//", "~"])
    elif kind == 4:
        row[0] = str(case.folder / row[0])
    elif kind == 5:
        row[0] = row[0].replace("/", "\\")
    elif kind == 6:
        row.append("extra")
    elif kind == 7:
        row.pop()
    lines = [separator.join(cells) for cells in [["path", "label"], *rows]]
    text = rng.choice(["\n", "\n", "\r\n", "\r"]).join(lines)
    encoded = text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    if kind == 8:
        encoded = rng.choice([*CONTENT.values()])(encoded, rng)
    case.root.write_bytes(b"" if kind == 9 else encoded)
    if kind == 8:  # what a row was cannot be known
        case.expected.clear()


def root(case: Case) -> None:
    case.root = case.folder / case.rng.choice(
        ["none", str(case.some()), "../photos", "pipe.csv", "."]
    )
    if case.root.name == "pipe.csv":
        os.mkfifo(case.root)


DAMAGES: list[Callable[[Case], None]] = [
    *(content, content, content, class_damaged, replaced, replaced, unusual, file_name),
    *(class_name, hidden, tree, tree, csv_file, csv_file, csv_file, root),
]


# With skip, a run of the other cases must not be rejected.
MAY_BE_REJECTED = {class_damaged, class_name, tree, csv_file, root}


def decodable(path: Path) -> bool:
    """Whether Pillow decodes the whole image, not reduced."""
    if not path.is_file():
        return False
    try:
        with Image.open(
            path, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
        ) as image:
            image.load()
            return image.mode not in ("I", "F") or image.format == "PPM"
    except Exception:
        return False


def normal(label: str) -> str:
    """A label as the class is named: NFC, and without invalid characters."""
    return unicodedata.normalize("NFC", label).encode(errors="backslashreplace").decode()


def note_images(file: Path) -> None:
    """Let this process write the images that it uses to a file."""
    prepare = DecodedData.prepare

    def prepare_and_note(self: DecodedData) -> None:
        prepare(self)
        used = {
            str((self.root if self.root.is_dir() else self.root.parent) / self.listed[row].name): (
                self.classes[self.labels[row]]
            )
            for rows in self.rows.values()
            for row in rows
        }
        file.write_text(json.dumps(used))

    DecodedData.prepare = prepare_and_note  # type: ignore[method-assign]


def judge(
    code: int | None,
    text: str,
    used: dict[str, str],
    expected: dict[Path, str],
    *,
    stop: bool = False,
    reject: bool = False,
) -> tuple[str, str]:
    """Outcome and problem (or empty) of a training with this exit code and output.

    Args:
        used: Label of each image that it has used, by its path.
        expected: Likewise, of those that it should; empty if this is not known.
        stop: Whether it has to stop if one of these is damaged.
        reject: Whether it may be rejected for other reasons.
    """
    if code is None:
        return "FAILED", "does not end"
    if "Traceback" in text or "Error:" in text:
        return "FAILED", f"a traceback\n{text}"
    names = {os.path.realpath(path): printable(path.name) for path in expected}
    damaged = {os.path.realpath(path) for path in expected if not decodable(path)}
    if code in (1, 2):
        if not (reject or (stop and damaged) or "photos: has no" in text):
            return "FAILED", f"rejected without a reason\n{text}"
        lines = [line for line in text.splitlines() if "photos" in line or "data." in line]
        return ("rejected", "") if lines else ("FAILED", f"nothing named\n{text}")
    if code:
        return "FAILED", f"exit code {code}\n{text}"
    if not expected:
        return "trained", ""
    found = {os.path.realpath(path) for path in used}
    if wrong := found & damaged:
        return "FAILED", f"trained on {wrong}\n{text}"
    if damaged and stop:
        return "FAILED", f"not stopped by {damaged}\n{text}"
    if lost := {path for path in names.keys() - found if names[path] not in text}:
        return "FAILED", f"silently lost {lost}\n{text}"
    if other := found - names.keys():
        return "FAILED", f"unexpected {other}\n{text}"
    labels = {os.path.realpath(path): normal(label) for path, label in expected.items()}
    if wrong := {path for path, label in used.items() if label != labels[os.path.realpath(path)]}:
        return "FAILED", f"wrong labels of {wrong}\n{text}"
    return "trained", ""


def trial(number: int, seed: int, folder: Path, *, show: bool) -> tuple[str, list[tuple[str, str]]]:
    """Make a case and train on it: its damage, and the outcomes and problems."""
    rng = random.Random(f"{seed} {number}")
    case, damage = Case(folder, rng), rng.choice(DAMAGES)
    damage(case)
    if damage is not csv_file and case.expected and rng.random() < 0.2:
        content(case)
    outcomes = []
    for on_error in ("stop", "skip"):
        log, used = folder / f"{on_error}.log", folder / f"{on_error}.json"
        overrides = [f"data.root='{case.root}'", f"data.cache='{folder / 'cache'}'"]
        overrides += [f"data.on_error={on_error}", f"hydra.run.dir='{folder / on_error}'"]
        code = finish(launch([*OPTIONS, *overrides], log, prepare=partial(note_images, used)))
        noted = json.loads(used.read_text()) if used.exists() else {}
        text = log.read_text(errors="replace")
        options = {"stop": on_error == "stop", "reject": damage in MAY_BE_REJECTED}
        outcome, problem = judge(code, text, noted, case.expected, **options)
        outcomes.append((f"{on_error}: {outcome}", problem))
        if show:
            print(f"--only {number}: {damage.__name__}: {on_error}: {outcome}")
            print("\n".join(line for line in text.splitlines() if "photos" in line), flush=True)
    return damage.__name__, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--only", type=int, help="number of the case to repeat alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="lines about the images of each run")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of Pillow, about damaged images
    folder, started = Path(tempfile.mkdtemp(prefix="damaged-images-")), time.monotonic()
    dry_run(compose(["data=fashion_mnist_mini", *OPTIONS[4:]]))  # imports what a training imports
    counts, problems = Counter[str](), []
    for number in range(arguments.cases) if arguments.only is None else [arguments.only]:
        own = folder / str(number)
        own.mkdir()
        try:
            damage, outcomes = trial(number, arguments.seed, own, show=arguments.show)
        except Exception:
            damage, outcomes = "making the case", [("FAILED", traceback.format_exc())]
        counts.update(f"{damage}: {outcome}" for outcome, _ in outcomes)
        found = [f"--only {number}: {damage}: {o}: {text}" for o, text in outcomes if text]
        problems += found
        if not found:
            shutil.rmtree(own)
    for what, count in sorted(counts.items()):
        print(f"{count:6}  {what}")
    print(f"\n{len(problems)} problems, {time.monotonic() - started:.0f} s, {folder}")
    print("\n\n".join(problems))
    if not problems:
        shutil.rmtree(folder)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
