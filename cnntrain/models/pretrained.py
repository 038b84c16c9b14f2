"""Pretrained weights: published by torchvision, or in a local file."""

import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from cnntrain.models.introspection import head, named_convolutions

log = logging.getLogger(__name__)

deferred: ContextVar[bool] = ContextVar("deferred", default=False)
UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)


@contextmanager
def deferred_weights() -> Iterator[None]:
    """Networks built within load pretrained weights only when `load_initial_weights` is called.

    A network whose weights are in a checkpoint is built so without the pretrained ones.
    """
    token = deferred.set(True)
    try:
        yield
    finally:
        deferred.reset(token)


def read_published(weights: Any) -> dict[str, Tensor]:
    """The state_dict of a WeightsEnum of torchvision, from torch's cache or downloaded."""
    try:
        return weights.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
    except UNREADABLE as error:
        file, folder = weights.url.rpartition("/")[2], Path(torch.hub.get_dir(), "checkpoints")
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{file} can be neither downloaded nor read from {folder} ({reason}); put it there, "
            "or take a local file, model.weights=<file>"
        ) from error


def read_file(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file of `torch.save`, alone or under the key `state_dict` or `model`.

    Runs no code in the file. Removes the prefixes of DataParallel and of a run's checkpoints.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"cannot be read ({type(error).__name__}); it must be what torch.save(state_dict, ...) "
            "writes, without other Python objects"
        ) from error
    if isinstance(content, dict):
        content = content.get("state_dict", content.get("model", content))
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError("holds no state_dict, neither alone nor under the key state_dict or model")
    for prefix in ("module.", "network.network."):
        consume_prefix_in_state_dict_if_present(content, prefix)
    return content


def load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state_dict, which is changed, into a network of torchvision.

    A head with another number of classes keeps its initial weights. The first convolution is
    adapted to the number of channels: kernels are summed over theirs for one channel, otherwise
    repeated and scaled by the ratio of both numbers, as `timm.models.adapt_input_conv` does.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape.
    """
    for key in list(state):  # in place: the dictionary has versions of modules as an attribute
        # torchvision's files still have these names, of 2017.
        name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)
        state[name] = state.pop(key)
    own = network.state_dict()
    stem = f"{named_convolutions(network)[0][0]}.weight"
    channels, given = own[stem].shape[1], state.get(stem, own[stem]).shape[1]
    if channels == 1 < given:
        state[stem] = state[stem].sum(1, keepdim=True)
    elif channels != given:
        repeated = state[stem].repeat(1, -(-channels // given), 1, 1)
        state[stem] = repeated[:, :channels] * (given / channels)
    name, last = head(network)
    after = len(own[f"{name}.weight"])
    before = len(state.get(f"{name}.weight", own[f"{name}.weight"]))
    if before != after:
        state.update({f"{name}.{part}": p.data for part, p in last.named_parameters()})

    def size(tensor: Tensor) -> str:
        return "x".join(map(str, tensor.shape)) or "a number"

    problems = [
        f"{key} is {size(state[key])} there and {size(tensor)} here"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if not problems:
        missing, unexpected = network.load_state_dict(state, strict=False)
        problems += [f"{key} is missing" for key in missing]
        problems += [f"{key} is unexpected" for key in unexpected]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        hint = "; change model.small_images" if problems[0].startswith(stem) else ""
        raise ValueError(f"is of another network: {', '.join(problems[:3])}{more}{hint}")
    if before != after:
        log.info(f"head: {name}, {before:,} -> {after:,} classes, newly initialised")
