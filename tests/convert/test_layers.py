"""Folded layers against LayerNorm and projections written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from momify.convert.layers import LayerSettings, query_factor, take_apart, take_frame


def random_layer(layer: int, width: int, inner: int) -> dict[str, torch.Tensor]:
    shapes = {
        "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width), "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width), "attn.c_proj.bias": (width,),
        "mlp.c_fc.weight": (width, inner), "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, width), "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    return {f"h.{layer}.{name}": torch.randn(shape) for name, shape in shapes.items()}


@given(layers=st.integers(1, 3), heads=st.integers(1, 3), size=st.integers(1, 5), inner=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_folded_projection_of_the_plain_norm_equals_the_affine_norm(layers, heads, size, inner):
    width = heads * size
    tensors = {}
    for layer in range(layers):
        tensors |= random_layer(layer, width, inner)
    folded = take_apart(tensors, LayerSettings(layers, heads), torch.float64)
    x = torch.randn(4, width, dtype=torch.float64)
    x_hat = F.layer_norm(x, (width,))
    for layer in range(layers):
        part = {name.removeprefix(f"h.{layer}."): t.double() for name, t in tensors.items() if f"h.{layer}." in name}
        for norm, linear, weight, bias in (
            ("ln_1", "attn.c_attn", folded.qkv_weight, folded.qkv_bias),
            ("ln_2", "mlp.c_fc", folded.up_weight, folded.up_bias),
        ):
            normed = F.layer_norm(x, (width,), part[f"{norm}.weight"], part[f"{norm}.bias"])
            expected = normed @ part[f"{linear}.weight"] + part[f"{linear}.bias"]
            torch.testing.assert_close(x_hat @ weight[layer] + bias[layer], expected)
        assert torch.equal(folded.out_weight[layer], part["attn.c_proj.weight"])
        assert torch.equal(folded.out_bias[layer], part["attn.c_proj.bias"])
        assert torch.equal(folded.down_weight[layer], part["mlp.c_proj.weight"])
        assert torch.equal(folded.down_bias[layer], part["mlp.c_proj.bias"])


@pytest.mark.parametrize(
    ("weights", "by_layer", "expected"),
    [(True, False, 1.0), (False, False, 4.0), (True, True, 1 / 3), (False, True, 4 / 3)],
)
def test_query_factor_turns_every_scale_into_the_usual_one(weights, by_layer, expected):
    settings = LayerSettings(4, 2, weights, by_layer)
    assert query_factor(settings, 2, 32) == pytest.approx(expected)  # head_dim 16, third layer


def test_only_queries_are_scaled():
    tensors = random_layer(0, 4, 4) | random_layer(1, 4, 4)
    plain = take_apart(tensors, LayerSettings(2, 1), torch.float64)
    scaled = take_apart(tensors, LayerSettings(2, 1, scale_attn_by_inverse_layer_idx=True), torch.float64)
    torch.testing.assert_close(scaled.qkv_weight[1, :, :4], plain.qkv_weight[1, :, :4] / 2)
    torch.testing.assert_close(scaled.qkv_bias[1, :4], plain.qkv_bias[1, :4] / 2)
    assert torch.equal(scaled.qkv_weight[:, :, 4:], plain.qkv_weight[:, :, 4:])
    assert torch.equal(scaled.qkv_weight[0], plain.qkv_weight[0])


def test_folding_happens_in_float64_and_leaves_the_source_alone():
    tensors = random_layer(0, 32, 8)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    exact = take_apart(tensors, LayerSettings(1, 1), torch.float64)
    rounded = take_apart(tensors, LayerSettings(1, 1))
    assert rounded.qkv_bias.dtype == torch.float32
    assert torch.equal(rounded.qkv_bias, exact.qkv_bias.float())  # one rounding, at the end
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)


def test_frame_uses_the_embedding_as_head_only_when_there_is_no_own_one():
    tensors = {"wte.weight": torch.randn(5, 4), "wpe.weight": torch.randn(3, 4)}
    tensors |= {"ln_f.weight": torch.randn(4), "ln_f.bias": torch.randn(4)}
    frame = take_frame(tensors)
    assert frame.head is frame.wte
    own = torch.randn(5, 4)
    assert torch.equal(take_frame({**tensors, "lm_head.weight": own}).head, own)
