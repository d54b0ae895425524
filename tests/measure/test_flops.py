"""Counters against formulas written out here and eager attention, which both counters see by themselves."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from momify.measure.cost import dense_macs
from momify.measure.flops import classify, count_fvcore, count_torch

MakeGpt2 = Callable[..., GPT2LMHeadModel]
VARIANTS = [
    {},
    {"n_inner": 50},
    {"tie_word_embeddings": False},
    {"activation_function": "gelu"},
    {"scale_attn_by_inverse_layer_idx": True},
    {"vocab_size": 67, "n_layer": 1, "n_head": 1},
]


def by_hand(model: GPT2LMHeadModel, batch: int, tokens: int) -> int:
    """Products of one forward pass, from the shapes of the weights themselves."""
    n, macs = batch * tokens, 0
    for block in model.transformer.h:
        for conv in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            macs += n * conv.weight.numel()
        macs += 2 * batch * tokens * tokens * model.config.n_embd
    return macs + n * model.lm_head.weight.numel()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_three_ways_agree_exactly(make_gpt2: MakeGpt2, variant: dict, attention: str) -> None:
    model = make_gpt2(attn_implementation=attention, **variant)
    ids = torch.randint(0, 61, (2, 11))
    expected = by_hand(model, 2, 11)
    assert count_fvcore(model, ids).macs == expected
    assert count_torch(model, ids).macs == expected
    assert count_torch(model, ids).flops == 2 * expected
    assert dense_macs(model.config, 2, 11).total == expected


def test_plain_fvcore_misses_attention(make_gpt2: MakeGpt2) -> None:
    """Why the handler is there: should fvcore learn SDPA one day, this test says so."""

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    model, ids = make_gpt2(), torch.randint(0, 61, (1, 40))
    plain = FlopCountAnalysis(Logits(model), (ids,))
    plain.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert plain.by_operator()["scaled_dot_product_attention"] == 0
    ours = count_fvcore(model, ids).by_operator
    assert ours["scaled_dot_product_attention"] == 4 * 2 * 40 * 40 * 32
    assert "layer_norm" not in ours


def test_gpt2_large_at_full_length_on_the_meta_device() -> None:
    """0.887 TMACs (design section 4), as torch counts the real module without holding its weights."""

    class Masked(nn.Module):
        """With the mask given: to decide whether one is needed would look at values, and there are none."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            mask = torch.zeros(1, 1, 1024, 1024)
            return self.model(input_ids, attention_mask=mask, use_cache=use_cache)

    config = GPT2Config(n_embd=1280, n_layer=36, n_head=20, attn_implementation="eager")
    with torch.device("meta"):
        macs = count_torch(Masked(GPT2LMHeadModel(config)), torch.zeros(1, 1024, dtype=torch.long)).macs
    assert macs == dense_macs(config, 1, 1024).total
    assert macs / 1e12 == pytest.approx(0.887, abs=5e-4)


def test_what_is_left_out_is_named_once_and_classed(make_gpt2: MakeGpt2) -> None:
    count = count_fvcore(make_gpt2(), torch.randint(0, 61, (1, 5)))
    names = [op.name for op in count.unsupported]
    kinds = {op.name: (op.kind, op.arithmetic) for op in count.unsupported}
    assert len(names) == len(set(names))
    assert kinds["aten::tanh"] == ("elementwise", True)
    assert kinds["aten::embedding"] == ("movement", False)
    assert count.unknown == ()


def test_products_are_never_taken_for_harmless() -> None:
    for name in (
        "aten::mv",
        "aten::dot",
        "aten::convolution",
        "aten::lstm",
        "momify::routed",
        "prim::PythonOp.Mine",
    ):
        assert classify(name) == "unknown"


def test_an_operator_nobody_knows_is_reported() -> None:
    class Odd(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            x = input_ids.float()
            return type("Out", (), {"logits": torch.cdist(x, x)})()

    assert count_fvcore(Odd(), torch.ones(3, 4)).unknown == ("aten::cdist",)


def test_a_model_in_training_is_counted_without_dropout_and_left_in_training(make_gpt2: MakeGpt2) -> None:
    model = make_gpt2(attn_pdrop=0.5).train()
    ids = torch.randint(0, 61, (1, 9))
    assert count_fvcore(model, ids).macs == count_torch(model, ids).macs == by_hand(model, 1, 9)
    assert model.training


def test_importing_leaves_torchs_registry_alone() -> None:
    code = (
        "from torch.utils.flop_counter import flop_registry as r; before = set(r);"
        "import momify.measure.flops as f; assert set(r) == before;"
        "f.register_formulas(); f.register_formulas(); assert len(r) > len(before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
