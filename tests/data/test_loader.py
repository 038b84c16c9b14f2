"""Loader and augmentation."""

import threading

import numpy as np
import pytest
import torch

from cnntrain.data import (
    Augment,
    FashionMNISTMini,
    Loader,
    loader,
)

N, BATCH = 103, 10


def samples(n: int = N, channels: int = 1, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, size, size - 2)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), torch.arange(n)


def make(**options) -> Loader:
    images, labels = samples(channels=options.pop("channels", 1))
    options = {"mean": (0.25,), "std": (0.5,), "shuffle": True, **options}
    return Loader(images, labels, options.pop("batch_size", BATCH), **options)


def epoch(loader: Loader, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    loader.set_epoch(number)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(1, (0.286,), (0.353,)), (1, 0.286, 0.353), (3, (0.1, 0.4, 0.6), (0.2, 0.25, 0.3))],
)
def test_normalisation(channels, mean, std):
    images, labels = samples(channels=channels)
    got, targets = epoch(Loader(images, labels, BATCH, mean=mean, std=std))
    m, s = (np.reshape(v, (-1, 1, 1)).astype(np.float64) for v in (mean, std))
    expected = (images.numpy() / 255.0 - m) / s
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert targets.tolist() == list(range(N))
    assert targets.dtype == torch.int64


def test_batches_and_the_smaller_last_one():
    loader = make()
    sizes = [(len(images), len(labels)) for images, labels in loader]
    assert len(loader) == len(sizes) == 11
    assert sizes == [(10, 10)] * 10 + [(3, 3)]
    assert [len(make(batch_size=size)) for size in (1, 103, 104)] == [103, 1, 1]


def test_each_sample_once_with_its_label():
    loader = make()
    images, labels = epoch(loader, 4)
    assert sorted(labels.tolist()) == list(range(N))
    plain, _ = epoch(make(shuffle=False))
    assert torch.equal(images, plain[labels])


def test_order_is_a_function_of_seed_and_epoch():
    order = {
        (seed, number): tuple(epoch(make(seed=seed), number)[1].tolist())
        for seed in range(3)
        for number in range(3)
    }
    assert len(set(order.values())) == 9  # seed + epoch would give 5
    loader = make(seed=1)
    epoch(loader, 7)  # previous epochs have no influence
    assert tuple(epoch(loader, 2)[1].tolist()) == order[1, 2]
    assert tuple(epoch(make(batch_size=7, seed=1), 2)[1].tolist()) == order[1, 2]


def test_crops_and_erasing_end_before_training_does():
    options = {"augment": Augment(hflip=0.5, crop=2, erase=0.5)}
    flips = {"augment": Augment(hflip=0.5)}
    for number, expected in [(1, options), (2, flips), (3, flips)]:
        images, labels = epoch(make(augment_epochs=2, **options), number)
        wanted, order = epoch(make(**expected), number)
        assert torch.equal(images, wanted)
        assert torch.equal(labels, order)
    crops = {"augment": Augment(crop=2)}
    assert torch.equal(epoch(make(augment_epochs=0, **crops))[0], epoch(make())[0])


def test_chunks_of_batches_are_the_same_batches():
    for options in ({"augment": Augment(hflip=0.5, crop=2, erase=0.5)}, {"rank": 1, "world": 3}):
        loader, together = make(**options), make(**options)
        together.chunk_batches = 3
        for start in (0, 1):
            one, several = list(loader.batches(4, start)), list(together.batches(4, start))
            assert len(one) == len(several) == len(loader) - start
            for a, b in zip(one, several, strict=True):
                assert torch.equal(a[0], b[0])
                assert torch.equal(a[1], b[1])


def test_iterator_made_before_the_epoch_is_set():
    """As Lightning does in the first epoch of a fit."""
    loader = make()
    iterator = iter(loader)
    loader.batch_sampler.sampler.set_epoch(5)
    assert torch.equal(next(iterator)[1], epoch(make(), 5)[1][:BATCH])


def test_augmentation_is_a_function_of_seed_epoch_and_position():
    options = {"augment": Augment(hflip=0.5, crop=2, erase=0.5)}
    images, labels = epoch(make(**options), 1)
    again, _ = epoch(make(**options), 1)
    assert torch.equal(images, again)
    # Not of the batch size, and the order does not change.
    other, _ = epoch(make(batch_size=7, **options), 1)
    assert torch.equal(images, other)
    plain, order = epoch(make(), 1)
    assert torch.equal(labels, order)
    assert not torch.equal(images, plain)
    assert not torch.equal(images, epoch(make(seed=1, **options), 1)[0])


def test_global_random_state_is_not_changed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = epoch(make(augment=Augment(0.5, 2, 0.5)))[0]
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    torch.manual_seed(1)
    assert torch.equal(epoch(make(augment=Augment(0.5, 2, 0.5)))[0], first)


