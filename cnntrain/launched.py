"""Which of the processes of a run this one is, where torchrun or srun has started them.

Nothing here imports torch where there is one process: a mistyped option is answered before that.
"""

import os
import socket
import sys
from dataclasses import dataclass

TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class Place:
    """A process among those that train one network together; all of them count from 0."""

    rank: int = 0  # among all
    local_rank: int = 0  # among those of its machine
    world: int = 1  # how many there are
    nodes: int = 1  # on how many machines, on each as many
    address: str = "127.0.0.1"  # of rank 0
    port: int = 0  # of rank 0; 0: one that is free
    launcher: str | None = None  # who has started all of them; None: rank 0 starts the others
    timeout: float = TIMEOUT  # seconds to wait for another process; `trainer.timeout`

    @property
    def devices(self) -> int:
        """How many of the processes are on one machine."""
        return self.world // self.nodes


def launched() -> Place | None:
    """The place that torchrun, or whoever sets the same variables, or srun has given this process;
    None if it has been started alone."""
    said = os.environ
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= said.keys():
        world = int(said["WORLD_SIZE"])
        return (
            Place(
                int(said["RANK"]),
                int(said["LOCAL_RANK"]),
                world,
                world // int(said.get("LOCAL_WORLD_SIZE", world)),
                said["MASTER_ADDR"],
                int(said["MASTER_PORT"]),
                "torchrun",
                _timeout(),
            )
            if world > 1
            else None
        )
    # A batch script has SLURM_NTASKS as well, though it is one process; srun's tasks have this.
    if int(said.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        first = SLURMEnvironment.resolve_root_node_address(said["SLURM_STEP_NODELIST"])
        # The same in all tasks, and another for each step of a job: they may run side by side.
        step = 97 * int(said["SLURM_JOB_ID"]) + int(said["SLURM_STEP_ID"])
        return Place(
            int(said["SLURM_PROCID"]),
            int(said["SLURM_LOCALID"]),
            int(said["SLURM_STEP_NUM_TASKS"]),
            int(said["SLURM_STEP_NUM_NODES"]),
            said.get("MASTER_ADDR", first),
            int(said.get("MASTER_PORT", 15_000 + step % 10_000)),
            "srun",
            _timeout(),
        )
    return None


def _timeout() -> float:
    """`trainer.timeout` as typed: processes meet before the first one has composed the config."""
    typed = [text.partition("=")[2] for text in sys.argv if text.startswith("trainer.timeout=")]
    try:
        return float(typed[-1])
    except (IndexError, ValueError):
        return TIMEOUT


def choose_interface(place: Place) -> str | None:
    """Set GLOO_SOCKET_IFNAME where gloo would choose an interface that other machines cannot reach.

    It takes that of the host name's address, which is 127.0.1.1 on Debian. Returns the problem if
    there is more than one to choose from.
    """
    if place.nodes == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    name, address = socket.gethostname(), None
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as probe:
            probe.bind((address, 0))
        if not address.startswith("127."):
            return None
    except OSError:  # no address, or another machine's
        pass
    found = [interface for _, interface in socket.if_nameindex() if not interface.startswith("lo")]
    if len(found) == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = found[0]
        return None
    return (
        f"the host name {name} resolves to {address}, where other machines do not reach this one; "
        f"set GLOO_SOCKET_IFNAME to its network interface: {' or '.join(found) or 'there is none'}"
    )
