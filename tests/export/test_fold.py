"""Patches as feed-forward halves and deltas in their modules, against the formulas written out in float64."""

import pytest
import torch
from transformers.activations import ACT2FN

from momify.export.fold import carries_linear, patch_feed_forward, with_delta
from momify.model.config import LEARNED_ACTIVATIONS

# act(z) = z s(z) with s(z) + s(-z) = 1 (hardswish: relu6(z + 3) / 6), or max(z, 0): by their formulas, one by one
CARRY = {
    "gelu", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "quick_gelu", "relu", "silu", "swish",
}  # fmt: skip


def test_which_activations_carry_a_linear_map() -> None:
    names = set(ACT2FN) - set(LEARNED_ACTIVATIONS)
    assert {"tanh", "sigmoid", "mish", "relu2", "relu6", "leaky_relu", "linear", "gelu_10", "laplace"} <= names
    assert {name for name in names if carries_linear(name)} == CARRY


@pytest.mark.parametrize("activation", sorted(CARRY))
@pytest.mark.parametrize(("rank", "inner"), [(3, 6), (3, 11), (1, 2)])
def test_a_patch_is_a_feed_forward(activation: str, rank: int, inner: int) -> None:
    factors = torch.randn(7, rank), torch.randn(rank, 7), torch.randn(7)
    x = 5 * torch.randn(50, 7)
    (up, up_bias), (down, down_bias) = patch_feed_forward(*factors, inner)
    assert (up.shape, up_bias.shape, down.shape, down_bias.shape) == ((7, inner), (inner,), (inner, 7), (7,))
    found = ACT2FN[activation](x @ up + up_bias) @ down + down_bias
    weight_in, weight_out, bias = (part.double() for part in factors)
    expected = x.double() @ weight_in @ weight_out + bias
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


def test_a_delta_is_added_to_its_module() -> None:
    weight, bias, x = torch.randn(5, 8), torch.randn(8), torch.randn(9, 5).double()
    delta = torch.randn(5, 2), torch.randn(2, 8), torch.randn(8)
    folded = with_delta((weight, bias), delta)
    assert folded[0].dtype == torch.float64
    apart = x @ weight.double() + bias.double() + x @ delta[0].double() @ delta[1].double() + delta[2].double()
    torch.testing.assert_close(x @ folded[0] + folded[1], apart, rtol=1e-12, atol=1e-12)
