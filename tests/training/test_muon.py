"""The Muon optimizer against singular values, and against PyTorch's own where it has one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnntrain.config import compose
from cnntrain.models import LeNet5
from cnntrain.training import Muon
from cnntrain.training.building import build_run
from cnntrain.training.optim import orthogonal


@pytest.mark.parametrize("shape", [(6, 25), (25, 6), (64, 64), (1, 9), (128, 400)])
def test_orthogonal_keeps_singular_vectors(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = torch.logspace(0, -2, len(s), dtype=torch.float64)  # the last ones are a hundredth
    found = orthogonal((1e-6 * u * s @ vh).float()).double()
    within = u.T @ found @ vh.T
    torch.testing.assert_close(within, within.diagonal().diag(), rtol=0, atol=1e-3)
    assert within.diagonal().min() > 0.5
    assert within.diagonal().max() < 1.25
    assert not orthogonal(torch.zeros(3, 4)).any()


def gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_updates_equal_torch_muon_and_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = LeNet5(), LeNet5()
    theirs.load_state_dict(ours.state_dict())
    hidden = [m for m in theirs.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]
    matrices = [nn.Parameter(m.weight.detach().flatten(1)) for m in hidden]  # in the same memory
    weights = {id(m.weight) for m in hidden}
    others = [p for p in theirs.parameters() if id(p) not in weights]
    assert len(others) == 5 + 6 + 1  # biases, norms, the last layer's weight
    optimizer = Muon(ours.parameters(), lr=0.03, momentum=0.8, weight_decay=0.1, adam_lr=0.01)
    muon = torch.optim.Muon(matrices, lr=0.03, momentum=0.8, weight_decay=0.1)
    adam = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1)
    for step in range(5):
        gradients(ours, step)
        gradients(theirs, step)
        for matrix, layer in zip(matrices, hidden, strict=True):
            assert layer.weight.grad is not None
            matrix.grad = layer.weight.grad.flatten(1)
        for each in (optimizer, muon, adam):
            each.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if id(q) in weights:  # theirs is computed in bfloat16: 1 % of five steps
            torch.testing.assert_close(p, q, rtol=0, atol=0.004, msg=name)
            assert (p - q).abs().mean() < 1e-3
        else:
            torch.testing.assert_close(p, q, msg=name)


def test_saved_state_resumes(tmp_path: Any) -> None:
    def steps(network: nn.Module, optimizer: Muon, numbers: range) -> None:
        for number in numbers:
            gradients(network, number)
            optimizer.step()

    torch.manual_seed(0)
    whole = LeNet5()
    first = LeNet5()
    first.load_state_dict(whole.state_dict())
    steps(whole, Muon(whole.parameters()), range(6))
    optimizer = Muon(first.parameters())
    steps(first, optimizer, range(3))
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "saved")
    weights, state = torch.load(tmp_path / "saved", weights_only=True)
    second = LeNet5()
    second.load_state_dict(weights)
    again = Muon(second.parameters(), lr=7.0)  # the state has the rates
    again.load_state_dict(state)
    steps(second, again, range(3, 6))
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_schedules_move_both_rates() -> None:
    cfg = compose(["optimizer=muon", "scheduler=cosine", "optimizer.lr=0.1", "optimizer.adam_lr=1"])
    optimizer, schedule = build_run(cfg)[1].schedule(100)
    assert schedule
    rates: list[list[float]] = []
    for _ in range(100):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule["scheduler"].step()
    for hidden, other in rates:
        assert hidden == pytest.approx(other / 10)
    assert max(hidden for hidden, _ in rates) == pytest.approx(0.1)


def test_parameters_without_gradient_stay(tmp_path: Any) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    before: list[Tensor] = [p.detach().clone() for p in network.parameters()]
    optimizer = Muon(network.parameters())
    loss = optimizer.step(lambda: network[2](torch.ones(1, 4)).sum().backward() or 5.0)
    assert loss == 5.0
    moved = [not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True)]
    assert moved == [False] * 4 + [True] * 2


def trained(steps: int, *, rate: Any = float, skipped: Tensor | None = None) -> list[Tensor]:
    """Parameters and state of Muon after so many steps, then one of NaNs with this `found_inf`."""
    torch.manual_seed(0)
    network = LeNet5()
    optimizer = Muon(network.parameters(), lr=0.03, weight_decay=0.1, adam_lr=0.01)
    for group in optimizer.param_groups:
        group["lr"] = rate(group["lr"])
    for step in range(steps):
        gradients(network, step)
        optimizer.step()
    if skipped is not None:
        optimizer.found_inf = skipped
        for p in network.parameters():
            p.grad = torch.full_like(p, torch.nan)
        optimizer.step()
    states = [t for p in network.parameters() for t in optimizer.state[p].values()]
    return [*(p.detach() for p in network.parameters()), *states]


@pytest.mark.parametrize("rate", [float, torch.tensor], ids=["number", "tensor"])
def test_step_with_found_inf_is_skipped(rate: Any) -> None:
    expected = trained(3, rate=rate)
    torch.testing.assert_close(
        trained(3, rate=rate, skipped=torch.ones(())), expected, rtol=0, atol=0
    )
    moved = trained(3, rate=rate, skipped=torch.zeros(()))
    assert any(t.isnan().any() for t in moved)


def test_learning_rate_may_be_a_tensor() -> None:
    torch.testing.assert_close(trained(3, rate=torch.tensor), trained(3), rtol=1e-4, atol=1e-6)
