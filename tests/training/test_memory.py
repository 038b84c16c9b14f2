"""malloc settings of a CPU run, from glibc's mallinfo2 in a separate process."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = 64 << 20  # bytes; twice what glibc ever keeps by itself
CODE = f"""
import ctypes, json, sys
from pathlib import Path
import torch
from cnntrain.config import compose
from cnntrain.training import train

class Mallinfo2(ctypes.Structure):  # malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2

def of_a_block():
    "Bytes from the kernel for this block, and free bytes after it is freed."
    others = mallinfo2().hblkhd
    block = torch.empty({BLOCK}, dtype=torch.uint8)
    mapped = mallinfo2().hblkhd - others
    del block
    return mapped, mallinfo2().fordblks

before = of_a_block()
cfg = compose(["data=fashion_mnist_mini", "trainer=cpu", "trainer.max_epochs=1",
    "+trainer.limit_train_batches=1", "data.val_size=100", "tensorboard=scalars"])
train(cfg, Path(sys.argv[1]))
print(json.dumps([before, of_a_block()]))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.libc_ver()[1] < "2.35",
    reason="not glibc, or one that always returns large blocks",
)
def test_freed_memory_is_kept(tmp_path: Path) -> None:
    code = [sys.executable, "-c", CODE, str(tmp_path / "run")]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    (mapped, free), (mapped_now, free_now) = json.loads(done.stdout.splitlines()[-1])
    assert mapped >= BLOCK > free  # as glibc does: mapped each time
    assert mapped_now == 0
    assert free_now >= BLOCK
