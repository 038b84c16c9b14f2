"""`cnntrain export`: write a trained network to an ONNX or torch.export file."""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain.commands.app import short
from cnntrain.commands.finished_run import report_errors, start_on_run

if TYPE_CHECKING:
    from cnntrain.inference import Trained


def main() -> None:
    start_on_run("export", _load, _export)


def _load(cfg: DictConfig) -> "Trained":
    from cnntrain.inference import load_trained
    from cnntrain.inference.exporting import check_installed

    check_installed(cfg.format)
    with report_errors():
        return load_trained(cfg.run, cfg.checkpoint, device="cpu", root=cfg.root)


def _export(cfg: DictConfig, trained: "Trained") -> None:
    from cnntrain.inference import export_trained

    with report_errors():
        exported = export_trained(trained, cfg.format, Path(HydraConfig.get().runtime.output_dir))
    print(
        f"loaded again and compared with {trained.backend} on {exported.images} validation images, "
        "in batches of several sizes:\n"
        f"largest difference of a logit   {exported.error:.1e}   (the largest logit is "
        f"{exported.largest:.3g})\n"
        f"same class                      {exported.same} of {exported.images}\n\n"
        f"{short(exported.file)}   ({exported.file.stat().st_size:,} bytes)"
    )
