"""Benchmark: layer sets and implementations."""

from typing import Any

import pytest
import torch
from torch import nn

from cnntrain.config import ConfigError
from cnntrain.config.options import defaults
from cnntrain.lab.benchmark.implementations import implementations
from cnntrain.lab.benchmark.layers import layer, layer_sets, layers_of
from cnntrain.models import LeNet5


def test_layers_of_lenet5() -> None:
    """Three convolutions; MACs by hand: 25*1*6*28*28, 25*6*16*10*10, 25*16*128*1*1."""
    found = layers_of(LeNet5().train(), (1, 28, 28))
    assert [layer.shape for layer in found] == [
        "1->6 5x5 p2 on 28x28",
        "6->16 5x5 on 14x14",
        "16->128 5x5 on 5x5",
    ]
    assert [layer.macs for layer in found] == [117_600, 240_000, 51_200]
    assert found[0].name == "features.0"


def test_the_layer_set_lenet5_is_that_of_the_model() -> None:
    (found,) = layer_sets(defaults("layers", "lenet5"), (1, 28, 28))
    expected = layers_of(LeNet5(), (1, 28, 28))
    assert [x.shape for x in found.layers] == [x.shape for x in expected]


def test_layers_keep_all_options_of_a_network() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 1), dilation=2, groups=2, bias=False),
        nn.Conv2d(6, 6, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(6, 6, 3, padding="same", padding_mode="circular"),
    ).train()
    (found,) = layer_sets({"mine": network}, (4, 20, 30))
    first, second = found.layers
    expected = network[0](torch.zeros(1, 4, 20, 30)).shape[1:]
    assert first.shape == "4->6 3x5 s1x2 p0x1 d2 g2 no bias on 20x30"
    assert first.out_shape == tuple(expected)
    assert first.macs == 3 * 5 * (4 // 2) * 6 * expected[1] * expected[2]
    assert (first.count, second.count) == (1, 2)  # equal layers are listed once
    assert (first.name, second.name) == ("0", "1")
    assert second.shape == f"6->6 3x3 same circular on {expected[1]}x{expected[2]}"
    made = first.make(nn.Conv2d)
    assert made.weight.shape == network[0].weight.shape
    assert made.bias is None
    assert all(module.training for module in network.modules())
    assert not network[0]._forward_pre_hooks


def test_an_incomplete_shape_and_one_without_quotes() -> None:
    with pytest.raises(ConfigError, match=r"^shape: .*missing .*'out_channels' and 'kernel_size'"):
        layer({"in_channels": 2, "size": 8})
    # `shape={in_channels: 2, size: 8}` after a shell has expanded the braces.
    with pytest.raises(
        ConfigError, match=r"^shape=size:8: must be a mapping with a size, in quotes: shape='{"
    ):
        layer("size:8")


def test_implementations_of_every_kind() -> None:
    class Mine(nn.Conv2d):
        pass

    limited = {"_target_": "cnntrain.conv.Im2colConv2d", "max_column_mib": 8}
    found = implementations(["im2col", "torch.nn.Conv2d", limited, "unfold", "seven_loops", Mine])
    assert list(found) == [
        "im2col", "Conv2d", "Im2colConv2d(max_column_mib=8)", "unfold", "seven_loops", "Mine",
    ]  # fmt: skip
    made = [make(2, 4, kernel_size=3) for make in found.values()]
    assert type(made[0]).__name__ == "Im2colConv2d"
    assert type(made[2]).__name__ == "Im2colConv2d"
    assert made[2].algorithm.max_column_mib == 8
    assert type(made[5]) is Mine


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["im2coll"], "backends=[im2coll]: there is no choice 'im2coll'; did you mean 'im2col'?"),
        (["unfolld"], "backends=[unfolld]: there is no choice 'unfolld'; did you mean 'unfold'?"),
        (["nowhere.Conv"], "backends._target_=nowhere.Conv: cannot be imported"),
        (["torch.nn.Linear"], "backends._target_=torch.nn.Linear: must be a class derived from"),
        (
            ["os.system"],
            "backends._target_=os.system: must be a class derived from torch.nn.Conv2d",
        ),
        ([{"max_column_mib": 8}], "backends={'max_column_mib': 8}: must have a _target_"),
        (
            [{"_target_": "cnntrain.conv.Im2colConv2d", "max_colum_mib": 8}],
            "backends.max_colum_mib=8: cnntrain.conv.Im2colConv2d has no option 'max_colum_mib'; "
            "did you mean 'max_column_mib'?",
        ),
        (["native", "native"], "backends: native is there twice"),
        ([], "backends=[]: must name at least one"),
    ],
)
def test_wrong_implementations_are_reported(entries: list[Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        implementations(entries)
    assert any(problem.startswith(message) for problem in caught.value.problems), caught.value


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"unfoldNd is a package of its own: pip install unfoldNd"
    ):
        implementations(["unfoldNd"])


@pytest.mark.parametrize(
    "options",
    [
        {"padding": (1, 2), "stride": (2, 1), "dilation": (1, 2)},
        {"groups": 2, "bias": False},
        {"groups": 4, "padding": 1},
    ],
)
@pytest.mark.parametrize("name", ["unfold", "unfoldNd", "seven_loops"])
def test_reference_implementations_are_convolutions(name: str, options: dict[str, Any]) -> None:
    if name == "unfoldNd":
        pytest.importorskip("unfoldNd")
    torch.manual_seed(0)
    native = nn.Conv2d(4, 8, (3, 2), **options).double()
    mine = implementations([name])[name](4, 8, (3, 2), **options).double()
    mine.load_state_dict(native.state_dict())
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(mine(x), native(x).detach() if name == "seven_loops" else native(x))
