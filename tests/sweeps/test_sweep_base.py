"""A sweep's base config: what may not change under the same name, and what may."""

from pathlib import Path

import pytest
from sweeps_of_records import COMPARE, rows, run, sweeping

from cnntrain.config import ConfigError


def test_another_base_is_rejected(tmp_path: Path) -> None:
    run(tmp_path / "s", *COMPARE, "data.crop=1")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "s", *COMPARE, "seed=5,6", "optimizer=sgd", "trainer.max_epochs=3")
    assert [problem.partition("; ")[0] for problem in caught.value.problems] == [
        "data.crop=0: the sweep was begun with 1",
        "optimizer=sgd: the sweep was begun with adam",
        "trainer.max_epochs=3: the sweep was begun with 10",
    ]
    assert all("sweep=<name>" in problem for problem in caught.value.problems)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_another_config_of_a_member_is_rejected(tmp_path: Path) -> None:
    run(tmp_path / "s", "backend=native,im2col")
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "s", "backend=im2col", "+backend.max_column_mib=2")
    (problem,) = caught.value.problems
    assert "/backend=im2col: backend.max_column_mib=2: the sweep was begun with" in problem


@pytest.mark.parametrize("option", ["+trainer.limit_train_batches=3", "+optimizer.amsgrad=true"])
def test_added_and_removed_options_are_another_base(tmp_path: Path, option: str) -> None:
    """Also with new members only."""
    run(tmp_path / "without", "model=shallow", "seed=0,1")
    key, value = option.strip("+").split("=")
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "without", "model=shallow", "seed=7", option)
    assert [problem.partition("; ")[0] for problem in caught.value.problems] == [
        f"{key}={value}: the sweep was begun without it"
    ]
    run(tmp_path / "with", "model=shallow", "seed=0,1", option)
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "with", "model=shallow", "seed=7")
    assert [problem.partition("; ")[0] for problem in caught.value.problems] == [
        f"{key} (left out): the sweep was begun with {value}"
    ]


def test_an_edited_file_is_another_base(tmp_path: Path) -> None:
    """Without any other override, and with new members only."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ndata:\n  crop: 1\n")
    typed = ["--config-dir", str(tmp_path), "experiment=mine", "data=fashion_mnist_mini"]
    run(tmp_path / "s", *typed, "seed=0")
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ndata:\n  crop: 2\n")
    with pytest.raises(ConfigError, match=r"data\.crop=2: the sweep was begun with 1"):
        sweeping(tmp_path / "s", *typed, "seed=1")


def test_options_that_vary_with_a_choice_are_not_compared(tmp_path: Path) -> None:
    """A choice brings its own options, an experiment any."""
    for called, epochs in {"short": 2, "long": 20, "augmented": 20}.items():
        recipe = f"# @package _global_\ntrainer:\n  max_epochs: {epochs}\n"
        recipe += "data:\n  crop: 2\n" if called == "augmented" else ""
        recipe += "  limit_train_batches: 3\n" if called == "short" else ""
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / f"experiment/{called}.yaml").write_text(recipe)
    mine = ["--config-dir", str(tmp_path)]

    def pending(*typed: str) -> int:
        under_way = sweeping(tmp_path / "s", *mine, *typed)
        under_way.folder.write(under_way.options.metric)
        return len(under_way.pending)

    assert pending("experiment=short", "optimizer=adam,sgd") == 2
    assert pending("experiment=short,long", "optimizer=sgd", "seed=0,1") == 4
    assert pending("experiment=long", "optimizer=adamw", "seed=0") == 1
    assert pending("experiment=short", "optimizer=adamw", "seed=3") == 1
    assert pending("experiment=augmented", "optimizer=sgd", "seed=0") == 1
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing=0\.1: the sweep was begun"):
        pending("experiment=short", "optimizer=adamw", "loss.label_smoothing=0.1")
    with pytest.raises(ConfigError, match=r"data\.crop=1: the sweep was begun without it"):
        pending("experiment=short", "optimizer=adamw", "seed=4", "data.crop=1")


def test_typed_options_are_compared_where_experiments_vary(tmp_path: Path) -> None:
    """A new experiment may set options that those before it did not."""
    for called, crop in {"plain": 0, "light": 1, "heavy": 2}.items():
        (tmp_path / "experiment").mkdir(exist_ok=True)
        recipe = f"# @package _global_\ndata:\n  crop: {crop}\n"
        (tmp_path / f"experiment/{called}.yaml").write_text(recipe)
    mine = ["--config-dir", str(tmp_path), "data=fashion_mnist_mini", "loss.label_smoothing=0.1"]
    run(tmp_path / "s", *mine, "experiment=plain", "seed=0,1")
    for called in ("plain,light", "heavy"):
        _, launcher, _ = run(tmp_path / "s", *mine, f"experiment={called}", "seed=0")
        assert len(launcher.launched) == 1
    assert [row["experiment"] for row in rows(tmp_path / "s")] == ["plain"] * 2 + ["light", "heavy"]
    folder, another, typed = mine[:2], ["experiment=light", "seed=7"], mine[2:]
    for changed, error in {
        ("data=fashion_mnist", typed[1]): "data=fashion_mnist: {} with fashion_mnist_mini",
        (typed[0], "loss.label_smoothing=0.2"): "loss.label_smoothing=0.2: {} with 0.1",
        (typed[0],): "loss.label_smoothing=0.0: {} with 0.1",
        (*typed, "data.crop=2"): "data.crop=2: {} without it",
    }.items():
        with pytest.raises(ConfigError) as caught:
            sweeping(tmp_path / "s", *folder, *another, *changed)
        (problem,) = caught.value.problems
        assert problem.startswith(error.format("the sweep was begun") + "; ")
    assert len(sweeping(tmp_path / "s", *mine, *another, "optimizer=adam").pending) == 1


def test_incidental_options_may_change(tmp_path: Path) -> None:
    run(tmp_path / "s", "seed=0", "trainer=cpu")
    _, launcher, _ = run(tmp_path / "s", "seed=0", "trainer.checkpoint_every_n_steps=5")
    assert launcher.launched == []
