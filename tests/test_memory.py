"""Steps take no memory from the kernel: page faults, counted in real processes."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys
from pathlib import Path
import lightning.pytorch as lightning
from cnntrain.config import compose
from cnntrain.training import run, train

class Faults(lightning.Callback):
    def __init__(self):
        self.so_far = []
    def on_train_batch_end(self, *_):
        self.so_far.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

if sys.argv[2] == "as glibc does":
    run.keep_freed_memory = lambda: None
size = ["data=fashion_mnist_mini", "data.batch_size=500", "trainer.max_epochs=5"]
cfg = compose([*size, "trainer=cpu"])
train(cfg, Path(sys.argv[1]), callbacks=[faults := Faults()])
epochs = [faults.so_far[first + 1 : first + 9] for first in range(0, 45, 9)]
print(min(epoch[-1] - epoch[0] for epoch in epochs) / 7)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_steps_have_their_memory_at_hand(tmp_path: Path) -> None:
    def faults_a_step(how: str) -> float:
        code = [sys.executable, "-c", FAULTS, str(tmp_path / how), how]
        done = subprocess.run(code, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    kept, given_back = faults_a_step("kept"), faults_a_step("as glibc does")
    assert kept < 100 < given_back
