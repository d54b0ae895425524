"""The Triton kernels under Triton's interpreter, on the CPU: run by test_triton.py in a process of its own.

The interpreter multiplies bfloat16 wrongly, so everything here is float32.
"""

import pytest
import torch
from torch import Tensor, nn

from momify.model.activation import Activation, make_activation
from momify.model.dispatch import BACKENDS, choose_backend, routed
from momify.model.plan import make_plan
from momify.model.pool import StackedLinear

# (tokens, modules, K, width, inner, out); odd sizes, sizes below and above a tile, one module, nobody
SIZES = [
    (5, 3, 1, 7, 9, 11),
    (70, 4, 1, 33, 130, 17),
    (37, 5, 2, 40, 65, 40),
    (1, 1, 1, 3, 5, 4),
    (9, 6, 3, 130, 24, 66),
]


def stack(modules: int, inside: int, out: int) -> StackedLinear:
    layer = StackedLinear(modules, inside, out)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def outcome(backend: str, case: tuple, layers: list[StackedLinear], activation: Activation | None) -> list[Tensor]:
    """Output, then the gradients of tokens, gates and every parameter."""
    x, modules, gates = case
    x = x.clone().requires_grad_()
    gates = None if gates is None else gates.clone().requires_grad_(gates.requires_grad)
    chosen = BACKENDS[backend]
    plan = make_plan(modules, gates, layers[0].weight.shape[0], chosen.wait)
    y = routed(x, plan, [layer() for layer in layers], activation, chosen)
    inputs = [x, *([gates] if gates is not None and gates.requires_grad else [])]
    inputs += [parameter for layer in layers for parameter in layer.parameters()]
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    if not y.requires_grad:  # the reference, where nobody picked a module
        return [y, *(torch.zeros_like(i) for i in inputs)]
    found = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)
    return [y, *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True))]


def compare(case: tuple, layers: list[StackedLinear], activation: Activation | None) -> None:
    ours, right = (outcome(name, case, layers, activation) for name in ("triton", "reference"))
    assert len(ours) == len(right)
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gates", ["none", "fixed", "learned"])
@pytest.mark.parametrize("layers", ["one", "two"])
def test_output_and_every_gradient_equal_the_reference(size, gates, layers) -> None:
    n, modules, k, width, inner, out = size
    torch.manual_seed(n)
    picks = torch.randint(0, modules + 1, (n, k))
    picks[picks == 1] = modules  # module 1 stays empty where there is one
    weights = None if gates == "none" else torch.rand(n, k).requires_grad_(gates == "learned")
    shapes = [(width, out)] if layers == "one" else [(width, inner), (inner, out)]
    compare(
        (torch.randn(n, width), picks, weights),
        [stack(modules, *shape) for shape in shapes],
        make_activation("gelu_new"),
    )


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "gelu_new", "tanh"])
def test_activations(name) -> None:
    """Those that the kernels know, and one (tanh) that stays outside."""
    torch.manual_seed(1)
    picks, x = torch.randint(0, 4, (20, 2)), torch.randn(20, 8) * 2
    compare((x, picks, torch.rand(20, 2)), [stack(3, 8, 12), stack(3, 12, 6)], make_activation(name))


@pytest.mark.parametrize("picks", [[3] * 6, [2] * 6, [0, 3, 3, 3, 3, 0]], ids=["nobody", "one module", "few"])
def test_lopsided_picks(picks) -> None:
    torch.manual_seed(2)
    compare((torch.randn(6, 5), torch.tensor(picks)[:, None], None), [stack(3, 5, 4)], None)


def test_some_columns_and_rows_with_strides() -> None:
    torch.manual_seed(3)
    layer, x = stack(3, 8, 24), torch.randn(8, 10).T
    picks = torch.randint(0, 4, (10, 1))
    for columns in ((0, 8), (8, None)):
        parts = []
        for name in ("triton", "reference"):
            layer.zero_grad()
            plan = make_plan(picks, None, 3, BACKENDS[name].wait)
            y = routed(x, plan, [layer().columns(*columns)], None, BACKENDS[name])
            y.square().sum().backward()
            parts.append((y.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()))
        for a, b in zip(*parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_backend_may_be_asked_for(monkeypatch) -> None:
    monkeypatch.setenv("MOMIFY_KERNELS", "triton")
    assert choose_backend(torch.device("cpu"), torch.float32).name == "triton"


@pytest.mark.parametrize("changes", [{}, {"router_explore": 0.5}, {"patch_rank": 3}])
def test_a_whole_model_and_its_gradients(make_mom, token_ids, changes, monkeypatch) -> None:
    model = make_mom(**changes).train()
    found = []
    for name in ("triton", "reference"):
        monkeypatch.setenv("MOMIFY_KERNELS", name)
        model.zero_grad()
        torch.manual_seed(5)
        out = model(token_ids, labels=token_ids)
        out.loss.backward()
        found.append([out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
