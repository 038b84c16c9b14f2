"""Search spaces: their validation, and the values of a trial's run."""

import random
import sys
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from searches import search

from cnntrain.config import CONF, ConfigError, build, compose, flat
from cnntrain.sweeps.members import typed
from cnntrain.sweeps.search import Space
from cnntrain.sweeps.search_sweep import search_problems
from cnntrain.sweeps.study import PlannedTrial, no_warnings, suggest_trial

LR = {"low": 1e-4, "high": 1e-1, "log": True}

MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["search.space={}: has no option to search over"]),
    ({"a": 3}, ["search.space.a=3: must be choices [a, b], or {low: 1, high: 2}"]),
    ({"a": []}, ["search.space.a: The `choices` must contain one or more elements."]),
    ({"a": {"choices": "b"}}, ['search.space.a={"choices": "b"}: must be choices [a, b]']),
    ({"a": {"choices": [1], "step": 2}}, ["search.space.a.step: an option with choices has no"]),
    ({"a": {"low": 1, "hihg": 2}}, ["a.hihg: a range has no option 'hihg'; did you mean 'high'?"]),
    ({"a": {"low": 1}}, ["search.space.a: IntDistribution.__init__() missing", "'high'"]),
    ({"a": {"low": "x", "high": 1}}, ["search.space.a.low=x: must be a number"]),
    ({"a": {"low": 2, "high": 1}}, ["search.space.a: `low <= high` must hold, but got"]),
    (
        {"a": {"low": 0, "high": 1, "log": True}},
        ["a: `low >= 1` must hold for `log=True`, but got"],
    ),
    ({"a": {**LR, "step": 0.1}}, ["a: The parameter `step` is not supported when `log` is true."]),
    ({"a": {"low": 0, "high": 1, "step": 0}}, ["a: `step > 0` must hold, but got step=0."]),
    ({"a": {**LR, "when": "b"}}, ["must be choices [a, b], or {low: 1, high: 2}; with when: {opt"]),
    (
        {"a": {**LR, "when": {"modle": "x"}}, "model": ["x"]},
        ["a.when: the options without a condition have no choice 'modle=x'; did you mean 'model"],
    ),
    (
        {"a": {**LR, "when": {"b": "adm"}}, "b": ["adam", "sgd"]},
        ["a.when: the options without a condition have no choice 'b=adm'; did you mean 'b=adam'?"],
    ),
    ({"a": {**LR, "when": {"b": 1}}, "b": {"low": 1, "high": 2}}, ["have no choice 'b=1'"]),
    (
        {"c": [1], "a": {"choices": [1], "when": {"c": 1}}, "b": {**LR, "when": {"a": 1}}},
        ["b.when: the options without a condition have no choice 'a=1'; "],
    ),
    ({"a": {"low": 2, "high": 1}, "b": 3}, ["space.a: ", "space.b="]),
]


