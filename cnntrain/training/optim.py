"""Learning rate schedules, parameter groups and the Muon optimizer."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from cnntrain.models import head

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class OneCycle(OneCycleLR):
    """The one-cycle schedule of Smith and Topin (arXiv:1708.07120), updated every step.

    The learning rate rises from lr / div_factor to the optimizer's lr during the first `pct_start`
    of the run, then falls to lr / div_factor / final_div_factor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        div_factor: PositiveFloat = 25.0,
        final_div_factor: PositiveFloat = 1e4,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
    ):
        if pct_start * total_steps == 1:
            pct_start *= 0.9  # OneCycleLR divides by pct_start * total_steps - 1
        super().__init__(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total_steps,
            pct_start=pct_start,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
            anneal_strategy=anneal_strategy,
            cycle_momentum=cycle_momentum,
        )


class WarmupCosine(LambdaLR):
    """Linear warm-up to the optimizer's lr during a share `warmup` of all steps, then half a cosine
    down to `final` times the lr (Loshchilov and Hutter, arXiv:1608.03983, without restarts)."""

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05,
        final: Share = 0.0,
    ):
        rising = round(warmup * total_steps)

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            done = min(1.0, (step - rising) / max(1, total_steps - rising))
            return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor)


def build_optimizer(make: Callable[..., Optimizer], network: nn.Module) -> Optimizer:
    """The optimizer of those parameters of a network that require a gradient.

    Args:
        make: Called with `params`. A `functools.partial` may have `backbone_lr_factor` among its
            keywords, which is not passed on.

    Raises:
        ValueError: As `scale_backbone_lr`.
    """
    make = copy.deepcopy(make)  # of Hydra's own class, so that its keywords are changed in place
    factor = getattr(make, "keywords", {}).pop("backbone_lr_factor", 1.0)
    optimizer = make(params=[p for p in network.parameters() if p.requires_grad])
    if factor != 1:
        scale_backbone_lr(optimizer, network, factor)
    return optimizer


def scale_backbone_lr(
    optimizer: Optimizer, network: nn.Module, backbone_lr_factor: PositiveFloat
) -> None:
    """Multiply the learning rates of all layers but the head, the last layer with parameters.

    A parameter group with both is divided in two, the head's first.

    Raises:
        ValueError: Only the head is trained.
    """
    last = set(head(network)[1].parameters())
    if all(p in last for group in optimizer.param_groups for p in group["params"]):
        option = f"optimizer.backbone_lr_factor={backbone_lr_factor}"
        raise ValueError(f"{option}: only the last layer is trained; leave it out")
    for group in list(optimizer.param_groups):
        backbone = [p for p in group["params"] if p not in last]
        lr = group["lr"] * backbone_lr_factor
        if len(backbone) == len(group["params"]):
            group["lr"] = lr
        elif backbone:
            group["params"] = [p for p in group["params"] if p in last]
            optimizer.add_param_group({**group, "params": backbone, "lr": lr})


class Muon(Optimizer):
    """Muon for the weights of hidden layers, AdamW for all other parameters.

    The update of a weight is its momentum (Nesterov), replaced by the nearest orthogonal matrix.
    Kernels (out, in, H, W) are taken as matrices (out, in * H * W). AdamW updates biases,
    normalisation layers and the last layer, i.e. the last parameter of two or more dimensions.
    `torch.optim.Muon` takes matrices only.

    As in PyTorch's fused optimizers, learning rates may be tensors, and `step` changes nothing if
    the attribute `found_inf` is a tensor other than 0, without synchronisation.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/

    Args:
        params: All parameters of a network, in order.
        lr: Learning rate of the matrices; multiplied by sqrt(out / in) for tall ones.
        momentum: Decay of the averaged gradient.
        weight_decay: Decoupled weight decay, per step lr * weight_decay (AdamW: adam_lr).
        adam_lr: Learning rate of AdamW.
        adam_betas: Decays of AdamW's averages.
        adam_eps: Added to AdamW's denominator.
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
        hidden = [p for p in parameters if p.ndim >= 2][:-1]
        others = [p for p in parameters if all(p is not other for other in hidden)]
        adam = {"lr": adam_lr, "betas": tuple(adam_betas), "eps": adam_eps}
        groups = [
            {"params": hidden, "orthogonal": True},
            {"params": others, "orthogonal": False, **adam},
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
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                self._muon(group, parameters)
            elif parameters:
                self._adamw(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"]
            average = buffer.lerp(p.grad, 1 - momentum)
            update = orthogonal(p.grad.lerp(average, momentum).flatten(1))  # (out, in * H * W)
            tall = math.sqrt(max(1.0, update.shape[0] / update.shape[1]))
            update = update.reshape(p.shape)
            if isinstance(lr, Tensor):
                updated = p - lr * (tall * update + decay * p)
            else:
                updated = p.mul(1 - lr * decay).add(update, alpha=-lr * tall)
            for old, new in ((buffer, average), (p, updated)):
                skip = self.found_inf
                old.copy_(new if skip is None else torch.where(skip > 0, old, new))

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        device, on_device = parameters[0].device, isinstance(group["lr"], Tensor)
        fused = on_device or self.found_inf is not None or device.type == "cuda"
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] = state["step"].to(device)  # a checkpoint is loaded to the CPU
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


# Coefficients and iterations of the polynomial that moves all singular values to 0.7 to 1.2.
A, B, C, ITERATIONS = 3.4445, -4.7750, 2.0315, 5


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximately U V^T of a matrix U S V^T (m, n), in float32, by Newton-Schulz iteration."""
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-30)  # no singular value is above 1
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x
