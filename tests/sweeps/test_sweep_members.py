"""Members of a sweep's command line and their names."""

import re
from unittest.mock import patch

import pytest
from omegaconf import OmegaConf
from sweeps_of_records import planned

from cnntrain.commands import plan
from cnntrain.config import ConfigError, compose, config_hash
from cnntrain.config.resume import run_options
from cnntrain.sweeps.members import directory_name, member_name, plan_members


def names(typed: list[str]) -> list[str]:
    return [member.name for member in plan_members(*planned(*typed))]


def test_names_do_not_depend_on_the_order() -> None:
    typed = ["seed=1,0", "model=shallow,lenet5", "optimizer.lr=0.01"]
    found = {frozenset(names(order)) for order in (typed, typed[::-1])}
    assert found == {
        frozenset(
            f"model={model},seed={seed}" for model in ("shallow", "lenet5") for seed in (0, 1)
        )
    }


def test_names_of_values() -> None:
    """As typed; equal values are the same member."""
    assert names(["optimizer.lr=1e-2,0.1"]) == ["optimizer.lr=0.01", "optimizer.lr=0.1"]
    assert names(["model.norm=true,false,True"]) == ["model.norm=true", "model.norm=false"]
    assert names(["trainer.gradient_clip_val=null,1.0"]) == [
        "trainer.gradient_clip_val=null",
        "trainer.gradient_clip_val=1.0",
    ]
    assert names(["model.channels=[6,16,120],[4,8,9]"])[0] == "model.channels=[6,16,120]"
    assert names(["optimizer.betas=[0.9,0.99],[0.8,0.9]"])[1] == "optimizer.betas=[0.8,0.9]"
    assert names(["seed=3"]) == ["seed=3"]
    assert names([]) == ["defaults"]


@pytest.mark.parametrize("value", ["a/b", "../up", "a b", "ä", "x" * 300, "a:b", "$HOME", "a'b\n"])
def test_special_and_long_names_get_a_hash(value: str) -> None:
    called, other = directory_name(f"data.root={value}"), directory_name(f"data.root={value}_")
    assert re.fullmatch(r"data\.root=[A-Za-z0-9_.=-]*-[0-9a-f]{8}", called)
    assert len(called) <= 120
    assert called != other
    assert called == directory_name(f"data.root={value}")
    values = {"data.root": value, "seed": 0}
    assert member_name(values) == member_name(dict(reversed(values.items())))


def test_equal_runs_are_one_member() -> None:
    assert names(["optimizer.lr=0.005,0.005,5e-3"]) == ["optimizer.lr=0.005"]
    assert len(names(["trainer.checkpoint_every_n_steps=5,7"])) == 2  # results are the same


@pytest.mark.parametrize(
    ("typed", "composed"),
    [
        (["seed=range(2)", "optimizer.lr=0.005,0.02"], 1),
        (["optimizer=adam,sgd", "optimizer.lr=0.005,0.02"], 2),
        (["optimizer=sgd", "optimizer.momentum=0.5,0.25"], 1),
        (["trainer.monitor=val/acc,val/loss", "+trainer.limit_train_batches=4,5"], 2),
        (["data.val_size='${data.batch_size}',50", "data.batch_size=20,40"], 2),
    ],
)
def test_runs_equal_those_composed_alone(typed: list[str], composed: int) -> None:
    """Whether composed by Hydra, or copied from one that differs in plain values only."""
    with patch.object(plan.config, "compose_valid", wraps=plan.config.compose_valid) as by_hydra:
        runs, _ = planned("data=fashion_mnist_mini", *typed)
    assert by_hydra.call_count == 1 + composed  # and the options with one value
    for run in runs:
        alone = run_options(compose(run.typed))
        assert OmegaConf.to_container(run.config) == OmegaConf.to_container(alone)
        assert config_hash(run.config) == config_hash(alone)
    assert len({config_hash(run.config) for run in runs}) == len(runs)


def test_every_value_is_checked() -> None:
    with pytest.raises(ConfigError) as error:
        planned("data=fashion_mnist_mini", "seed=0,-1,x,2", "optimizer.lr=0.1,[1]")
    assert len(error.value.problems) == 3
    for text in ("seed=-1: input should be", "seed=x: input should be", "optimizer.lr=[1]: "):
        assert any(problem.startswith(text) for problem in error.value.problems)
    with pytest.raises(ConfigError, match="did you mean 'lr'"):  # reported once
        planned("data=fashion_mnist_mini", "seed=range(90)", "optimizer.lrr=1")
