"""The oracles and the cases of cnntrain verify."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from cnntrain.lab.verify.cases import (
    BIAS,
    INPUT,
    OUTPUT,
    SHORT_GRIDS,
    WEIGHT,
    Case,
    Problem,
    corners,
    grid,
    random_cases,
)
from cnntrain.lab.verify.layers import network_layers, size_cases
from cnntrain.lab.verify.numerics import by_kernel_position, reference_loops, scipy_signal

EASY = Case(1, 1, 2, (1, 3, 3))


def by_hand(case: Case, x: list, w: list, g: list, b: list | None = None) -> Problem:
    x, w, g = (np.array(t, float) for t in (x, w, g))
    bias = None if b is None else np.array(b, float)
    return Problem(
        case, x.reshape(case.input_shape), w.reshape(case.weight_shape), bias,
        g.reshape(case.output_shape),
    )  # fmt: skip


every_oracle = pytest.mark.parametrize(
    "oracle", [reference_loops, scipy_signal, by_kernel_position]
)


@every_oracle
def test_an_oracle_by_hand(oracle):
    p = by_hand(EASY, [*range(9)], [1, 2, 3, 4], [1, 10, 100, 1000], [0.5])
    found = oracle(p)
    assert found[OUTPUT].ravel().tolist() == [27.5, 37.5, 57.5, 67.5]
    assert found[WEIGHT].ravel().tolist() == [4310, 5421, 7643, 8754]
    assert found[INPUT].ravel().tolist() == [1, 12, 20, 103, 1234, 2040, 300, 3400, 4000]
    assert found[BIAS].tolist() == [1111]


@every_oracle
def test_an_oracle_with_groups_stride_and_dilation_by_hand(oracle):
    case = Case(2, 2, (1, 2), (1, 1, 5), stride=(1, 2), dilation=2, groups=2, bias=False)
    p = by_hand(case, [0, 1, 2, 3, 4, 10, 11, 12, 13, 14], [1, 100, 1, 1000], [1, 2, 3, 4])
    found = oracle(p)
    assert found[OUTPUT].ravel().tolist() == [200, 402, 12010, 14012]
    assert found[INPUT].ravel().tolist() == [1, 0, 102, 0, 200, 3, 0, 3004, 0, 4000]
    assert found[WEIGHT].ravel().tolist() == [4, 10, 78, 92]
    assert BIAS not in found


@every_oracle
@pytest.mark.parametrize(
    ("mode", "padded", "gradient"),
    [
        ("zeros", [0, 0, 1, 2, 3, 0, 0], [3, 4, 5]),
        ("reflect", [3, 2, 1, 2, 3, 2, 1], [3 + 7, 2 + 4 + 6, 1 + 5]),
        ("replicate", [1, 1, 1, 2, 3, 3, 3], [1 + 2 + 3, 4, 5 + 6 + 7]),
        ("circular", [2, 3, 1, 2, 3, 1, 2], [3 + 6, 1 + 4 + 7, 2 + 5]),
    ],
)
def test_an_oracle_pads_by_hand(oracle, mode, padded, gradient):
    case = Case(1, 1, 1, (1, 1, 3), padding=(0, 2), bias=False, padding_mode=mode)
    found = oracle(by_hand(case, [1, 2, 3], [1], [1, 2, 3, 4, 5, 6, 7]))
    assert found[OUTPUT].ravel().tolist() == padded
    assert found[INPUT].ravel().tolist() == gradient


def test_same_has_the_odd_pixel_below_and_right():
    case = Case(1, 1, (2, 4), (1, 5, 5), padding="same")
    assert case.pads == ((0, 1), (1, 2))
    assert case.output_size == (5, 5)


def test_the_oracles_agree():
    for case in [*corners(), *grid(0)[::3], *random_cases(7, 40)]:
        p = Problem.normal(case, 3)
        truth = reference_loops(p)
        for oracle in (scipy_signal, by_kernel_position):
            found = oracle(p)
            assert found.keys() == truth.keys()
            for quantity in truth:
                np.testing.assert_allclose(
                    found[quantity], truth[quantity], rtol=1e-12, atol=1e-12, err_msg=str(case)
                )


@pytest.mark.parametrize("factor", "xwg")
def test_oracles_agree_on_nan_inf_and_negative_zeros(factor):
    case = Case(4, 6, 3, (2, 6, 7), stride=(2, 1), padding=1, dilation=(1, 2), groups=2)
    p = Problem.positive(case, 0)
    numbers = getattr(p, factor)
    numbers[:1] = -0.0
    numbers[1, 0, 1, 1], numbers[-1, 1, 2, 2] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        for one, other in zip(
            reference_loops(p).values(), by_kernel_position(p).values(), strict=True
        ):
            assert np.array_equal(np.isnan(one), np.isnan(other))
            assert np.array_equal(np.isinf(one), np.isinf(other))
            np.testing.assert_allclose(one, other, rtol=1e-12)


def test_the_oracle_by_kernel_position_is_exact_on_integers():
    p = Problem.integers(Case(70, 3, 3, (2, 9, 9)), 0)
    found = by_kernel_position(p)
    assert {t.dtype for t in found.values()} == {np.dtype(np.float64)}
    assert found[OUTPUT][1, 2, 3, 4] == (p.x[1, :, 3:6, 4:7] * p.w[2]).sum() + p.b[2]


def options_of(case: Case) -> list:
    names = ["stride", "padding", "padding_mode", "dilation", "groups", "bias", "kernel_size"]
    return [*(getattr(case, name) for name in names), case.out_channels, len(case.size)]


def test_the_short_grids_have_every_pair_of_options():
    def tuples(cases: list[Case], length: int) -> set:
        options = [enumerate(options_of(case)) for case in cases]
        return {some for o in options for some in itertools.combinations(o, length)}

    whole, shorts = grid(), [grid(first) for first in SHORT_GRIDS]
    assert tuples([*shorts[0], *shorts[1]], 2) == tuples(whole, 2)
    for short in shorts:
        assert tuples(short, 1) == tuples(whole, 1)
        assert set(short) < set(whole)
        assert len(short) * 40 < len(whole)
        unbatched = sum(len(case.size) == 2 for case in short)
        assert abs(unbatched - len(short) / 2) <= 1


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_shapes_of_a_case_are_those_of_nn_conv2d():
    cases = [*corners(), *grid(0), *size_cases(short=False), *network_layers(short=False)]
    for case in [*cases, *random_cases(1, 100)]:
        layer, _, shape = case.call("nn.Conv2d").partition(" on ")
        with torch.device("meta"):
            conv = eval(layer)
            y = conv(torch.empty(eval(shape)))
        assert tuple(y.shape) == case.output_shape, case
        assert tuple(conv.weight.shape) == case.weight_shape


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_case_is_valid_where_nn_conv2d_accepts_it(mode):
    verdicts = set()
    for size, kernel, stride, padding, dilation in itertools.product(
        [(1, 1, 4), (1, 3, 2)], [1, 3, (2, 4)], [1, (1, 3)], [0, 1, (2, 4), "same"], [1, 2]
    ):
        case = Case(1, 1, kernel, size, stride, padding, dilation, padding_mode=mode)
        try:
            nn.Conv2d(1, 1, kernel, **case.options())(torch.zeros(case.input_shape))
            taken = True
        except (RuntimeError, ValueError):
            taken = False
        assert case.valid == taken, case
        verdicts.add(taken)
    assert verdicts == {True, False}


def test_random_cases_differ_in_everything():
    cases = list(random_cases(0, 300))
    assert cases == list(random_cases(0, 300))
    assert cases[:20] != list(random_cases(1, 20))
    assert len(set(cases)) == 300
    assert {case.padding_mode for case in cases} == {"zeros", "reflect", "replicate", "circular"}
    assert {len(case.size) for case in cases} == {2, 3}
    assert {case.size[0] % 2 for case in cases if len(case.size) == 3} == {0, 1}
    assert {"same", "valid"} < {case.padding for case in cases}
    assert sum(case.in_channels != case.out_channels for case in cases) > 200
    for name in ("kernel_size", "stride", "dilation"):
        assert sum(len(set(getattr(case, name))) == 2 for case in cases) > 90
