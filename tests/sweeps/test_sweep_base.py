"""A sweep's base config: what may not change under the same name, and what may."""

from pathlib import Path

import pytest
from sweeps_of_records import COMPARE, rows, run, sweeping

from cnntrain.config import ConfigError


def test_another_base_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "s", *COMPARE, "data.crop=1")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "s", *COMPARE, "seed=5,6", "optimizer=sgd", "trainer.max_epochs=3")
    said = [problem.partition("; ")[0] for problem in caught.value.problems]
    assert "data.crop=0: the sweep 's' was begun with 1" in said
    assert "trainer.max_epochs=3: the sweep 's' was begun with 10" in said
    assert any(line.startswith("optimizer._target_=torch.optim.SGD: ") for line in said)
    assert all("sweep=<name>" in problem for problem in caught.value.problems)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_belongs_to_a_choice_is_another_member(tmp_path: Path) -> None:
    run(tmp_path / "s", "backend=native,im2col")
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "s", "backend=im2col", "+backend.max_column_mib=2")
    said = "backend=im2col: was begun with backend.max_column_mib=null, and now it is 2;"
    assert caught.value.problems[0].startswith(said)


@pytest.mark.parametrize("option", ["+trainer.limit_train_batches=3", "+optimizer.amsgrad=true"])
def test_an_option_that_came_or_went_is_another_base(tmp_path: Path, option: str) -> None:
    """Also where no member is one of before."""
    run(tmp_path / "without", *COMPARE)
    key, value = option.strip("+").split("=")
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "without", "model=shallow,lenet5", "seed=7", option)
    assert [problem.partition("; ")[0] for problem in caught.value.problems] == [
        f"{key}={value}: the sweep 'without' was begun without it"
    ]
    run(tmp_path / "with", *COMPARE, option)
    with pytest.raises(ConfigError) as caught:
        sweeping(tmp_path / "with", "model=shallow,lenet5", "seed=7")
    assert [problem.partition("; ")[0] for problem in caught.value.problems] == [
        f"{key} (left out): the sweep 'with' was begun with {value}"
    ]


def test_what_varies_with_a_choice_is_no_base(tmp_path: Path) -> None:
    """A choice brings options of its own, an experiment those of anything."""
    for called, epochs in {"short": 2, "long": 20, "augmented": 20}.items():
        recipe = f"# @package _global_\ntrainer:\n  max_epochs: {epochs}\n"
        recipe += "data:\n  crop: 2\n" if called == "augmented" else ""
        recipe += "  limit_train_batches: 3\n" if called == "short" else ""
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / f"experiment/{called}.yaml").write_text(recipe)
    mine = ["--config-dir", str(tmp_path)]

    def pending(*typed: str) -> int:
        under_way = sweeping(tmp_path / "s", *mine, *typed)
        under_way.folder.write(**under_way.options.facts)
        return len(under_way.pending)

    assert pending("experiment=short", "optimizer=adam,sgd") == 2
    assert pending("experiment=short,long", "optimizer=sgd", "seed=0,1") == 4
    assert pending("experiment=long", "optimizer=adamw", "seed=0") == 1
    assert pending("experiment=short", "optimizer=adamw", "seed=3") == 1
    assert pending("experiment=augmented", "optimizer=sgd", "seed=0") == 1
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing=0\.1: the sweep 's' was begun"):
        pending("experiment=short", "optimizer=adamw", "loss.label_smoothing=0.1")
    with pytest.raises(ConfigError, match=r"data\.crop=1: the sweep 's' was begun without it"):
        pending("experiment=short", "optimizer=adamw", "seed=4", "data.crop=1")


def test_where_experiments_vary_what_was_typed_is_the_base(tmp_path: Path) -> None:
    """What a new one of them sets is its own, whatever those before it left as it was."""
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
    for changed, said in {
        ("data=fashion_mnist", typed[1]): "data=fashion_mnist: {} with fashion_mnist_mini",
        (typed[0], "loss.label_smoothing=0.2"): "loss.label_smoothing=0.2: {} with 0.1",
        (typed[0],): "loss.label_smoothing=0.0: {} with 0.1",
        (*typed, "data.crop=2"): "data.crop=2: {} without it",
    }.items():
        with pytest.raises(ConfigError) as caught:
            sweeping(tmp_path / "s", *folder, *another, *changed)
        (problem,) = caught.value.problems
        assert problem.startswith(said.format("the sweep 's' was begun") + "; ")
    assert len(sweeping(tmp_path / "s", *mine, *another, "optimizer=adam").pending) == 1


def test_what_changes_no_number_may_change(tmp_path: Path) -> None:
    run(tmp_path / "s", *COMPARE)
    _, launcher, _ = run(tmp_path / "s", *COMPARE, "trainer.checkpoint_every_n_steps=5")
    assert launcher.launched == []
