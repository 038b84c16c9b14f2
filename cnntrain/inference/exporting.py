"""A trained network as a file that other programs run: `cnntrain export`."""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import cnntrain
from cnntrain.config import ConfigError
from cnntrain.inference.trained import Trained, load_trained
from cnntrain.interruption import interruptible
from cnntrain.notebook import OneLine
from cnntrain.training.building import build_network
from cnntrain.training.checkpoints import shape_differences

Format = Literal["onnx", "torch"]
Run = Callable[[Tensor], Tensor]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
FACTS = "cnntrain.json"  # what a torch.export file calls them
BATCHES = (1, 2, 7, 256)  # sizes in which the file is tried
TOLERANCE = 1e-4  # of the largest logit: float32 in another order of sums


class ExportError(OneLine, RuntimeError):
    """A network that PyTorch cannot export; no file is left."""


class Mismatch(ExportError):
    """An exported network does not compute what the trained one does; no file is left."""


@dataclass(frozen=True)
class Exported:
    """A file that was loaded again, and found to compute the same."""

    file: Path
    images: int  # real ones, on which the two were compared
    error: float  # the largest difference of a logit
    largest: float  # the largest logit
    answers: int  # images that both take for the same


@interruptible()
def export(
    run: str | os.PathLike[str],
    format: Format,
    *,
    checkpoint: str | os.PathLike[str] = "best",
    root: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Exported:
    """Write a run's network into `folder`, by default the run's folder export/.

    What the file takes is images, float32 (N, C, H, W), normalised, of any N; what it gives is
    logits (N, classes). It holds the class names, and mean and standard deviation of the pixels
    scaled to 0..1, by which images are normalised: an ONNX file as metadata, a torch.export file
    as its extra file cnntrain.json.

    Its convolutions are those of the runtime, whatever the network was trained on: loops would make
    a graph of thousands of nodes. So what it computes is compared with the network on the backend
    that it was trained on, on validation images. A backend of somebody's own with other parameters
    than nn.Conv2d's is exported as it computes.

    Args:
        run: The run's folder, or a Result.
        format: onnx, or torch: a program of torch.export.
        checkpoint: best, last, or a file.
        root: The data set's folder, where that is not the one that the run had.
        folder: Where to.

    Raises:
        ConfigError, CheckpointError, DataError: As `evaluate`; or packages are not installed.
        ExportError, Mismatch: See there.
    """
    check_installed(format)
    trained = load_trained(run, checkpoint, device="cpu", root=root)
    return export_trained(trained, format, folder or Path(run) / "export")


def check_installed(format: Format) -> None:
    """ConfigError if a format's packages are not there."""
    needed = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ConfigError(
            [f"format={format}: needs {' and '.join(missing)}; pip install {' '.join(missing)}"]
        )


def export_trained(trained: Trained, format: Format, folder: str | os.PathLike[str]) -> Exported:
    """As `export`, of a network that is loaded on the CPU."""
    folder = Path(folder)
    data = trained.data
    images = data.val_loader().rows(torch.arange(min(max(BATCHES), data.val_size)))
    # Not `convert`, which refuses a convolution of somebody's own that computes in its own way.
    cfg = trained.cfg.copy()
    cfg.backend = {"_target_": "torch.nn.Conv2d", "_partial_": True}
    network, weights = build_network(cfg, data).eval(), trained.network.state_dict()
    if shape_differences(weights, network.state_dict()):
        network = trained.network
    else:
        network.load_state_dict(weights)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{trained.checkpoint.stem}{SUFFIXES[format]}"
    new = file.with_name(f".{file.name}")  # hidden until it is whole and right
    try:
        with _quiet():
            write, load = (_write_onnx, _load_onnx) if format == "onnx" else (_write, _load)
            # What a program is traced with, it keeps: no image of anybody's. Two are any number.
            try:
                write(network, torch.zeros(2, *data.shape), _facts(trained), new)
                exported = load(new)
            except OSError:
                raise
            except Exception as error:  # of many classes, some of them torch's own
                said = str(error).strip().split("\n")[0]
                raise ExportError(
                    f"format={format}: PyTorch cannot export this network: {said}"
                ) from error
            found = _compared(trained.network, exported, images, file)
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
    return found


def _facts(trained: Trained) -> dict[str, Any]:
    """What somebody who has nothing but the file needs to know."""
    data = trained.data
    return {
        "classes": list(data.classes),
        "shape": list(data.shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "input": "images, float32 (N, C, H, W): (pixel / 255 - mean) / std",
        "output": "logits, float32 (N, classes)",
        "model": trained.cfg.model._target_,
        "trained_on": trained.cfg.backend._target_,
        "epoch": trained.epoch,
        "cnntrain": cnntrain.__version__,
    }


def _compared(network: nn.Module, exported: Run, images: Tensor, file: Path) -> Exported:
    """Both networks' answers to batches of several sizes; Mismatch if they differ."""
    error = largest = 0.0
    same = 0
    for size in dict.fromkeys(min(size, len(images)) for size in BATCHES):
        shown = images[-size:]
        with torch.no_grad():
            wanted, found = network(shown), exported(shown)
        if found.shape != wanted.shape:
            raise Mismatch(f"{file}: gives {tuple(found.shape)} for {size} images; not written")
        difference = float((found - wanted).abs().max())
        error = max(error, difference) if difference == difference else difference
        largest = float(wanted.abs().max())
        if not difference <= TOLERANCE * max(1.0, largest):
            raise Mismatch(
                f"{file}: logits of {size} images differ by {difference:.2g} from those of the "
                f"trained network, of which the largest is {largest:.2g}; not written"
            )
        same = int((found.argmax(1) == wanted.argmax(1)).sum())
    return Exported(file, len(images), error, largest, same)


def _write_onnx(network: nn.Module, images: Tensor, facts: dict[str, Any], file: Path) -> None:
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    graph = program.model.graph  # its parts say where on this machine their source lies
    for part in (graph, *graph, *graph.initializers.values(), *graph.inputs, *graph.outputs):
        part.metadata_props.clear()
    for name, value in facts.items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    program.save(str(file), external_data=False)


def _load_onnx(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write(network: nn.Module, images: Tensor, facts: dict[str, Any], file: Path) -> None:
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(network, (images,), dynamic_shapes=(batch,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # which says where on this machine the source lies
    torch.export.save(program, str(file), extra_files={FACTS: json.dumps(facts)})


def _load(file: Path) -> Run:
    return torch.export.load(str(file)).module()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
