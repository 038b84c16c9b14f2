"""What the processes of a run do that are not its first one."""

import contextlib
import json
import logging
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from cnntrain.interruption import Interrupted, interruption, watching
from cnntrain.launched import TIMEOUT, Place
from cnntrain.training.building import build_run, build_trainer
from cnntrain.training.company import (
    ProcessLost,
    broken,
    meeting_point,
    unanswered,
    wait_for_work,
)
from cnntrain.training.distributed import cores_shared, group
from cnntrain.training.nan_guard import NonFiniteError
from cnntrain.training.run import fit_and_test


def main(place: str) -> NoReturn:
    """Of a process that rank 0 has started on its machine."""
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    follow(Place(**json.loads(place)))


def follow(place: Place) -> NoReturn:
    """Wait for what rank 0 has to do, take part in it, and end.

    It says nothing, but for an error that is its own. Exit codes as those of a run.
    """
    logging.disable()
    interruption.quiet = True
    code = 0
    with watching("leave"):
        try:
            store = meeting_point(place)
            if work := wait_for_work(place, store):
                with cores_shared(place):
                    _take_part(place, store, work)
        except Interrupted as error:
            code = error.exit_code
        except NonFiniteError:
            code = 3
        except BaseException as error:
            code, lost = 1, isinstance(error, ProcessLost)
            said = str(error).partition("\n")[0]
            said = said if lost else f"{type(error).__name__}: {said}"
            said = unanswered(place) if broken(error) else said
            # Rank 0 tells how a process has ended that it has started itself.
            name = f"cnntrain: process {place.rank + 1} of {place.world}: "
            print(f"{name if place.launcher else ''}{said}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)


def _take_part(place: Place, store: Any, work: dict[str, Any]) -> None:
    cfg, directory = OmegaConf.create(work["config"]), Path(work["directory"])
    place = replace(place, timeout=cfg.trainer.get("timeout", TIMEOUT))
    checkpoint = Path(work["checkpoint"]) if work["checkpoint"] else None
    data, module = build_run(cfg)
    data.prepare()
    trainer = build_trainer(cfg, place, directory, data, module)
    store.add("here", 1)
    with group(place, store, trainer.strategy.root_device):
        fit_and_test(trainer, place, cfg, data, module, checkpoint)


def _end_with_rank_0() -> None:
    with contextlib.suppress(OSError):
        os.read(0, 1)  # nothing is ever written there; it ends with the process
    os._exit(1)
