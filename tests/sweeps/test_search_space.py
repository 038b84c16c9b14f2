"""What a search may choose from, what is refused, and that a value arrives as it was chosen."""

import itertools
import random
import subprocess
import sys
from typing import Any

import optuna
import pytest
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from searches import search

from cnntrain.config import CONF, ConfigError, compose, flat
from cnntrain.sweeps.search import Space, override
from cnntrain.sweeps.search_sweep import search_problems, suggest_once

LR = {"low": 1e-4, "high": 1e-1, "log": True}


MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["search.space={}: has no option to search over"]),
    ({"a": 3}, ["search.space.a=3: must be choices [a, b], or {low: 1, high: 2}"]),
    ({"a": []}, ["search.space.a=[]: must be choices, at least one, such as [a, b]"]),
    ({"a": {"choices": "b"}}, ["search.space.a=b: must be choices, at least one"]),
    ({"a": ["b", "b", 1]}, ['search.space.a=["b", "b", 1]: has b twice']),
    ({"a": [{"b": 1}]}, ["a choice must be a value or a list of values"]),
    ({"a": {"choices": [1], "step": 2}}, ["search.space.a.step: belongs to a range"]),
    ({"a": {"low": 1, "hihg": 2}}, ["a.hihg: a range has no option 'hihg'; did you mean 'high'?"]),
    ({"a": {"low": 1}}, ["search.space.a.high=null: must be a number"]),
    ({"a": {"low": "x", "high": True}}, ["a.low=x: must be a number", "a.high=true: must be a"]),
    ({"a": {"low": 2, "high": 1}}, ["search.space.a.low=2: is more than high=1"]),
    ({"a": {"low": 0, "high": 1, "log": True}}, ["a.low=0: must be more than 0 with log=true"]),
    ({"a": {"low": 0, "high": 1, "log": "yes"}}, ["a.log=yes: must be true or false"]),
    ({"a": {**LR, "step": 0.1}}, ["a.step=0.1: cannot be combined with log=true"]),
    ({"a": {"low": 0, "high": 1, "step": 0}}, ["a.step=0: must be more than 0"]),
    (
        {"a": {"low": 0.0, "high": 1.0, "step": 0.3}},
        ["a.step=0.3: does not lead to high=1.0; take"],
    ),
    ({"a": {"low": 0.0, "high": 1.0, "step": 0.3}}, ["high=0.9"]),
    ({"a": {**LR, "when": "b"}}, ["search.space.a.when=b: must be {option: choice}"]),
    (
        {"a": {**LR, "when": {"modle": "x"}}, "model": ["x"]},
        ["a.when.modle: the space has no option 'modle'; did you mean 'model'?"],
    ),
    (
        {"a": {**LR, "when": {"b": "adm"}}, "b": ["adam", "sgd"]},
        ["a.when.b=adm: b has no choice 'adm'; did you mean 'adam'?"],
    ),
    ({"a": {**LR, "when": {"b": 1}}, "b": {"low": 1, "high": 2}}, ["a condition needs choices"]),
    (
        {"a": {"choices": [1], "when": {"b": 1}}, "b": {"choices": [1], "when": {"a": 1}}},
        ["search.space.a.when, search.space.b.when: conditions that depend on each other"],
    ),
    (
        {
            "a": [1, 2],
            "b": {"choices": [1], "when": {"a": 1}},
            "c": {**LR, "when": {"a": 2, "b": 1}},
        },
        ["search.space.c.when: can never be met"],
    ),
    ({"a": {"low": 2, "high": 1}, "b": [], "c": 3}, ["space.a.low", "space.b=", "space.c="]),
]


