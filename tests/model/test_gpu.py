"""What only a GPU can show: the compiled kernels' numbers, and that the host waits for nothing (pytest -m gpu)."""

import pytest
import torch

from momify.model.dispatch import BACKENDS, choose_backend, routed
from momify.model.plan import make_plan
from momify.model.pool import StackedLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("k", [1, 2])
def test_kernels_equal_the_reference_in_float64(dtype, limit, k) -> None:
    torch.manual_seed(0)
    layer = StackedLinear(5, 96, 160).cuda()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(300, 96, device="cuda")
    picks, gates = torch.randint(0, 6, (300, k), device="cuda"), torch.rand(300, k, device="cuda")
    found = []
    for name, kind in (("triton", dtype), ("reference", torch.float64)):
        made = StackedLinear(5, 96, 160).to("cuda", kind)
        made.load_state_dict(layer.state_dict())
        rows = x.to(kind, copy=True).requires_grad_()
        plan = make_plan(picks, gates, 5, BACKENDS[name].wait)
        y = routed(rows, plan, [made()], None, BACKENDS[name])
        y.square().mean().backward()
        found.append([part.double() for part in (y, rows.grad, made.weight.grad, made.bias.grad)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < limit * b.norm()


@torch.no_grad()
def test_a_forward_pass_never_waits_for_the_device(make_mom, token_ids) -> None:
    model, ids = make_mom().cuda(), token_ids.cuda()
    assert choose_backend(ids.device, torch.float32).name == "triton"
    first = model(ids, use_cache=True).logits  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = model(ids, use_cache=True).logits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
