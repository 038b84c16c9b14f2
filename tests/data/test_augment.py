"""Augmentation by torchvision's transforms, mixup and CutMix, in the loader."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, ks_2samp, kstest
from torchvision.transforms import v2

from cnntrain.config import ConfigError, build, compose
from cnntrain.config.cross_checks import cross_check_data
from cnntrain.data import Augment, FashionMNISTMini, Loader
from cnntrain.training import CrossEntropy, dry_run

N, BATCH, SEED, EPOCH = 23, 5, 3, 2
H, W = 12, 10
BILINEAR = v2.InterpolationMode.BILINEAR
TRANSFORMS = {
    "random_resized_crop": 0.35,
    "rotate": 20.0,
    "translate": 0.2,
    "scale": [0.8, 1.2],
    "shear": 10.0,
    "trivial_augment": True,
    "color_jitter": 0.4,
}
EVERYTHING = {"hflip": 0.5, "vflip": 0.5, "crop": 2, "erase": 0.5, **TRANSFORMS}
MIXING = {"mixup": 0.3, "cutmix": 1.0}


def samples(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (n, 3, H, W)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), torch.arange(n)


def make(n: int = N, **options: Any) -> Loader:
    """A loader whose normalised images have the values of the stored ones."""
    names = {"batch_size", "rank", "world", "shuffle", "augment_epochs"} & set(options)
    chosen = {name: options.pop(name) for name in names}
    chosen = {"batch_size": BATCH, "seed": SEED, "num_classes": n, **chosen}
    return Loader(*samples(n), mean=0.0, std=1 / 255, augment=Augment(**options), **chosen)


def epoch(loader: Loader, number: int = EPOCH) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader.batches(number), strict=True)
    return torch.cat(images), torch.cat(labels)


def same(ours: Any, theirs: Any) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


AFFINE: dict[str, Any] = {"degrees": 0.0, "translate": (0, 0), "scale": (1, 1), "shear": 0.0}


def affine(**options: Any) -> v2.Transform:
    return v2.RandomAffine(**{**AFFINE, **options}, interpolation=BILINEAR)


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({"random_resized_crop": 0.35}, v2.RandomResizedCrop((H, W), scale=(0.35, 1.0))),
        ({"rotate": 20.0}, affine(degrees=20.0)),
        ({"translate": 0.2}, affine(translate=(0.2, 0.2))),
        ({"scale": [0.8, 1.2]}, affine(scale=(0.8, 1.2))),
        ({"shear": 10.0}, affine(shear=10.0)),
        ({"trivial_augment": True}, v2.TrivialAugmentWide(interpolation=BILINEAR)),
        ({"color_jitter": 0.4}, v2.ColorJitter(0.4, 0.4, 0.4, 0.1)),
        ({"color_jitter": [0.1, 0.2, 0.3, 0.4]}, v2.ColorJitter(0.1, 0.2, 0.3, 0.4)),
        (
            TRANSFORMS,
            v2.Compose(
                [
                    v2.RandomResizedCrop((H, W), scale=(0.35, 1.0)),
                    affine(degrees=20.0, translate=(0.2, 0.2), scale=(0.8, 1.2), shear=10.0),
                    v2.TrivialAugmentWide(interpolation=BILINEAR),
                    v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
                ]
            ),
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_transforms_are_those_of_torchvision(options: Any, oracle: v2.Transform) -> None:
    loader = make(shuffle=True, **options)
    images, labels = epoch(loader)
    stream = int(np.random.SeedSequence([SEED, EPOCH, 2]).generate_state(1, np.uint64)[0])
    seeds = torch.randint(2**63 - 1, (N,), generator=torch.Generator().manual_seed(stream))
    stored, changed = samples()[0], 0
    for image, label, seed in zip(images, labels, seeds.tolist(), strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = oracle(stored[label])
        torch.testing.assert_close(image, expected.float(), rtol=0, atol=1e-3)
        changed += not torch.equal(expected, stored[label])
    assert changed > N / 2


def test_vertical_flip() -> None:
    stored = samples()[0].float()
    images, _ = epoch(make(vflip=0.5))
    kept = torch.isclose(images, stored, atol=1e-3).flatten(1).all(1)
    flipped = torch.isclose(images, stored.flip(2), atol=1e-3).flatten(1).all(1)
    assert (kept ^ flipped).all()
    assert 5 < flipped.sum() < 18
    # It changes none of the others.
    options = {"hflip": 0.5, "crop": 2, "erase": 0.5}
    drawn = [
        Augment(vflip=p, **options).draw(50, H, W, torch.Generator().manual_seed(0))
        for p in (0.0, 1.0)
    ]
    assert torch.equal(drawn[0][:7], drawn[1][:7])
    assert (drawn[0][7] == 0).all()
    assert (drawn[1][7] == 1).all()


@pytest.mark.parametrize("mixing", [{}, MIXING], ids=["", "mixing"])
def test_batches_are_functions_of_seed_epoch_and_step(mixing: Any) -> None:
    options = {"shuffle": True, **EVERYTHING, **mixing}
    loader = make(**options)
    whole = list(loader.batches(EPOCH))
    assert same([make(**options).batch(EPOCH, k) for k in range(len(loader))], whole)
    assert same(loader.batches(EPOCH, 3), whole[3:])  # a resumed epoch
    together = make(**options)
    together.chunk_batches = 3
    assert same(together.batches(EPOCH), whole)
    assert same(together.batches(EPOCH, 1), whole[1:])
    assert not torch.equal(whole[0][0], loader.batch(EPOCH + 1, 0)[0])


def test_processes_and_batch_sizes_do_not_change_an_image() -> None:
    options = {"shuffle": True, **EVERYTHING}
    whole = epoch(make(**options))
    for world in (2, 3, 4):  # the last batch has three images: the share of rank 3 is empty
        shares = [make(rank=r, world=world, **options).batches(EPOCH) for r in range(world)]
        for (images, labels), *parts in zip(make(**options).batches(EPOCH), *shares, strict=True):
            for rank, part in enumerate(parts):
                assert same([part], [(images[rank::world], labels[rank::world])])
    assert same([epoch(make(batch_size=7, **options))], [whole])


def test_global_random_state_is_kept() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = list(make(**EVERYTHING, **MIXING).batches(0))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], of_numpy)  # noqa: NPY002
    torch.manual_seed(2)
    assert same(make(**EVERYTHING, **MIXING).batches(0), first)
    loader = make(**EVERYTHING)
    loader.images = loader.images[:, :2]  # torchvision rejects two channels
    before = torch.get_rng_state()
    with pytest.raises(TypeError):
        loader.batch(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_flips_continue_after_augment_epochs() -> None:
    options = {**EVERYTHING, **MIXING, "augment_epochs": 2}
    images, labels = epoch(make(**options), 1)
    assert same([epoch(make(**{**options, "augment_epochs": None}), 1)], [(images, labels)])
    assert labels.shape == (N, N)
    assert same([epoch(make(**options), 2)], [epoch(make(hflip=0.5, vflip=0.5), 2)])
    assert epoch(make(**options), 2)[1].dtype == torch.int64


def previous(values: np.ndarray) -> np.ndarray:
    """Of each sample the one before it in its batch."""
    parts = [values[i : i + BATCH] for i in range(0, len(values), BATCH)]
    return np.concatenate([np.roll(part, 1, axis=0) for part in parts])


def test_mixup_against_numpy() -> None:
    plain = epoch(make(hflip=0.5, shuffle=True))
    images, labels = (part.numpy() for part in epoch(make(hflip=0.5, shuffle=True, mixup=0.3)))
    x, y = (part.numpy() for part in plain)
    weight = labels[np.arange(N), y]
    expected = np.zeros((N, N))
    expected[np.arange(N), y] = weight
    expected[np.arange(N), previous(y)] += 1 - weight
    np.testing.assert_allclose(labels, expected, atol=1e-6)
    w = weight[:, None, None, None].astype(np.float64)
    np.testing.assert_allclose(images, w * x + (1 - w) * previous(x), atol=1e-3)
    assert len(set(weight.tolist())) == N


def test_cutmix_against_numpy() -> None:
    x, y = (part.numpy() for part in epoch(make(shuffle=True)))
    images, labels = (part.numpy() for part in epoch(make(shuffle=True, cutmix=1.0)))
    other, cut = previous(x), 0
    for i in range(N):
        changed = (images[i] != x[i]).any(0)  # (H, W)
        share = labels[i, y[i]]
        assert labels[i, previous(y)[i]] == pytest.approx(1 - share, abs=1e-6)
        assert labels[i].sum() == pytest.approx(1)
        if not changed.any():
            assert share == 1
            continue
        cut += 1
        rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        np.testing.assert_array_equal(images[i][box], other[i][box])
        assert 1 - share == pytest.approx(images[i][box][0].size / (H * W), abs=1e-6)
    assert cut > N / 2


def test_weights_have_the_distributions_of_torchvision() -> None:
    n, rng = 2000, np.random.default_rng(0)
    weight, *box = Augment(mixup=0.3).draw_mixing(n, 8, H, W, rng).numpy()
    assert kstest(weight, beta(0.3, 0.3).cdf).pvalue > 0.01
    assert (np.stack(box) == np.array([[0], [0], [H], [W]])).all()
    weight, top, left, height, width = Augment(cutmix=1.0).draw_mixing(n, 8, H, W, rng).numpy()
    assert (weight == 0).all()
    oracle = v2.CutMix(alpha=1.0, num_classes=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [oracle.make_params([torch.zeros(2, 1, H, W)]) for _ in range(n)]
    boxes = np.array([p["box"] for p in drawn]).T  # left, top, right, bottom
    ours = [left, top, left + width, top + height]
    for found, expected in zip(ours, boxes, strict=True):
        assert ks_2samp(found, expected).pvalue > 0.01
    area = np.rint([H * W * (1 - p["lam_adjusted"]) for p in drawn])  # pixels
    assert ks_2samp(height * width, area).pvalue > 0.01


def test_each_batch_takes_mixup_or_cutmix() -> None:
    n, size = 4001, 8
    drawn = Augment(**MIXING).draw_mixing(n, size, H, W, np.random.default_rng(1)).numpy()
    is_mixup = drawn[3] * drawn[4] == H * W
    is_cutmix = (drawn[0] == 0) & ~is_mixup
    batches = [slice(i, i + size) for i in range(0, n, size)]
    kinds = [bool(is_mixup[batch].all()) for batch in batches]
    assert all(m or is_cutmix[batch].all() for m, batch in zip(kinds, batches, strict=True))
    assert abs(np.mean(kinds) - 0.5) < 4 * math.sqrt(0.25 / len(kinds))


def test_mixing_stays_within_the_share_of_a_process() -> None:
    options = {"shuffle": True, "mixup": 0.3}
    shares = [list(make(rank=r, world=4, **options).batches(EPOCH)) for r in range(4)]
    assert shares[3][-1][0].shape == (0, 3, H, W)
    assert shares[3][-1][1].shape == (0, N)
    images, labels = make(shuffle=True, rank=1, world=4).batch(EPOCH, 4)
    assert len(labels) == 1  # an image alone is mixed with itself
    torch.testing.assert_close(shares[1][-1][0], images)
    assert shares[1][-1][1][0, labels[0]] == 1
    # The weight of an image does not depend on the number of processes.
    order = make(**options).indices(EPOCH, 0)
    whole = make(**options).batch(EPOCH, 0)[1]
    assert shares[2][0][1][0, order[2]] == 1  # alone as well
    two = make(rank=0, world=2, **options).batch(EPOCH, 0)[1]
    assert torch.equal(two[1, order[2]], whole[2, order[2]])


def test_mixed_labels_of_a_data_set() -> None:
    data = FashionMNISTMini(batch_size=10, cutmix=1.0)
    _, labels = data.train_loader().batch(0, 0)
    assert labels.shape == (10, 10)
    assert data.val_loader().batch(0, 0)[1].dtype == torch.int64
    logits = torch.randn(10, 10)
    expected = -(labels * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(CrossEntropy()(logits, labels), expected)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("data.rotate=200", "data.rotate=200: input should be less than or equal to 180"),
        ("data.mixup=-1", "data.mixup=-1: input should be greater than or equal to 0"),
        ("data.scale=[1.2,0.8]", "data.scale=[1.2, 0.8]: give the smallest factor first"),
        ("data.scale=[1.0]", "data.scale=[1.0]: has too few values"),
        ("data.color_jitter=[0.1,0.1]", "data.color_jitter=[0.1, 0.1]: "),
        ("data.vflp=1", "did you mean 'vflip'"),
        (
            "data=two_signs model=shallow loss=half_squared_error +data.mixup=0.2",
            "loss: takes no labels mixed by data.mixup or cutmix; loss=cross_entropy does",
        ),
    ],
    ids=lambda value: value[:20],
)
def test_mistakes(options: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dry_run(compose(["data=fashion_mnist_mini", "trainer=cpu", *options.split()]))
    (line,) = caught.value.problems
    assert problem in line


def test_colour_operations_need_one_or_three_channels() -> None:
    cfg = compose(["data=fashion_mnist_mini", "data.trivial_augment=true", "data.color_jitter=0.4"])
    sizes = {"train_size": 20, "val_size": 4, "batch_size": 4, "eval_batch_size": 4}
    problem = "is for images with 1 or 3 channels, not 2; leave it out"
    assert cross_check_data(cfg, SimpleNamespace(shape=(2, 28, 28), **sizes)) == [
        f"data.trivial_augment=true: {problem}",
        f"data.color_jitter=0.4: {problem}",
    ]
    assert cross_check_data(cfg, SimpleNamespace(shape=(3, 28, 28), **sizes)) == []


def test_options_reach_the_data_set() -> None:
    cfg = compose(
        ["data=fashion_mnist_mini", "data.scale=[0.5,2]", "data.color_jitter=[0.1,0,0,0]"]
    )
    dry_run(cfg)
    expected = Augment(scale=(0.5, 2.0), color_jitter=[0.1, 0, 0, 0])  # type: ignore[arg-type]
    assert build(cfg.data).augment == expected
