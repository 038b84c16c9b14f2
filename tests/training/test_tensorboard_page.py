"""What a person sees: a real TensorBoard server over a real run, in a real browser."""

from collections.abc import Iterator

import pytest
from browser import CHROMEDRIVER
from tensorboard_page import Board, Server

from cnntrain.config import compose
from cnntrain.training import train

pytestmark = [
    pytest.mark.skipif(
        not CHROMEDRIVER.exists(),
        reason="needs Chromium and its driver (chromium, chromium-driver)",
    ),
    pytest.mark.xdist_group("tensorboard_page"),
]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    directory = tmp_path_factory.mktemp("board") / "mine"
    options = [
        "backend=im2col",
        "trainer=cpu",
        "trainer.max_epochs=3",
        "trainer.progress_bar=false",
    ]
    train(compose(["data=fashion_mnist_mini", "optimizer.lr=0.004", *options]), directory)
    with Server(directory.parent) as address, Board(address) as opened:
        yield opened


def test_scalars(board: Board) -> None:
    both = {f"{part}/{name}" for part in ("train", "val") for name in ("loss", "acc")}
    speed = {"wall_time/images_per_second", "wall_time/data_share"}
    board.scalars({*both, *speed, "val_class_acc/Trouser"}, points=3)


def test_training_and_validation_are_in_one_chart(board: Board) -> None:
    board.custom_scalars({"loss": 2, "accuracy": 2})
    lines = "all('tf-custom-scalar-multi-line-chart-card >>> .line-plot:not(.ghost) >>> path.line')"
    colours = board.js(f"return {lines}.map(line => getComputedStyle(line).stroke)")
    assert len(set(colours[:2])) == len(set(colours[2:4])) == 2, colours


def test_images(board: Board) -> None:
    board.images(
        {
            "features/features.0": (476, 366),
            "features/features.4": (1054, 327),
            "kernels/features.0": (402, 131),
        }
    )


def test_hparams(board: Board) -> None:
    choices = {"model": "lenet5", "backend": "im2col", "data": "fashion_mnist_mini"}
    numbers = {"optimizer.lr": "0.0040000", "data.batch_size": "128.00"}
    board.hparams([{"Trial ID": "mine", **choices, **numbers}])


def test_projector(board: Board) -> None:
    board.projector(1000, 84, {"class", "predicted"})


def test_graph(board: Board) -> None:
    layers = {"features/0.Im2colConv2d", "features/1.BatchNorm2d", "features/2.MaxPool2d"}
    board.graphs(["features"], {"images", "logits", "classifier", *layers})


def test_text(board: Board) -> None:
    board.open("text", "config")
    board.wait("return all('tf-text-loader').some(e => all('pre', e).some("
               "p => text(p).includes('_target_: cnntrain.conv.Im2colConv2d')))")  # fmt: skip


def test_histograms(board: Board) -> None:
    board.histograms({"weights/features.0.weight", "gradients/classifier.3.bias"}, steps=3)
    board.distributions({"weights/features.0.weight"})


def test_precision_and_recall(board: Board) -> None:
    board.pr_curves("pr/Trouser")
