"""The members that a command line asks for, and what they are called."""

import re
from itertools import permutations

import pytest
from sweeps_of_records import asked

from cnntrain.sweeps.members import directory_name, name, planned, shown


def names(typed: list[str]) -> list[str]:
    found = asked(*typed)
    return [member.name for member in planned(found.runs, found.varied)]


def test_names_whatever_the_order() -> None:
    typed = ["seed=1,0", "model=shallow,lenet5", "optimizer.lr=0.01"]
    found = {frozenset(names([*order])) for order in permutations(typed)}
    assert found == {
        frozenset(
            f"model={model},seed={seed}" for model in ("shallow", "lenet5") for seed in (0, 1)
        )
    }


def test_names_of_values() -> None:
    """As they are typed; one that means the same is the same member."""
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
    assert shown({"a": [True, None], "b": "x"}) == "{a:[true,null],b:x}"


@pytest.mark.parametrize("value", ["a/b", "../up", "a b", "ä", "x" * 300, "a:b", "$HOME", "a'b\n"])
def test_odd_and_long_names_get_a_hash(value: str) -> None:
    called, other = directory_name(f"data.root={value}"), directory_name(f"data.root={value}_")
    assert re.fullmatch(r"data\.root=[A-Za-z0-9_.=-]*-[0-9a-f]{8}", called)
    assert len(called) <= 120
    assert called != other
    assert called == directory_name(f"data.root={value}")  # the same tomorrow
    assert name({"data.root": value, "seed": 0}) == name({"seed": 0, "data.root": value})


def test_members_that_are_the_same_run_are_one() -> None:
    assert names(["optimizer.lr=0.005,0.005,5e-3"]) == ["optimizer.lr=0.005"]
    asked_for = ["trainer.checkpoint_every_n_steps=5,7"]  # numbers no different, and yet both
    assert len(names(asked_for)) == 2
