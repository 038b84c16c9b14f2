"""Benchmark of training on an image folder against torchvision's ImageFolder and a DataLoader.

    python scripts/benchmark_image_folder.py --rounds 3 --images 20000
    python scripts/benchmark_image_folder.py --rounds 3 --images 20000 --model resnet

Makes JPEG files of about 200 x 200 pixels in ten class folders, with a training and a validation
part. Alternately, each in a new process, two programs train the same network at 64 x 64:

- cnntrain: `cnntrain.training.train` with data=image_folder and an empty cache, with all logging
  and checkpoints;
- usual: a Lightning script with ImageFolder, transforms.v2 and a DataLoader with 2 workers.

Reported are seconds of the first epoch, decoding included (cnntrain decodes before it), seconds of
the median later epoch, and the largest resident memory that is not page cache (RssAnon of the
process, and of its workers, in /proc). On a shared machine only the ratios are meaningful.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SIZE, BATCH, CLASSES = 64, 128, 10


def make_images(root: Path, count: int) -> None:
    """Smooth random pictures with noise, whose files are about as large as those of photos."""
    from PIL import Image

    def write(index: int) -> None:
        rng = np.random.default_rng(index)
        height, width = rng.integers(180, 221, 2)
        coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        noisy = np.asarray(image) + rng.normal(0, 12, (height, width, 3))
        part = "val" if index % 10 == 0 else "train"
        folder = root / part / f"class{index // 10 % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{index}.jpg", quality=85)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(count)))


class Memory(threading.Thread):
    """Largest sum of RssAnon of this process and its children, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0.0

    def run(self) -> None:
        while True:
            total = 0
            children = (file.read_text() for file in Path("/proc/self/task").glob("*/children"))
            with contextlib.suppress(OSError, IndexError):  # one has ended
                for process in ["self", *" ".join(children).split()]:
                    status = Path(f"/proc/{process}/status").read_text()
                    total += int(status.partition("RssAnon:")[2].split()[0])
            self.largest = max(self.largest, total / 1024)
            time.sleep(0.05)


def times_of(model: str, epochs: int, kind: str, root: Path) -> dict[str, Any]:
    """Train in this process; seconds of each epoch and the largest memory."""
    import lightning.pytorch as lightning
    import torch

    ends: list[float] = []

    class Clock(lightning.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    from cnntrain.config import build, compose
    from cnntrain.training import train

    overrides = [f"data.root={root}", f"data.size={SIZE}", f"data.batch_size={BATCH}"]
    overrides += [f"model={model}", f"trainer.max_epochs={epochs}", "trainer.progress_bar=false"]
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose(["data=image_folder", *overrides, f"data.cache={folder}/cache"])
        memory = Memory()
        memory.start()
        begun = time.perf_counter()
        if kind == "cnntrain":
            with contextlib.redirect_stdout(sys.stderr):
                train(cfg, Path(folder) / "run", callbacks=[Clock()])
        else:
            network = build(
                cfg.model, conv=torch.nn.Conv2d, in_shape=(3, SIZE, SIZE), num_classes=CLASSES
            )
            usual(network, root, epochs, Clock())
    seconds = [end - start for start, end in zip([begun, *ends], ends, strict=False)]
    return {"seconds": seconds, "mebibytes": memory.largest}


def usual(network: Any, root: Path, epochs: int, clock: Any) -> None:
    """The usual Lightning script."""
    import lightning.pytorch as lightning
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.ToImage()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
    train, val = (ImageFolder(root / part, v2.Compose(steps)) for part in ("train", "val"))

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Any, _: int) -> Any:
            return cross_entropy(self.network(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("loss", cross_entropy(self.network(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.001)

    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": 2, "persistent_workers": True}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Module(), DataLoader(train, shuffle=True, **options), DataLoader(val, **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--model", default="lenet5")
    parser.add_argument("--only", choices=["cnntrain", "usual"], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help="folder of images of an earlier call")
    arguments = parser.parse_args()
    if arguments.only:
        found = times_of(arguments.model, arguments.epochs, arguments.only, arguments.root)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.root or Path(folder)
        if not any(root.iterdir()):
            make_images(root, arguments.images)
        options = [f"--root={root}", f"--model={arguments.model}", f"--epochs={arguments.epochs}"]
        results: dict[str, list[dict[str, Any]]] = {"cnntrain": [], "usual": []}
        for number in range(arguments.rounds):
            for kind, runs in results.items():
                command = [sys.executable, __file__, f"--only={kind}", *options]
                output = subprocess.check_output(command, text=True)
                runs.append(json.loads(output.splitlines()[-1]))
                seconds = ", ".join(f"{s:.1f}" for s in runs[-1]["seconds"])
                print(f"round {number + 1}, {kind}: s/epoch {seconds}", flush=True)
    for name, of in {
        "first epoch": lambda run: run["seconds"][0],
        "later epochs": lambda run: statistics.median(run["seconds"][1:]),
        "memory": lambda run: run["mebibytes"],
    }.items():
        mine, theirs = ([of(run) for run in results[kind]] for kind in ("cnntrain", "usual"))
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        unit = "MiB" if name == "memory" else "s"
        print(
            f"{name:14} cnntrain {statistics.median(mine):.4g} {unit}, usual "
            f"{statistics.median(theirs):.4g} {unit}, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