def test_images_that_do_not_fit_are_moved_batch_by_batch(monkeypatch):
    expected = epoch(make(augment=Augment(0.5, 2, 0.5)))
    monkeypatch.setattr(loader, "fits", lambda nbytes, device: False)
    got = epoch(make(augment=Augment(0.5, 2, 0.5)))
    assert all(map(torch.equal, got, expected))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert [loader.fits(n, torch.device("cuda")) for n in (500, 501)] == [True, False]
    assert loader.fits(10**15, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("resident", [True, False])
def test_gpu_gets_the_same_batches_without_synchronisation(monkeypatch, resident):
    options = {"augment": Augment(hflip=0.5, crop=2, erase=0.5)}
    expected = epoch(make(**options), 1)
    monkeypatch.setattr(loader, "fits", lambda nbytes, device: resident)
    on_gpu = make(device="cuda", **options)
    epoch(on_gpu)  # the first pinned buffers are allocated here
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, labels = epoch(on_gpu, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert images.is_cuda
    torch.testing.assert_close(images.cpu(), expected[0])
    assert torch.equal(labels.cpu(), expected[1])


def augmented_by_loops(image: np.ndarray, crop: int, parameters: list[int]) -> np.ndarray:
    """Crop, flip and erasing of one (C, H, W) image, pixel by pixel."""
    flip, row, column, top, left, height, width, _ = parameters
    channels, h, w = image.shape
    out = np.zeros_like(image)
    for c in range(channels):
        for i in range(h):
            for j in range(w):
                y = i + row - crop
                x = (w - 1 - j if flip else j) + column - crop
                erased = top <= i < top + height and left <= j < left + width
                if 0 <= y < h and 0 <= x < w and not erased:
                    out[c, i, j] = image[c, y, x]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "augment",
    [Augment(hflip=0.5), Augment(crop=3), Augment(erase=0.7), Augment(0.5, 1, 0.7)],
    ids=["hflip", "crop", "erase", "all"],
)
def test_augmentation_against_loops(augment, dtype):
    images = samples(40, channels=2)[0].to(dtype)
    before = images.clone()
    generator = torch.Generator().manual_seed(3)
    parameters = augment.draw(40, *images.shape[2:], generator)
    got = augment.apply(images, parameters)
    assert got.dtype == dtype
    assert torch.equal(images, before)
    for image, result, drawn in zip(images.numpy(), got.numpy(), parameters.T, strict=True):
        np.testing.assert_array_equal(
            result, augmented_by_loops(image, augment.crop, drawn.tolist())
        )


def test_no_augmentation_is_the_identity():
    images = samples()[0]
    assert not Augment()
    for augment, expected in [(Augment(), images), (Augment(hflip=1.0), images.flip(-1))]:
        parameters = augment.draw(N, *images.shape[2:], torch.Generator())
        assert torch.equal(augment.apply(images, parameters), expected)


def test_rates_and_ranges():
    n = 20_000
    augment = Augment(hflip=0.3, crop=2, erase=0.4)
    drawn = augment.draw(n, 28, 28, torch.Generator().manual_seed(0)).double()
    flip, row, column, top, left, height, width, _ = drawn
    assert abs(flip.mean() - 0.3) < 0.015  # 4.6 standard deviations of a binomial
    for offset in (row, column):
        counts = torch.bincount(offset.long(), minlength=5) / n
        assert len(counts) == 5
        assert ((counts - 0.2).abs() < 0.013).all()
    erased = height > 0
    assert abs(erased.double().mean() - 0.4) < 0.016
    assert torch.equal(erased, width > 0)
    h, w = height[erased], width[erased]
    # Rounding of sides moves area and ratio a little past their bounds.
    area = h * w / 784
    assert 0.012 < area.min() < 0.03
    assert 0.31 < area.max() < 0.36
    assert abs(area.mean() - 0.175) < 0.005
    assert abs(torch.log(h / w).mean()) < 0.03
    assert (top + height).max() <= 28
    assert (left + width).max() <= 28
    assert top[erased].min() == left[erased].min() == 0
    # Where a rectangle fits, every position is alike: on average half of what is free.
    assert abs(((top[erased] + 0.5) / (29 - h)).mean() - 0.5) < 0.015


def test_erasing_does_not_change_other_parameters():
    draws = [
        Augment(0.5, 2, erase).draw(50, 28, 28, torch.Generator().manual_seed(0))
        for erase in (0.0, 1.0)
    ]
    assert torch.equal(draws[0][:3], draws[1][:3])
    assert (draws[1][5:7] > 0).all()
    assert (draws[0][3:] == 0).all()


def test_mini_loaders():
    data = FashionMNISTMini(batch_size=64, eval_batch_size=300, hflip=0.5)
    train, val, test = data.train_loader(seed=3), data.val_loader(), data.test_loader()
    assert (len(train), len(val), len(test)) == (71, 2, 4)
    assert (len(train.labels), len(val.labels), len(test.labels)) == (4500, 500, 1000)
    assert train.augment == Augment(hflip=0.5)
    assert not val.augment
    x, y = next(iter(train))
    assert (x.shape, y.shape) == ((64, 1, 28, 28), (64,))
    _, labels = data.read("train")
    kept, held_out = data.split()
    assert torch.equal(epoch(val)[1], torch.from_numpy(labels[held_out].astype(np.int64)))
    assert train.labels.tolist() == labels[kept].tolist()
    assert (data.shape, data.num_classes, data.classes[9]) == ((1, 28, 28), 10, "Ankle boot")


def imbalanced(**options) -> Loader:
    """100 images: 80 of class 0, none of 1, 15 of 2 and 5 of 3, not in order."""
    images, _ = samples(100)
    kinds = torch.tensor([0] * 80 + [2] * 15 + [3] * 5)
    labels = kinds[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    options = {"shuffle": True, "sampler": "balanced", **options}
    return Loader(images, labels, 10, mean=0.25, std=0.5, **options)


def test_balanced_sampler_draws_each_image_by_the_size_of_its_class():
    loader, epochs = imbalanced(), 400
    rows = torch.cat([loader.indices(e, b) for e in range(epochs) for b in range(len(loader))])
    assert len(rows) == 100 * epochs
    found = rows.bincount(minlength=100).numpy()
    labels = loader.labels.numpy()
    expected = 100 * epochs / 3 / np.bincount(labels)[labels]
    # Chi-squared with 99 degrees of freedom: mean 99, standard deviation 14.
    assert ((found - expected) ** 2 / expected).sum() < 99 + 4 * 14


def test_balanced_sampler_is_a_function_of_seed_and_epoch():
    images, labels = epoch(imbalanced(seed=2), 3)
    other = imbalanced(seed=2)
    epoch(other, 1)  # what was drawn before has no effect
    assert torch.equal(epoch(other, 3)[0], images)
    assert not torch.equal(epoch(imbalanced(seed=2), 4)[0], images)
    assert not torch.equal(epoch(imbalanced(seed=3), 3)[0], images)
    rows = torch.cat([imbalanced(seed=2).indices(3, batch) for batch in range(10)])
    assert torch.equal(imbalanced().labels[rows], labels)
    assert rows[:8].tolist() == [40, 96, 18, 34, 23, 15, 9, 29]  # on every machine
    for rank in range(2):
        part = imbalanced(seed=2, rank=rank, world=2).indices(3, 0)
        assert torch.equal(part, rows[:10][rank::2])
    assert imbalanced(shuffle=False).indices(3, 1).tolist() == list(range(10, 20))


def threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_prefetched_batches_are_the_same(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, samples()[0].numpy())
    mapped = torch.from_numpy(np.load(path, mmap_mode="c"))
    options = {"mean": 0.25, "std": 0.5, "shuffle": True, "augment": Augment(0.5, 2, 0.5)}
    options["rows"] = torch.arange(0, N, 2)
    labels = torch.arange(0, N, 2)
    loaders = [Loader(mapped, labels, BATCH, prefetch=ahead, **options) for ahead in (False, True)]
    assert loaders[1].images.data_ptr() == mapped.data_ptr()  # not copied
    expected = list(loaders[0].batches(1))
    loaders[1].chunk_batches = 2
    for start in (0, 2, 5, 6):
        found = list(loaders[1].batches(1, start))
        assert len(found) == len(expected) - start
        for ours, theirs in zip(found, expected[start:], strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert torch.equal(loaders[1].batch(1, 3)[0], expected[3][0])
    assert threads() == 0


def test_prefetching_is_two_groups_ahead_and_ends_with_the_iteration(monkeypatch):
    loader, gathered = make(prefetch=True), []
    loader.chunk_batches, stored = 1, loader.stored

    def gather(rows):
        assert threading.current_thread() is not threading.main_thread()
        gathered.append(len(rows))
        if len(gathered) == 6:
            raise OSError("disk failed")
        return stored(rows)

    monkeypatch.setattr(loader, "stored", gather)
    batches = iter(loader)
    next(batches)
    assert threads() == 1
    batches.close()  # waits for what has begun
    assert 1 <= len(gathered) <= 3
    assert threads() == 0
    gathered.clear()
    found = []
    with pytest.raises(OSError, match="disk failed"):
        found.extend(batch for batch in loader)
    assert len(found) < 6
    assert threads() == 0


def test_images_on_the_device_are_not_prefetched(monkeypatch):
    assert make(prefetch=True).prefetch
    assert not make(prefetch=True, device="meta").prefetch
