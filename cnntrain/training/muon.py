"""The Muon optimizer, for networks with convolutions."""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

Decay = Annotated[float, Field(ge=0, lt=1)]

# Of the polynomial that takes all singular values to about 1 (0.7 to 1.2), and how often.
A, B, C, STEPS = 3.4445, -4.7750, 2.0315, 5


class Muon(Optimizer):
    """Muon for the weights of hidden layers, AdamW for all else.

    A weight moves by the orthogonal matrix nearest to its averaged gradient (with Nesterov's
    momentum): in all directions alike, also in those of which the gradient has little. A kernel
    (out, in, H, W) is a matrix (out, in * H * W). Biases, normalisation and the last layer, which
    is taken to be the last parameter with two dimensions or more, are AdamW's. `torch.optim.Muon`
    does the same for matrices, in bfloat16, and takes no other parameters.

    As with PyTorch's fused optimizers a learning rate may be a tensor, and `step` does nothing, on
    the device, where the attribute `found_inf` is a tensor other than 0: nobody waits for it.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/

    Args:
        params: All parameters of a network, in its order.
        lr: Of the matrices: every step is as long as that, times sqrt(out / in) for tall ones.
        momentum: Share of the averaged gradient that stays.
        weight_decay: Shrinks weights by lr * weight_decay a step (those of AdamW by its lr).
        adam_lr: Learning rate of AdamW.
        adam_betas: Of AdamW.
        adam_eps: Of AdamW.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: NonNegativeFloat = 0.02,
        momentum: Decay = 0.95,
        weight_decay: NonNegativeFloat = 0.01,
        adam_lr: NonNegativeFloat = 0.006,
        adam_betas: tuple[Decay, Decay] = (0.9, 0.999),
        adam_eps: PositiveFloat = 1e-8,
    ):
        parameters = list(params)
        matrices = [p for p in parameters if p.ndim >= 2][:-1]
        hidden = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in hidden]
        groups = [
            {"params": matrices, "orthogonal": True},
            {
                "params": others,
                "orthogonal": False,
                "lr": adam_lr,
                "betas": tuple(adam_betas),
                "eps": adam_eps,
            },
        ]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                self._orthogonal(group, moved)
            elif moved:
                self._adam(group, moved)
        return loss

    def _orthogonal(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            average = state["momentum_buffer"].lerp(p.grad, 1 - momentum)
            step = orthogonal(p.grad.lerp(average, momentum).flatten(1))  # (out, in * H * W)
            tall = math.sqrt(max(1.0, step.shape[0] / step.shape[1]))
            step, decay = step.reshape(p.shape), group["weight_decay"]
            if isinstance(lr, Tensor):
                moved = p - lr * (tall * step + decay * p)
            else:
                moved = p.mul(1 - lr * decay).add(step, alpha=-lr * tall)
            for old, new in ((state["momentum_buffer"], average), (p, moved)):
                skip = self.found_inf
                old.copy_(new if skip is None else torch.where(skip > 0, old, new))

    def _adam(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        on_device = isinstance(group["lr"], Tensor) or self.found_inf is not None
        fused = on_device or parameters[0].is_cuda
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if state["step"].device != p.device:  # where a checkpoint has left it
                state["step"] = state["step"].to(p.device)
        states = [self.state[p] for p in parameters]
        gradients: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        adamw(
            list(parameters),
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=not fused,
            fused=fused,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T (m, n), in float32; zero of zero.

    By Newton and Schulz's iteration, which needs nothing but products.
    """
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-30)  # no singular value is above 1
    for _ in range(STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x
