"""TensorBoard content of a run, against values computed independently."""

import csv
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sweep_commands import hparams
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.util.tensor_util import make_ndarray
from weights import load

from cnntrain.config import ConfigError, build, compose, config_hash
from cnntrain.metric_names import METRICS
from cnntrain.pictures import GAP, LINE
from cnntrain.sweeps.sweep import write_hparams_schema
from cnntrain.training import insights, train
from cnntrain.training.tensorboard import TensorBoard

OPTIONS = [
    "data=fashion_mnist_mini",
    "data.batch_size=100",
    "data.crop=2",
    "trainer=cpu",
    "trainer.max_epochs=5",
    "trainer.test_checkpoint=last",
    "trainer.progress_bar=false",
    "+trainer.limit_train_batches=8",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("insights") / "run"
    train(compose(OPTIONS), directory)
    return directory


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    return read(run)


def read(directory: Path) -> EventAccumulator:
    kept = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(directory), size_guidance=kept).Reload()


def picture(events: EventAccumulator, tag: str, step: int = 5) -> np.ndarray:
    (found,) = (image for image in events.Images(tag) if image.step == step)
    return np.asarray(Image.open(io.BytesIO(found.encoded_image_string)).convert("RGB"))


@pytest.fixture(scope="module")
def outputs(run: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The network with the last weights, its probabilities for the validation images, labels."""
    cfg = compose(OPTIONS)
    network = load(cfg, run / "checkpoints/last.ckpt", in_shape=(1, 28, 28), num_classes=10)
    images, labels = zip(*build(cfg.data).val_loader(), strict=True)
    with torch.no_grad():
        return network, network(torch.cat(images)).softmax(1), torch.cat(labels)


def test_images_after_1_2_4_epochs_and_the_last(events: EventAccumulator) -> None:
    steps = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    several = [1, 2, 4, 5]
    assert steps == {
        "train/batch": [1],
        "kernels/features.0": several,
        "features/features.0": several,
        "features/features.4": several,
        "features/features.8": several,
        "val/confusion": several,
        "val/mistakes": several,
        "test/confusion": [5],
        "test/mistakes": [5],
    }


def test_training_and_validation_curves_are_separate_runs(run: Path) -> None:
    """TensorBoard has a colour for each run; the numbers are those of metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for stage in ("train", "val"):
        found = read(run / "curves" / stage)
        for name in ("loss", "acc"):
            assert [e.step for e in found.Scalars(name)] == [int(row["epoch"]) for row in rows]
            values = [float(row[f"{stage}/{name}"]) for row in rows]
            assert [e.value for e in found.Scalars(name)] == pytest.approx(values)


METRIC_NAMES = ("loss", "acc", "balanced_acc", "macro_f1", "loss_step")


def test_losses_and_accuracies_come_first(events: EventAccumulator) -> None:
    """TensorBoard sorts the sections, which are named by what is before the slash."""
    tags = sorted(events.Tags()["scalars"], key=str.lower)
    others = [tag for tag in tags if tag.split("/")[-1] not in METRIC_NAMES]
    assert tags[-len(others) :] == others
    assert {tag.split("/")[0] for tag in tags[: -len(others)]} == {"test", "train", "val"}
    assert "wall_time/data_share" in others
    assert "val_class_acc/Bag" in others


@pytest.mark.parametrize("single", ["a", "z"])  # the first schema counts
def test_no_empty_hparams_column_beside_a_sweep(single: str, tmp_path: Path) -> None:
    over = {"backend": ["native", "im2col"], "optimizer.lr": [0.01, 0.02]}
    write_hparams_schema(tmp_path / "sweeps", over)

    def shown(name: str, *options: str, labels: dict[str, Any] | None = None) -> None:
        cfg, board = compose(list(options)), TensorBoard(tmp_path / name)
        board.begin(cfg, labels)
        for metric in METRICS:
            board.log_metrics({metric: 0.5}, 0)
        board.end(cfg)

    shown(f"{single}/run", "optimizer.lr=0.01")
    # By itself: choices by their names, and what is varied most often, first.
    columns, _, rows = hparams(tmp_path / single)
    first = ["backend", "data", "data.batch_size", "model", "optimizer.lr", "seed"]
    assert list(columns)[:7] == [*first, "trainer.max_epochs"]
    assert [rows["run"][c] for c in first[:4]] == ["native", "fashion_mnist", 128, "lenet5"]
    member = {"backend": "im2col", "optimizer.lr": 0.02}
    shown("sweeps/one", "backend=im2col", "optimizer.lr=0.02", labels=member)
    columns, _, rows = hparams(tmp_path)  # of either schema
    assert set(rows) == {f"{single}/run", "sweeps/one"}
    assert not any(row[column] in ("", None) for row in rows.values() for column in columns)
    assert rows[f"{single}/run"]["backend"] == "native"
    assert rows["sweeps/one"]["backend"] == "im2col"


def test_accuracy_of_each_class(events: EventAccumulator, outputs: Any) -> None:
    _, shares, labels = outputs
    for k, name in enumerate(build(compose(OPTIONS).data).classes):
        (*_, last) = events.Scalars(f"val_class_acc/{name}")
        right = (shares[labels == k].argmax(1) == k).double().mean().item()
        assert last.step == 5
        assert last.value == pytest.approx(right, abs=1e-6)


def test_precision_and_recall_of_each_class(events: EventAccumulator, outputs: Any) -> None:
    _, shares, labels = outputs
    (*_, last) = events.Tensors("pr/Sneaker")
    true, wrong, _, missed, precision, recall = make_ndarray(last.tensor_proto)
    for i in (0, 30, 63, 100):
        positive = shares[:, 7] >= i / 126
        hits = int((positive & (labels == 7)).sum())
        assert true[i] == hits
        assert wrong[i] == int(positive.sum()) - hits
        assert missed[i] == int((labels == 7).sum()) - hits
        assert precision[i] == pytest.approx(hits / max(int(positive.sum()), 1e-7), abs=1e-6)
        assert recall[i] == pytest.approx(hits / int((labels == 7).sum()), abs=1e-6)


def test_histograms_hold_every_number(events: EventAccumulator, outputs: Any) -> None:
    network, *_ = outputs
    for name, parameter in network.named_parameters():
        for kind in ("weights", "gradients"):
            assert [e.step for e in events.Histograms(f"{kind}/{name}")] == [1, 2, 4, 5]
        (*_, last) = events.Histograms(f"weights/{name}")
        found, values = last.histogram_value, parameter.detach().numpy()
        assert sum(found.bucket) == found.num == values.size
        assert found.min == pytest.approx(values.min(), abs=1e-6)
        assert found.max == pytest.approx(values.max(), abs=1e-6)
        assert found.sum == pytest.approx(values.sum(), abs=1e-3)
        middle = found.bucket_limit[31]
        assert sum(found.bucket[:32]) == pytest.approx((values <= middle).sum(), abs=1)


def test_kernel_images_show_the_weights(events: EventAccumulator, outputs: Any) -> None:
    network, *_ = outputs
    weight = network.features[0].weight.detach()[:, 0]  # (6, 5, 5)
    shown = picture(events, "kernels/features.0").astype(int)
    side, cell = 55, 67  # five pixels of eleven, and gaps
    shown = shown[-(side + LINE + 3 * GAP) + GAP :, 6:]  # without its heading
    assert shown.shape[1] == 6 * cell - 6
    largest = weight.abs().max()
    for k in range(6):
        for y in range(5):
            for x in range(5):
                red, _, blue = shown[y * 11 + 5, k * cell + x * 11 + 5]
                value = (weight[k, y, x] / largest).item()
                if abs(value) > 0.05:
                    assert (red > blue) == (value > 0)
    assert (shown[:side, side : side + 4] == 255).all()


def test_feature_map_images(events: EventAccumulator, outputs: Any, run: Path) -> None:
    network, *_ = outputs
    loader = build(compose(OPTIONS).data).val_loader()
    rows = [int((loader.labels == k).nonzero()[0]) for k in range(4)]
    images, _ = next(iter(loader))
    with torch.no_grad():
        maps = network.features[0](images[rows])  # (4, 6, 28, 28)
    shown = picture(events, "features/features.0").astype(int)
    across, cell = 68, 2 * 28 + LINE + 3 * GAP
    shown = shown[-4 * cell + GAP :, 6:]  # without its heading
    assert shown.shape[1] == 7 * across - 6
    raw = loader.stored(torch.tensor(rows))[:, 0].numpy()
    assert (shown[0:56:2, 0:56:2, 0] == raw[0]).all()  # the image first
    share = (maps / maps.abs().max()).numpy()
    for i, c in [(0, 0), (1, 3), (3, 5)]:
        tile = shown[i * cell : i * cell + 56 : 2, (c + 1) * across : (c + 1) * across + 56 : 2]
        clear = np.abs(share[i, c]) > 0.05
        assert ((tile[..., 0] > tile[..., 2]) == (share[i, c] > 0))[clear].all()


def test_captions_and_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of feature maps and kernels of any number of channels: every tile has a number."""
    texts: list[tuple[list[str], str]] = []

    def captioned(tiles: torch.Tensor, captions: list[str], **options: Any) -> np.ndarray:
        assert len(tiles) == len(captions)
        texts.append((captions, options["heading"]))
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(insights.pictures, "captioned", captioned)
    inputs = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    insights._maps(torch.tensor([1.0, -2.5]).repeat(2, 20, 2, 1), inputs)
    insights._maps(torch.tensor([1.0, -2.5])[:, None, None].repeat(2, 20, 1, 1), inputs)
    insights._kernels(torch.tensor([1.0, -2.5]).repeat(80, 1, 2, 1))
    insights._kernels(torch.tensor([1.0, -2.5]).repeat(3, 20, 2, 1))
    insights._kernels(torch.tensor([1.0, -2.5]).repeat(3, 3, 2, 1))
    maps, strips, grey, deep, colour = texts
    signs = "Red is positive, blue negative, white 0; full colour is ±2.50, the same for all."
    assert all(heading.endswith(signs) for _, heading in (maps, strips, grey, deep))
    assert maps[0] == ["image", *map(str, range(16))] * 2
    assert "(the first 16 of 20)" in maps[1]
    assert strips == (["image 0", "image 1"], f"Channels 0 to 39 from left to right. {signs}")
    assert grey[0] == [str(i) for i in range(64)]
    assert "number of the kernel (the first 64 of 80)" in grey[1]
    assert deep[0][14:18] == ["0, 14", "0, 15", "1, 0", "1, 1"]
    assert "kernel, input channel (the first 16 of 20)" in deep[1]
    assert colour[0] == ["0", "1", "2"]
    assert "red, green and blue: -2.5 is dark, 1 is full" in colour[1]


def test_batch_image_shows_augmented_images(events: EventAccumulator) -> None:
    data = build(compose(OPTIONS).data)
    images, _ = data.train_loader(0).batch(0, 0)
    raw = ((images * 0.3530 + 0.2860) * 255).round().numpy()
    shown = picture(events, "train/batch", 1)
    cell_w = shown.shape[1] // 8
    x = (cell_w - 84) // 2
    assert (shown[GAP : GAP + 84 : 3, x : x + 84 : 3, 0] == raw[0, 0]).all()


def test_batch_image_names_both_classes_of_mixed_images(monkeypatch: Any) -> None:
    data, shown = build(compose(OPTIONS).data), []
    callback = insights.Insights(board=SimpleNamespace(experiment=Mock()), data=data)
    monkeypatch.setattr(
        insights.pictures, "captioned", lambda tiles, names, **_: shown.append((len(tiles), names))
    )
    labels = torch.zeros(40, 10)
    labels[:, 4], labels[:, 8] = 0.7, 0.3
    labels[1] = torch.eye(10)[9]
    batch = torch.zeros(40, 1, 28, 28), labels
    callback.on_train_batch_start(SimpleNamespace(current_epoch=0), None, batch, 0)
    assert shown[0][0] == 32
    assert shown[0][1][:2] == ["Coat 70%, Bag 30%", "Ankle boot 100%"]


def test_projector_has_the_inputs_of_the_last_layer(run: Path, outputs: Any) -> None:
    network, *_ = outputs
    images, labels = next(iter(build(compose(OPTIONS).data).test_loader()))
    with torch.no_grad():
        hidden = network.classifier[2](network.classifier[0](network.features(images)))
        predicted = network(images).argmax(1)
    points = np.loadtxt(run / "00005/projector/tensors.tsv", delimiter="\t")
    assert np.abs(points - hidden.numpy()).max() < 1e-4
    with (run / "00005/projector/metadata.tsv").open(newline="") as file:
        words = list(csv.DictReader(file, delimiter="\t"))
    names = build(compose(OPTIONS).data).classes
    assert [row["class"] for row in words] == [names[k] for k in labels]
    assert [row["predicted"] for row in words] == [names[k] for k in predicted]
    sprite = np.asarray(Image.open(run / "00005/projector/sprite.png")).astype(int)
    assert sprite.shape == (32 * 32, 32 * 32, 3)  # 28 pixels, and 2 of the frame on each side
    raw = build(compose(OPTIONS).data).test_loader().images[33, 0].numpy()
    tiles = sprite.reshape(32, 32, 32, 32, 3).swapaxes(1, 2).reshape(1024, 32, 32, 3)[:1000]
    assert (tiles[33, 2:30, 2:30] == raw[..., None]).all()
    frames = {int(k): tuple(tiles[i, 0, 0]) for i, k in enumerate(labels)}
    assert all((tiles[i, :2] == frames[int(k)]).all() for i, k in enumerate(labels))
    colours = np.array(list(frames.values()))  # of the classes: far apart, and no grey
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(10, dtype=int)
    assert apart.min() > 30


def test_config_environment_graph_and_charts(events: EventAccumulator, run: Path) -> None:
    (config,) = events.Tensors("config/text_summary")
    text = make_ndarray(config.tensor_proto).item().decode()
    shown = OmegaConf.create("\n".join(line[4:] for line in text.splitlines()))
    assert shown == OmegaConf.load(run / ".hydra/config.yaml")
    (environment,) = events.Tensors("environment/text_summary")
    assert torch.__version__.split("+")[0] in make_ndarray(environment.tensor_proto).item().decode()
    graph = events.Graph()
    assert isinstance(graph, GraphDef)
    assert [node.name for node in graph.node][:2] == ["images", "features/0.NativeConv2d"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_data_share(events: EventAccumulator) -> None:
    shares = [event.value for event in events.Scalars("wall_time/data_share")]
    assert len(shares) == 5
    assert all(0 < share < 1 for share in shares)


EVERYTHING = {
    "speed": ["scalars wall_time/images_per_second", "scalars wall_time/data_share"],
    "text": ["tensors config/text_summary", "tensors environment/text_summary"],
    "graph": [],
    "batch": ["images train/batch"],
    "kernels": ["images kernels/features.0"],
    "features": ["images features/features.0"],
    "histograms": ["histograms weights/features.0.bias", "histograms gradients/features.0.bias"],
    "classes": ["scalars val_class_acc/Bag"],
    "confusion": ["images val/confusion", "images test/confusion"],
    "mistakes": ["images val/mistakes", "images test/mistakes"],
    "pr_curves": ["tensors pr/Bag"],
    "embedding": [],
    "charts": ["tensors custom_scalars__config__"],
}


def tags(directory: Path) -> set[str]:
    found = read(directory).Tags()
    return {
        f"{kind} {tag}" for kind, known in found.items() if isinstance(known, list) for tag in known
    }


@pytest.mark.parametrize("names", [[*EVERYTHING][::2], [*EVERYTHING][1::2]], ids=" ".join)
def test_options_switch_parts_off(names: list[str], run: Path, tmp_path: Path) -> None:
    off = [f"tensorboard.{name}=false" for name in names]
    result = train(compose([*OPTIONS, "trainer.max_epochs=1", *off]), tmp_path / "run")
    there = tags(tmp_path / "run")
    for name, known in EVERYTHING.items():
        assert set(known) <= tags(run)
        assert bool(set(known) & there) == (name not in names) or not known
    assert read(tmp_path / "run").Tags()["graph"] == ("graph" not in names)
    assert (tmp_path / "run/projector_config.pbtxt").exists() == ("embedding" not in names)
    assert result.metrics["val/acc"] > 0.2


def test_scalars_only(tmp_path: Path) -> None:
    options = [*OPTIONS, "trainer.max_epochs=1", "tensorboard=scalars"]
    train(compose(options), tmp_path / "run")
    found = read(tmp_path / "run").Tags()
    assert found["images"] == found["histograms"] == []
    assert {"train/loss", "val/acc", "wall_time/data_share"} <= set(found["scalars"])


def test_logging_changes_no_result(tmp_path: Path, run: Path) -> None:
    shown, not_shown = compose(OPTIONS), compose([*OPTIONS, "tensorboard=scalars"])
    assert config_hash(shown) == config_hash(not_shown)
    train(not_shown, tmp_path / "run")
    first, second = (json.loads((d / "result.json").read_text()) for d in (run, tmp_path / "run"))
    assert first["metrics"] == second["metrics"]


def test_other_kinds_of_networks_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes, one channel, feature maps that are a pixel; a network without a linear layer."""
    train(compose(["experiment=shallow_by_hand", "trainer.max_epochs=2"]), tmp_path / "signs")
    assert "images features/features.0" in tags(tmp_path / "signs")
    monkeypatch.setattr(insights, "POINTS", 50)
    squeeze = ["model=torchvision", "model.name=squeezenet1_1", "model.small_images=true"]
    few = ["trainer.max_epochs=1", "+trainer.limit_train_batches=1", "data.eval_batch_size=50"]
    few += ["+trainer.limit_test_batches=1"]
    train(compose([*OPTIONS[:-1], *squeeze, *few, "data.val_size=50"]), tmp_path / "squeeze")
    points = np.loadtxt(tmp_path / "squeeze/00001/projector/tensors.tsv", delimiter="\t")
    assert points.shape == (50, 512)


def test_more_images_of_few_classes(tmp_path: Path) -> None:
    train(compose(["experiment=strokes", "trainer.max_epochs=1"]), tmp_path / "run")
    maps = picture(read(tmp_path / "run"), "features/features.0", 1)
    cell = 54 + LINE + 3 * GAP  # six pixels of nine, and the number of the channel
    first = maps[-4 * cell + GAP :, 6 : 6 + 54]  # the drawing itself, before ten channels
    rows = [first[i * cell : i * cell + 54] for i in range(4)]
    assert all(row.min() == 0 for row in rows)
    assert len({row.tobytes() for row in rows}) == 4


def test_no_projector_for_too_large_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(insights, "NUMBERS", 83)  # of 84
    result = train(compose([*OPTIONS, "trainer.max_epochs=1"]), tmp_path / "run")
    assert "no projector: the last layer has 84 inputs per image" in caplog.messages
    assert not (tmp_path / "run/projector_config.pbtxt").exists()
    assert "test/acc" in result.metrics


def test_no_histogram_of_non_finite_values(tmp_path: Path) -> None:
    """With the deferred NaN check, histograms may be logged before the run stops."""
    board = TensorBoard(tmp_path)
    board.resume({})
    for values in ([1.0, math.nan], [math.inf, 0.0], [1.0, 1.0]):
        board.histogram("weights", torch.tensor(values), 0)
    board.experiment.close()
    (found,) = read(tmp_path).Histograms("weights")
    assert sum(found.histogram_value.bucket) == 2


def test_mistyped_options_are_rejected() -> None:
    with pytest.raises(ConfigError, match="tensorboard has no option 'kernls'; did you mean 'ker"):
        compose([*OPTIONS, "tensorboard.kernls=false"])
    with pytest.raises(ConfigError, match=r"tensorboard.every_n_epochs=0: input should be greater"):
        compose([*OPTIONS, "tensorboard.every_n_epochs=0"])


@pytest.mark.parametrize("known", [False, True])
def test_a_folder_in_place_of_an_event_file_is_renamed(known: bool, tmp_path: Path) -> None:
    """So that TensorBoard, which reads what is called tfevents, can read the resumed run."""
    name = "events.out.tfevents.1.a.1.0"
    (tmp_path / name).mkdir()
    board = TensorBoard(tmp_path)
    board.resume({name: 10} if known else {})
    board.log_metrics({"train/loss": 0.5}, 1)
    board.experiment.close()
    assert (tmp_path / name.replace("tfevents", "damaged")).is_dir()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [0.5]