@pytest.mark.parametrize(("content", "said"), MISTAKES, ids=lambda v: str(v)[:60])
def test_a_mistake_is_named_with_a_way_out(content: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Space(content)
    assert len(caught.value.problems) == len(said)
    for part, problem in zip(said, caught.value.problems, strict=True):
        assert part in problem
        assert "\n" not in problem


REFUSED = [
    (
        {"optimizer.lrr": LR, "model.dropout": {"low": 0.0, "high": 1.0}},
        [
            "search.space: optimizer.lrr=0.0001: optimizer has no option 'lrr'; did you mean 'lr'?",
            "search.space: model.dropout=1.0: input should be less than 1",
        ],
    ),
    ({"optimizer": ["adam", "sgdd"]}, ["optimizer=sgdd: optimizer has no choice 'sgdd'"]),
    (
        {
            "optimizer": ["adam", "sgd"],
            "optimizer.momentum": {
                "low": -1.0,
                "high": 0.9,
                "when": {"optimizer": ["adam", "sgd"]},
            },
        },
        ["optimizer.momentum=-1.0: optimizer has no option 'momentum'", "(with optimizer=adam)"],
    ),
    (
        {"model.hidden": {"low": 16, "high": 32}, "model": ["lenet5", "shallow"]},
        ["model.hidden=16: model has no option 'hidden'", "(with model=shallow)"],
    ),
    (
        {
            "model": ["lenet5", "shallow"],
            "model.hidden": {"low": 16, "high": 32, "when": {"model": "lenet5"}},
        },
        [],
    ),
    (
        {"model.hidden": {"low": 16.0, "high": 32.5}},
        ["model.hidden=16.0: input should be a valid integer"],
    ),
]


@pytest.mark.parametrize(("space", "said"), REFUSED, ids=lambda v: str(v)[:60])
def test_values_that_a_run_would_refuse(space: dict, said: list[str]) -> None:
    found = search_problems(search(space=space), compose)
    assert bool(found) == bool(said)
    assert all(part in "\n".join(found) for part in said), found


GROUPS = ("search", "search/sampler", "search/pruner")
CHOICES = [f"{g}={file.stem}" for g in GROUPS for file in sorted((CONF / g).glob("*.yaml"))]


@pytest.mark.parametrize("choice", CHOICES)
def test_no_mistake_in_what_ships(choice: str) -> None:
    space = {"model.dropout": {"low": 0.0, "high": 0.4, "step": 0.2}} if "grid" in choice else None
    node = search(choice, space=space)
    if choice.startswith("search="):
        assert search_problems(node, compose) == []
    else:
        suggest_once(node)  # the space is the same


WRONG = [
    (["search.metric=test/acc"], "search.metric=test/acc: the test metric of a run selected by it"),
    (["search.metric=val/f1"], "search.metric=val/f1: input should be 'val/acc'"),
    (["search.trials=0"], "search.trials=0: input should be greater than 0"),
    (["search/sampler=tep"], "search/sampler has no choice 'tep'; did you mean 'tpe'?"),
    (["search/sampler=grid"], "search.space.optimizer.lr is continuous; give it a step"),
    (["search.sampler._target_=os.system"], "must be a class derived from optuna.samplers.BaseSam"),
    (
        ["search.pruner._target_=os.system"],
        "must be a class derived from optuna.pruners.BasePruner",
    ),
    (["search.sampler.n_startup_trials=few"], "search.sampler.n_startup_trials=few: input should"),
    (["search.pruner.n_warmup_steps=-1"], "search.pruner: Number of warmup steps cannot be negat"),
    (["search.sampler._target_=optuna.samplers.QMCSampler"], "keeps state between trials"),
    (["~search.pruner"], "search.pruner: missing"),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=lambda v: str(v)[:60])
def test_a_search_that_cannot_be(overrides: list[str], said: str) -> None:
    try:
        found = search_problems(search(*overrides), lambda _: OmegaConf.create())
    except ConfigError as error:
        found = error.problems
    assert any(said in problem for problem in found), found


def test_what_is_typed_is_not_searched_over() -> None:
    found = search_problems(search(), compose, ["seed=3", "optimizer.lr=0.1"])
    assert found == ["optimizer.lr=0.1: is searched over, see search.space; leave it out"]


def test_without_optuna_one_line_says_so() -> None:
    code = (
        "import sys; sys.modules['optuna'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'optuna' else find(name, *a)\n"
        "from pathlib import Path; from cnntrain.config import CONF, ConfigError, compose\n"
        "compose([])\n"
        "try:\n"
        "    compose(['search=lenet5_lr'])\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "search: needs Optuna; pip install optuna\n", done.stderr


def test_combinations_are_counted() -> None:
    space = Space(
        {
            "rate": {"low": 0.1, "high": 0.5, "step": 0.2, "when": {"b": ["x", "y"], "a": True}},
            "a": [True, False],
            "b": {"choices": ["x", "y", "z"], "when": {"a": True}},
            "n": {"low": 3, "high": 9, "step": 2},
        }
    )
    found = {
        (a, b, rate, n)
        for a, b, rate, n in itertools.product(
            (True, False), ("x", "y", "z", None), (0.1, 0.3, 0.5, None), (3, 5, 7, 9)
        )
        if (b is not None) == a and (rate is not None) == (b in ("x", "y"))
    }
    assert space.size == len(found) == 32
    assert Space({"lr": LR, "a": [1]}).size is None


def test_a_value_arrives_as_it_was_chosen() -> None:
    """Hydra reads from an override the very value, of the very type, that it was written from."""
    numbers = random.Random(0)
    floats = [numbers.uniform(-1, 1) * 10.0 ** numbers.randint(-300, 300) for _ in range(300)]
    values = [
        *floats,
        1e-5,
        1e22,
        0.1 + 0.2,
        5,
        -3,
        True,
        None,
        "relu",
        "true",
        "1",
        "a b",
        "",
        "x,y",
    ]
    values += [[6, 16, 128], ["a", 1e-05, None, [True]], "a=b", "it's", "\\", "null", "1e5", "Nan"]
    for value in values:
        read = OverridesParser.create().parse_override(override("x.y", value)).value()
        read = str(read) if not isinstance(read, (str, list, float, int, type(None))) else read
        assert (read, type(read)) == (value, type(value))


def test_a_run_has_the_values_of_its_trial() -> None:
    space = Space(
        {
            "model.channels": [[6, 16, 128], [3, 8, 64]],
            "model.norm": [True, False],
            "model.dropout": {"low": 0.0, "high": 0.6, "step": 0.05},
            "optimizer": ["adam", "sgd"],
            "optimizer.lr": LR,
            "optimizer.momentum": {"low": 0.0, "high": 0.98, "when": {"optimizer": "sgd"}},
            "model.hidden": {"low": 16, "high": 256, "log": True},
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(12):
        trial = study.ask()
        space.suggest(trial)
        values = space.values(space.exact(trial.params))
        assert ("optimizer.momentum" in values) == (values["optimizer"] == "sgd")
        options = flat(compose([override(o, v) for o, v in values.items()]))
        target = {"adam": "torch.optim.Adam", "sgd": "torch.optim.SGD"}[values["optimizer"]]
        assert options["optimizer._target_"] == target
        for option in values.keys() - {"optimizer"}:
            assert options[option] == values[option]
            assert type(options[option]) is type(values[option])
        assert len(repr(values["model.dropout"])) <= 4  # and not 0.35000000000000003
        seen.add((values["optimizer"], *values["model.channels"], values["model.norm"]))
    assert len(seen) == 8
