"""Export of a trained network to ONNX or torch.export, compared with the original."""

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
from cnntrain.data import DataError, ImageData
from cnntrain.data.loader import Normalise
from cnntrain.inference.trained import Trained, load_trained
from cnntrain.interruption import interruptible
from cnntrain.terminal import NoTraceback
from cnntrain.training.building import build_network
from cnntrain.training.checkpoints import shape_differences

Format = Literal["onnx", "torch"]
Network = Callable[[Tensor], Tensor]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
METADATA_FILE = "cnntrain.json"  # extra file of a torch.export program
BATCH_SIZES = (1, 2, 7, 256)  # compared
TOLERANCE = 1e-4  # relative to the largest logit: float32 sums in another order


class ExportError(NoTraceback, RuntimeError):
    """The network cannot be exported, or computes other logits then; no file is written."""


@dataclass(frozen=True)
class Exported:
    """An exported file that was loaded again and compared."""

    file: Path
    images: int  # compared
    kind: str  # of these images: validation, or random without the data set
    error: float  # largest absolute difference of a logit
    largest: float  # largest absolute logit
    same: int  # images with the same predicted class


@interruptible()
def export(
    run: str | os.PathLike[str] | Trained,
    format: Format,
    *,
    checkpoint: str | os.PathLike[str] = "best",
    root: str | os.PathLike[str] | None = None,
    normalise: bool = False,
    folder: str | os.PathLike[str] | None = None,
) -> Exported:
    """Export the network of a run to a file.

    The file maps normalised images, float32 (N, C, H, W) with any N, to logits (N, classes). It
    contains class names, size, resize mode, background, mean and standard deviation: as metadata of
    the ONNX model, or as the extra file cnntrain.json of the torch.export program.

    Convolutions are exported as those of `nn.Conv2d`, whatever the backend: loops would become
    thousands of graph nodes. The result is compared with the network on its own backend, on
    validation images, or on random ones if the data set cannot be read. A backend with other
    parameters than `nn.Conv2d` is exported as it is.

    Args:
        run, checkpoint, root: See `load_trained`.
        format: onnx, or torch for a torch.export program.
        normalise: Whether the file takes uint8 images (N, C, H, W) and normalises them itself.
        folder: Where to write; None: export/ in the run directory.

    Raises:
        ConfigError, CheckpointError, DataError: See `evaluate`; or packages are not installed.
        ExportError: PyTorch cannot export the network, or it computes other logits then.
    """
    check_installed(format)
    trained = load_trained(run, checkpoint, device="cpu", root=root)
    data = trained.data
    images, kind = _images(data)
    inputs = data.normalised(images)
    # Not `convert`, which rejects convolutions that override the computation.
    cfg = trained.cfg.copy()
    cfg.backend = {"_target_": "torch.nn.Conv2d", "_partial_": True}
    network, weights = build_network(cfg, data).eval(), trained.network.state_dict()
    if shape_differences(weights, network.state_dict()):
        network = trained.network
    else:
        network.load_state_dict(weights)
    if normalise:
        network = nn.Sequential(Normalisation(data), network)
    file = Path(folder or trained.run / "export") / f"{trained.checkpoint.stem}{SUFFIXES[format]}"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    write = _write_onnx if format == "onnx" else _write_torch
    try:
        with _silence():
            try:
                # Zeros, as the program keeps its example; a batch of one would fix the batch size.
                example = torch.zeros(2, *data.shape, dtype=torch.uint8)
                example = example if normalise else example.float()
                exported = write(network, example, _metadata(trained, normalise), temporary)
            except OSError:
                raise
            except Exception as error:  # exporters raise many classes
                reason = str(error).strip().split("\n")[0]
                raise ExportError(
                    f"format={format}: PyTorch cannot export this network: {reason}"
                ) from error
            taken = images if normalise else inputs
            result = _compare(trained.network, inputs, exported, taken, kind, file)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def check_installed(format: Format) -> None:
    """Raise ConfigError if packages that a format needs are not installed."""
    needed = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ConfigError(
            [f"format={format}: needs {' and '.join(missing)}; pip install {' '.join(missing)}"]
        )


class Normalisation(nn.Module):
    """uint8 images (N, C, H, W) normalised as those of a data set."""

    def __init__(self, data: ImageData):
        super().__init__()
        normalise = Normalise(data.mean, data.std, torch.device("cpu"))
        self.scale, self.shift = nn.Buffer(normalise.scale), nn.Buffer(normalise.shift)

    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float32) * self.scale + self.shift


def _images(data: ImageData) -> tuple[Tensor, str]:
    """uint8 (N, C, H, W), and whether they are validation images, or random ones without these."""
    try:
        loader = data.val_loader()
        return loader.stored(torch.arange(len(loader.labels))[: max(BATCH_SIZES)]), "validation"
    except DataError:
        generator, size = torch.Generator().manual_seed(0), (max(BATCH_SIZES), *data.shape)
        return torch.randint(256, size, generator=generator, dtype=torch.uint8), "random"


def _metadata(trained: Trained, normalise: bool) -> dict[str, Any]:
    data = trained.data
    kind = "uint8 (N, C, H, W)"
    if not normalise:
        kind = "float32 (N, C, H, W): (pixel / 255 - mean) / std"
    return {
        "classes": list(data.classes),
        "shape": list(data.shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "resize": data.decoder.resize,
        "background": data.decoder.background,
        "input": f"images, {kind}",
        "output": "logits, float32 (N, classes)",
        "model": trained.cfg.model._target_,
        "trained_on": trained.cfg.backend._target_,
        "epoch": trained.epoch,
        "cnntrain": cnntrain.__version__,
    }


@torch.no_grad()
def _compare(
    network: Network, inputs: Tensor, exported: Network, images: Tensor, kind: str, file: Path
) -> Exported:
    """Compare the logits of the network for `inputs` with those of the file for `images`."""
    errors = []
    for size in dict.fromkeys(min(size, len(images)) for size in BATCH_SIZES):
        expected, logits = network(inputs[-size:]), exported(images[-size:])
        error, largest = float("nan"), float(expected.abs().max())
        if logits.shape == expected.shape:
            error = float((logits - expected).abs().max())
        if not error <= TOLERANCE * max(1.0, largest):  # also if it is NaN
            raise ExportError(
                f"{file}: logits of {size} images differ by {error:.2g} from those of the "
                f"trained network, of which the largest is {largest:.2g}; not written"
            )
        errors.append(error)
    same = int((logits.argmax(1) == expected.argmax(1)).sum())  # of the last and largest batch
    return Exported(file, len(images), kind, max(errors), largest, same)


def _write_onnx(
    network: nn.Module, images: Tensor, metadata: dict[str, Any], file: Path
) -> Network:
    """Write the file, and load it again."""
    import onnxruntime

    options: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(network, (images,), dynamo=True, verbose=False, **options)
    assert program is not None
    graph = program.model.graph  # the metadata of its parts contains paths of this machine
    for part in (graph, *graph, *graph.initializers.values(), *graph.inputs, *graph.outputs):
        part.metadata_props.clear()
    for name, value in metadata.items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    program.save(str(file), external_data=False)
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), quiet, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torch(
    network: nn.Module, images: Tensor, metadata: dict[str, Any], file: Path
) -> Network:
    """Write the file, and load it again."""
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(network, (images,), dynamic_shapes=(batch,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    torch.export.save(program, str(file), extra_files={METADATA_FILE: json.dumps(metadata)})
    return torch.export.load(str(file)).module()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress log records, warnings and output of the exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
