"""Rank and world size of this process, as torchrun or Slurm's srun set them; without torch."""

import contextlib
import os
import sys
from dataclasses import dataclass

TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class ProcessInfo:
    """One of the processes that train a network together, in the terms of torch.distributed."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    nodes: int = 1  # machines, each with the same number of processes
    launcher: str | None = None  # torchrun or srun; None: rank 0 starts the others
    rendezvous: str = "env://"  # where the processes connect: an init_method of torch.distributed
    timeout: float = TIMEOUT  # seconds to wait for another process; `trainer.timeout`

    @property
    def devices(self) -> int:
        """Processes on each machine."""
        return self.world_size // self.nodes


def launched() -> ProcessInfo | None:
    """This process as started by torchrun or srun; None if it was started by itself."""
    env = os.environ
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        world_size = int(env["WORLD_SIZE"])
        nodes = world_size // int(env.get("LOCAL_WORLD_SIZE", world_size))
        rank, local_rank, launcher = int(env["RANK"]), int(env["LOCAL_RANK"]), "torchrun"
    # SLURM_NTASKS is also set in a batch script, which is a single process.
    elif "SLURM_STEP_NUM_TASKS" in env:
        world_size, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_STEP_NUM_NODES"])
        rank, local_rank = int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"])
        launcher = "srun"
    else:
        return None
    if world_size == 1:
        return None
    return ProcessInfo(rank, local_rank, world_size, nodes, launcher, timeout=_timeout())


def _timeout() -> float:
    """`trainer.timeout` as typed: the processes connect before rank 0 has composed the config."""
    typed = [text.partition("=")[2] for text in sys.argv if text.startswith("trainer.timeout=")]
    with contextlib.suppress(IndexError, ValueError):
        return float(typed[-1])
    return TIMEOUT
