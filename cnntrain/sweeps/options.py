"""In which options configs differ, told in the words of the command line."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cnntrain.config import incidental
from cnntrain.config.choices import choice, defaults

Flat = Mapping[str, Any]  # every option by its full name
TARGET = "._target_"
ABSENT = object()


def varying(configs: Sequence[Flat]) -> list[dict[str, Any]]:
    """For each config the values of the options that are not the same in all, then the seed.

    A node with another class is another choice: `backend` is `im2col`. What comes with a choice,
    such as an option that only this choice has, is no option that varies as long as it has the
    value of the choice's own file. An option that a config does not have is left out there.
    """
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [
        name
        for name in names
        if not (incidental(name) or name == "seed")
        and not name.endswith("._partial_")
        and len({_key(config.get(name, ABSENT)) for config in configs}) > 1
    ]
    groups = [name.removesuffix(TARGET) for name in differing if name.endswith(TARGET)]
    chosen = {g: [choice(g, _node(config, g)) for config in configs] for g in groups}
    found: list[dict[str, Any]] = [{} for _ in configs]
    for name in differing:
        if (group := name.removesuffix(TARGET)) in groups:  # itself where it is empty: `none`
            for values, own in zip(found, chosen[group], strict=True):
                values[group] = own
            continue
        group = next((g for g in groups if name.startswith(f"{g}.")), "")
        if group and _follows(name.removeprefix(f"{group}."), group, chosen[group], configs):
            continue
        for values, config in zip(found, configs, strict=True):
            if name in config:
                values[name] = config[name]
    for values, config in zip(found, configs, strict=True):
        if "seed" in config:
            values["seed"] = config["seed"]
    return found


def _follows(option: str, group: str, choices: Sequence[str], configs: Sequence[Flat]) -> bool:
    """Whether an option has, in every config, just the value that comes with the choice."""
    for name in dict.fromkeys(choices):
        with_it = [c for c, chosen in zip(configs, choices, strict=True) if chosen == name]
        values = [config.get(f"{group}.{option}", ABSENT) for config in with_it]
        if len(set(map(_key, values))) > 1:
            return False
        own = defaults(group, name)
        usual = own.get(option, ABSENT)
        if own and _key(usual) != _key(values[0]) and "${" not in str(usual):
            return False
    return True


def _node(config: Flat, group: str) -> dict[str, Any]:
    head = f"{group}."
    return {name.removeprefix(head): v for name, v in config.items() if name.startswith(head)}


def _key(value: Any) -> str:
    return "" if value is ABSENT else json.dumps(value, sort_keys=True, default=str)
