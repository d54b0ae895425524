"""Routed execution against a loop over tokens, forward and backward."""

import subprocess
import sys

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from momify.model.dispatch import BACKENDS, choose_backend, routed
from momify.model.plan import FEW, Plan, make_plan, static_plan
from momify.model.pool import StackedLinear

WIDTH, INNER, OUT = 5, 6, 7


def stack(modules: int, inside: int, out: int) -> StackedLinear:
    layer = StackedLinear(modules, inside, out).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def loop(x: Tensor, modules: Tensor, gates: Tensor, layers: list[StackedLinear]) -> Tensor:
    """One token and one pick at a time, reading the parameters directly."""
    rows = []
    for row, picks, weights in zip(x, modules.tolist(), gates, strict=True):
        total = x.new_zeros(layers[-1].bias.shape[1])
        for module, gate in zip(picks, weights, strict=True):
            if module == layers[0].weight.shape[0]:
                continue
            y = row @ layers[0].weight[module] + layers[0].bias[module]
            for layer in layers[1:]:
                y = torch.tanh(y) @ layer.weight[module] + layer.bias[module]
            total = total + gate * y
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(0, layers[-1].bias.shape[1])


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    found = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 3, 5, 13, FEW + 1]),
    modules=st.integers(1, 5),
    k=st.integers(1, 4),
    chain=st.booleans(),
    weighted=st.booleans(),
    reach=st.integers(0, 5),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from(["reference", "grouped"]),
)
def test_routed_equals_a_loop(n, modules, k, chain, weighted, reach, seed, backend) -> None:
    generator = torch.Generator().manual_seed(seed)
    choices = min(modules, reach)  # the lower it is, the more groups are empty; 0: nearly all of them
    picks = torch.randint(modules - choices, modules + 1, (n, k), generator=generator)
    gates = torch.rand(n, k, generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    sizes = [(WIDTH, INNER), (INNER, OUT)] if chain else [(WIDTH, OUT)]
    layers = [stack(modules, *size) for size in sizes]
    plan = make_plan(picks, gates if weighted else None, modules)
    ours = routed(x, plan, [layer() for layer in layers], torch.tanh, BACKENDS[backend])
    theirs = loop(x, picks, gates if weighted else torch.ones_like(gates), layers)
    torch.testing.assert_close(ours, theirs)
    inputs = [x, gates, *(p for layer in layers for p in layer.parameters())]
    if ours.requires_grad and n:
        for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_empty_plans_give_zeros() -> None:
    layer = stack(3, WIDTH, OUT)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    nobody = make_plan(torch.full((4, 2), 3), torch.rand(4, 2), 3)
    assert nobody.rows == 0
    assert torch.equal(routed(x, nobody, [layer()]), torch.zeros(4, OUT, dtype=torch.float64))
    nothing = make_plan(torch.zeros(0, 1, dtype=torch.long), None, 3)
    assert routed(x[:0], nothing, [layer()]).shape == (0, OUT)
    assert routed(x[:0], static_plan(1, 3, 0), [layer()]).shape == (0, OUT)


def test_plan_is_sorted_and_knows_its_sizes() -> None:
    plan = make_plan(torch.tensor([[2, 0], [3, 3], [0, 3]]), torch.arange(6.0).reshape(3, 2), 3)
    assert plan.sizes == (2, 0, 1)
    assert plan.rows == 3
    assert plan.tokens.tolist() == [0, 2, 0]
    assert plan.gates.tolist() == [1.0, 4.0, 0.0]
    assert plan.weighted(torch.arange(6.0).reshape(3, 2) * 10).gates.tolist() == [10.0, 40.0, 0.0]
    assert plan.weighted(None).gates is None


def test_tokens_that_agree_are_not_gathered() -> None:
    plan = make_plan(torch.full((5, 1), 2), None, 3)
    assert plan == Plan(sizes=(0, 0, 5), module=2) == static_plan(2, 3, 5)
    assert make_plan(torch.full((FEW + 1, 1), 2), None, 3) == static_plan(2, 3, FEW + 1)
    layer = stack(3, WIDTH, OUT)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    gates = torch.rand(5, 1, dtype=torch.float64)
    plain = x @ layer.weight[2] + layer.bias[2]
    torch.testing.assert_close(routed(x, plan, [layer()]), plain)
    torch.testing.assert_close(routed(x, plan.weighted(gates), [layer()]), gates * plain)


def test_some_columns() -> None:
    layer = stack(3, WIDTH, OUT)
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    plan = make_plan(torch.tensor([[1], [3], [0], [1], [3], [2]]), None, 3)
    whole = routed(x, plan, [layer()])
    torch.testing.assert_close(routed(x, plan, [layer().columns(4)]), whole[:, 4:])
    torch.testing.assert_close(routed(x, plan, [layer().columns(0, 4)]), whole[:, :4])


@pytest.mark.parametrize("n", [5, FEW + 3])
@pytest.mark.parametrize("k", [1, 3])
def test_plans_agree_however_they_are_made(n, k) -> None:
    """Sorted by Python, by operators, or for the device alone: the same rows in the same order."""
    modules = torch.randint(0, 5, (n, k), generator=torch.Generator().manual_seed(n))
    gates = torch.rand(n, k)
    plan, other = make_plan(modules, gates, 4), make_plan(modules, gates, 4, wait=False)
    expected = [at for module in range(4) for at, pick in enumerate(modules.flatten().tolist()) if pick == module]
    assert plan.picks.tolist() == other.picks[: plan.rows].tolist() == expected
    assert plan.tokens.tolist() == other.tokens[: plan.rows].tolist() == [at // k for at in expected]
    assert torch.equal(plan.gates, gates.flatten()[plan.picks])
    assert other.ends.tolist() == torch.tensor(plan.sizes).cumsum(0).tolist()
    assert other.rows == plan.rows == (modules != 4).sum()
    assert not other.idle
    assert make_plan(torch.full((n, k), 4), None, 4).idle


def test_everything_works_where_triton_is_missing() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, momify.model.dispatch as d; "
        "gpu = torch.device('cuda'); assert not d.has_triton(gpu); print(d.choose_backend(gpu, torch.bfloat16).name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "grouped"


def test_backend_is_chosen_and_overridden(monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert choose_backend(cpu, torch.float32).name == "grouped"
    monkeypatch.setenv("MOMIFY_KERNELS", "reference")
    assert choose_backend(cpu, torch.float32).name == "reference"
    monkeypatch.setenv("MOMIFY_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'cuda'; use one of reference, grouped, triton"):
        choose_backend(cpu, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_its_dtype_and_has_gradients(dtype) -> None:
    exact = stack(3, WIDTH, OUT)
    layer = stack(3, WIDTH, OUT)
    layer.load_state_dict(exact.state_dict())
    layer.to(dtype)
    x = torch.randn(9, WIDTH, dtype=dtype, requires_grad=True)
    modules = torch.randint(0, 4, (9, 2))
    gates = torch.rand(9, 2)  # float32, as routers give them
    y = routed(x, make_plan(modules, gates, 3), [layer()])
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == dtype
    # bfloat16 has 8 bits of mantissa: 2^-8 of sums of about six terms of size 1
    limit = 1e-5 if dtype == torch.float32 else 0.1
    assert (y.double() - loop(x.double(), modules, gates.double(), [exact])).abs().max() < limit


def test_autocast_computes_in_half_precision() -> None:
    layer = stack(2, WIDTH, OUT).float()
    x = torch.randn(6, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed(x, make_plan(torch.tensor([[0], [1], [2], [0], [1], [2]]), None, 2), [layer()])
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(("picks", "rows"), [([0, 1, 3, 1, 3, 0], 4), ([3] * 6, 0), ([2] * 6, 6)])
def test_fvcore_counts_exactly_the_rows_that_ran(picks, rows) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = stack(3, WIDTH, INNER).float(), stack(3, INNER, OUT).float()

        def forward(self, x: Tensor) -> Tensor:
            plan = make_plan(torch.tensor(picks)[:, None], None, 3)
            return routed(x, plan, [self.up(), self.down()], torch.tanh)

    count = FlopCountAnalysis(Routed(), torch.randn(6, WIDTH))
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert count.total() == rows * (WIDTH * INNER + INNER * OUT)
