"""Derivatives of first and second order, in both modes, and ``torch.func``."""

from __future__ import annotations

import itertools

import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import Conv2d
from torch.testing import assert_close

from cnntrain.lab.capabilities.twins import (
    Backend,
    Parameters,
    call,
    function_and_inputs,
    loss,
    parameters_of,
    twins,
)

DIFFERENCES = "not what finite differences give"


def first_derivatives(backend: Backend) -> None:
    for needs in itertools.product((True, False), repeat=3):
        ours, reference, x = twins(backend)
        given = []
        for conv in (ours, reference):
            leaves = [x.clone(), *conv.parameters()]
            for leaf, need in zip(leaves, needs, strict=True):
                leaf.requires_grad_(need)
            if any(needs):
                conv(leaves[0]).square().sum().backward()
            given.append([leaf.grad for leaf in leaves])
        for mine, theirs in zip(*given, strict=True):
            assert (mine is None) == (theirs is None), f"gradients for {needs} of (x, w, bias)"
            if mine is not None:
                assert_close(mine, theirs)
    function, inputs = function_and_inputs(ours, x)
    assert gradcheck(function, inputs, raise_exception=False), DIFFERENCES


def second_derivatives(backend: Backend) -> None:
    ours, _, x = twins(backend)
    function, inputs = function_and_inputs(ours, x[:2])
    assert gradgradcheck(function, inputs, raise_exception=False), DIFFERENCES


def forward_mode(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    assert_close(jacfwd(ours)(x), jacobian(reference, x))
    point = parameters_of(reference), x
    for model in ensemble(reference):
        mine = jvp(loss(ours), point, (model, 2 * x))[1]
        dparameters, dx = grad(loss(reference), (0, 1))(*point)
        slope = sum((dparameters[name] * model[name]).sum() for name in model)
        assert_close(mine, slope + (dx * 2 * x).sum())


def hessians(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    assert_close(jacrev(ours)(x), jacobian(reference, x))
    theirs = jacrev(jacrev(loss(reference)))(parameters_of(reference), x[:1])
    assert_close(hessian(loss(ours))(parameters_of(ours), x[:1]), theirs)


def batched_gradients(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    x.requires_grad_()
    mine, theirs = ours(x), reference(x)
    many = torch.stack([theirs.detach(), theirs.detach().cos()])
    each = [torch.autograd.grad(theirs, x, g, retain_graph=True)[0] for g in many]
    (batched,) = torch.autograd.grad(mine, x, many, is_grads_batched=True)
    assert_close(batched, torch.stack(each))


def vmap_inputs(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    many = torch.stack([x, -x, x + 1], dim=2)  # (3, 4, 3 of them, 3, 7)
    each = torch.stack([reference(many[:, :, i]) for i in range(3)], dim=1)
    assert_close(vmap(ours, in_dims=2, out_dims=1)(many), each)
    assert_close(vmap(ours, in_dims=2, out_dims=1, chunk_size=2)(many), each)
    assert_close(vmap(vmap(ours, in_dims=1))(many), each)


def vmap_weights(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    models, inputs = ensemble(reference), torch.stack([x, -x, x + 1], dim=1)
    all_pairs = torch.stack(
        [torch.stack([call(reference)(model, inputs[:, i]) for i in range(3)]) for model in models]
    )
    stack = stacked(models)
    assert_close(vmap(call(ours), (0, None))(stack, x), all_pairs[:, 0])
    pairs = vmap(call(ours), (0, 1))(stack, inputs)
    assert_close(pairs, torch.stack([all_pairs[i, i] for i in range(3)]))
    assert_close(vmap(vmap(call(ours), (None, 1)), (0, None))(stack, inputs), all_pairs)
    for name, values in stack.items():  # the weight alone, the bias alone
        one = parameters_of(reference)
        each = [call(reference)(one | {name: value}, x) for value in values]
        mine = vmap(lambda value, n=name, p=one: call(ours)(p | {n: value}, x))(values)
        assert_close(mine, torch.stack(each))


def vmap_of_grad(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    models = ensemble(reference)
    mine, theirs = (grad(loss(conv), argnums=(0, 1)) for conv in (ours, reference))
    each_sample, dx = vmap(mine, (None, 0))(models[0], x)
    for n in range(3):
        expected = theirs(models[0], x[n])
        assert_close(({name: g[n] for name, g in each_sample.items()}, dx[n]), expected)
    each_model, dx = vmap(mine, (0, None))(stacked(models), x)
    for i, model in enumerate(models):
        expected = theirs(model, x)
        assert_close(({name: g[i] for name, g in each_model.items()}, dx[i]), expected)


def ensemble(conv: Conv2d) -> list[Parameters]:
    return [{k: factor * v for k, v in parameters_of(conv).items()} for factor in (1.0, -0.5, 2.0)]


def stacked(models: list[Parameters]) -> Parameters:
    return {name: torch.stack([model[name] for model in models]) for name in models[0]}
