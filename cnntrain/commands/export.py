"""`cnntrain export`: a trained network as a file that other programs run."""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain.commands.app import short
from cnntrain.commands.finished import start_on_run, telling_errors

if TYPE_CHECKING:
    from cnntrain.inference import Trained


def main() -> None:
    start_on_run("export", _load, _export)


def _load(cfg: DictConfig) -> "Trained":
    from cnntrain.inference import load_trained
    from cnntrain.inference.exporting import check_installed

    check_installed(cfg.format)
    with telling_errors():
        return load_trained(cfg.run, cfg.checkpoint, device="cpu", root=cfg.root)


def _export(cfg: DictConfig, trained: "Trained") -> None:
    from cnntrain.inference import export_trained

    with telling_errors():
        found = export_trained(trained, cfg.format, Path(HydraConfig.get().runtime.output_dir))
    print(
        f"loaded again and compared with {trained.backend} on {found.images} real images, in "
        "batches of several sizes:\n"
        f"largest difference of a logit   {found.error:.1e}   (the largest logit is "
        f"{found.largest:.3g})\n"
        f"same answer                     {found.answers} of {found.images}\n\n"
        f"{short(found.file)}   ({found.file.stat().st_size:,} bytes)"
    )