@pytest.mark.parametrize(("content", "parts"), MISTAKES, ids=lambda v: str(v)[:60])
def test_invalid_spaces(content: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Space(content)
    text = "\n".join(caught.value.problems)
    assert all(part in text for part in parts), text
    assert len(text.splitlines()) == (2 if parts[-1] == "space.b=" else 1)


INVALID_VALUES = [
    (
        {"optimizer.lrr": LR},
        ["search.space: optimizer.lrr=0.0001: optimizer has no option 'lrr'; did you mean 'lr'?"],
    ),
    (
        {"model.dropout": {"low": 0.0, "high": 1.0}},
        ["search.space: model.dropout=1.0: input should be less than 1"],
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


@pytest.mark.parametrize(("space", "parts"), INVALID_VALUES, ids=lambda v: str(v)[:60])
def test_values_that_a_run_rejects(space: dict, parts: list[str]) -> None:
    found = search_problems(search(space=space), compose)
    assert bool(found) == bool(parts)
    assert all(part in "\n".join(found) for part in parts), found


GROUPS = ("search", "search/sampler", "search/pruner")
CHOICES = [f"{g}={file.stem}" for g in GROUPS for file in sorted((CONF / g).glob("*.yaml"))]


@pytest.mark.parametrize("choice", CHOICES)
def test_shipped_choices_are_valid(choice: str) -> None:
    space = {"model.dropout": {"low": 0.0, "high": 0.4, "step": 0.2}} if "grid" in choice else None
    node = search(choice, space=space)
    if choice.startswith("search="):
        assert search_problems(node, compose) == []
    else:
        with no_warnings():
            suggest_trial(build(node), [], 0)  # the space is the same


INVALID_SEARCHES = [
    (["search.metric=test/acc"], "search.metric=test/acc: input should be 'val/acc', 'val/loss'"),
    (["search.metric=val/f1"], "search.metric=val/f1: input should be 'val/acc'"),
    (["search.trials=0"], "search.trials=0: input should be greater than 0"),
    (["search/sampler=tep"], "search/sampler has no choice 'tep'; did you mean 'tpe'?"),
    (["search/sampler=grid"], "FloatDistribution.step must be given for BruteForceSampler"),
    (["search.sampler._target_=os.system"], "must be a class derived from optuna.samplers.BaseSam"),
    (
        ["search.pruner._target_=os.system"],
        "must be a class derived from optuna.pruners.BasePruner",
    ),
    (["search.sampler.n_startup_trials=few"], "search"),
    (["search.pruner.n_warmup_steps=-1"], "search: Number of warmup steps cannot be negat"),
    (["search.sampler._target_=optuna.samplers.QMCSampler"], "keeps state between trials"),
    (["~search.pruner"], "search.pruner: missing"),
]


@pytest.mark.parametrize(("overrides", "part"), INVALID_SEARCHES, ids=lambda v: str(v)[:60])
def test_invalid_searches(overrides: list[str], part: str) -> None:
    try:
        found = search_problems(search(*overrides), lambda _: OmegaConf.create())
    except ConfigError as error:
        found = error.problems
    assert any(part in problem for problem in found), found


def test_an_option_is_either_typed_or_searched_over() -> None:
    found = search_problems(search(), compose, ["seed=3", "optimizer.lr=0.1"])
    assert found == ["optimizer.lr=0.1: is searched over, see search.space; leave it out"]


def test_error_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("cnntrain.config.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="search: needs Optuna; pip install optuna"):
        compose(["search=lenet5_lr", "search.trials=37"])


def test_hydra_reads_the_value_that_was_typed() -> None:
    """The same value of the same type."""
    numbers = random.Random(0)
    floats = [numbers.uniform(-1, 1) * 10.0 ** numbers.randint(-300, 300) for _ in range(300)]
    values = [
        *floats,
        *(1e-5, 1e22, 0.1 + 0.2, 5, -3, True, None, "relu", "true", "1", "a b", "", "x,y"),
    ]
    values += [[6, 16, 128], ["a", 1e-05, None, [True]], "a=b", "it's", "\\", "null", "1e5", "Nan"]
    for value in values:
        read = OverridesParser.create().parse_override(f"x.y={typed(value)}").value()
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
    for _ in range(6):
        trial = study.ask()
        space.suggest(trial)
        values = PlannedTrial.of(trial).values
        assert ("optimizer.momentum" in values) == (values["optimizer"] == "sgd")
        options = flat(compose([f"{o}={v}" for o, v in trial.params.items()]))
        target = {"adam": "torch.optim.Adam", "sgd": "torch.optim.SGD"}[values["optimizer"]]
        assert options["optimizer._target_"] == target
        for option in values.keys() - {"optimizer"}:
            assert options[option] == values[option]
            assert type(options[option]) is type(values[option])
        seen.add((values["optimizer"], *values["model.channels"], values["model.norm"]))
    assert len(seen) >= 4
