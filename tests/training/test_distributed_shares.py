"""Shares of a batch in distributed runs, and options that cannot be distributed."""

import numpy as np
import pytest
import torch

from cnntrain.config import ConfigError, compose
from cnntrain.data import FashionMNISTMini
from cnntrain.training.classifier import Classifier


@pytest.mark.parametrize("world", [2, 3])
def test_batches_are_divided(world: int) -> None:
    data = FashionMNISTMini(batch_size=100, eval_batch_size=199, hflip=0.5, crop=2, erase=0.5)
    for make in (lambda **share: data.train_loader(7, **share), data.val_loader):
        whole, parts = make(), [make(rank=rank, world=world) for rank in range(world)]
        for epoch in (0, 3):
            for number, batches in enumerate(
                zip(
                    whole.batches(epoch),
                    *(part.batches(epoch) for part in parts),
                    strict=True,
                )
            ):
                (images, labels), *shares = batches
                assert whole.size(number) == parts[-1].size(number) == len(labels)
                for rank, (part_images, part_labels) in enumerate(shares):
                    assert torch.equal(part_images, images[rank::world])
                    assert torch.equal(part_labels, labels[rank::world])
                    indices = whole.indices(epoch, number)[rank::world]
                    assert torch.equal(parts[rank].indices(epoch, number), indices)
    assert len(parts[0].indices(0, 2)) == -(-102 // world)  # the last one of 500


def test_dropout_is_drawn_by_rank() -> None:
    module = Classifier(torch.nn.Identity(), torch.nn.Identity(), lambda **_: None, seed=5)  # type: ignore
    drawn = []
    for rank in (None, 0, 1, 2):
        module.reseed(3, 4, rank)
        drawn.append(torch.rand(4))
    alone = np.random.SeedSequence([5, 3, 4]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(alone))
    assert torch.equal(drawn[0], torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[2], drawn[3])


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("overrides", "environment", "message"),
    [
        (["trainer=ddp", "trainer.devices=0"], {}, "trainer.devices=0: input should be greater"),
        (["+trainer.strategy=ddp"], {}, "trainer.strategy=ddp: is decided by the program"),
        (["trainer=ddp", "trainer.num_nodes=2"], {}, "trainer.num_nodes=2: each of the machines"),
        (
            [],
            {**TORCHRUN, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "trainer.devices=1 times trainer.num_nodes=1: is not what torchrun has started, 2 "
            "processes times 2 machines; take trainer=ddp trainer.devices=2 trainer.num_nodes=2",
        ),
        (
            ["trainer=ddp", "trainer.accelerator=cpu", "+trainer.sync_batchnorm=true"],
            {},
            "trainer.sync_batchnorm=true: PyTorch has it for GPUs only",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    (problem,) = caught.value.problems
    assert message in problem


def test_more_devices_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert compose(["trainer=ddp"]).trainer.devices == 2
    with pytest.raises(ConfigError, match=r"trainer.devices=3: this machine has 2 GPUs"):
        compose(["trainer=ddp", "trainer.devices=3"])
