"""Keys of Lightning's loop state, which bitwise resume within an epoch has to write itself."""

from typing import Any

import lightning.pytorch as lightning


def set_progress(
    checkpoint: dict[str, Any], trainer: lightning.Trainer, epoch: int, batch: int
) -> None:
    """Write the position of a run into the loop state of a checkpoint, as at the end of a batch.

    Lightning has no public way: the hooks in which a checkpoint is saved run before the loops count
    the batch or the epoch, and a resume from their state validates or counts once too often.
    `epoch` and `batch` (0 between two epochs) are those of the next batch, counted from 0.
    """
    loops, batches = checkpoint["loops"]["fit_loop"], int(trainer.num_training_batches)
    counts = "ready", "started", "processed", "completed"
    done = dict.fromkeys(counts, epoch)
    if batch > 0:
        done |= {"ready": epoch + 1, "started": epoch + 1}
    loops["epoch_progress"] = {"total": done, "current": dict(done)}
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": trainer.global_step}
    last = batch == batches
    loops["epoch_loop.batch_progress"] = {
        "total": dict.fromkeys(counts, epoch * batches + batch),
        "current": dict.fromkeys(counts, batch),
        "is_last_batch": last,
    }
    # To Lightning this is a validation that was interrupted: it is repeated.
    loops["epoch_loop.val_loop.batch_progress"] = {
        "total": {"ready": int(last), "started": int(last), "processed": 0, "completed": 0},
        "current": dict.fromkeys(counts, 0),
        "is_last_batch": False,
    }
