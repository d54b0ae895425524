"""The three counts at the size that people quote: gpt2-large with random weights, T = 1024, dense and as a MoM."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel

from momify.measure.cost import dense_macs, mom_macs, planned_usage
from momify.measure.flops import count_fvcore, count_torch
from momify.measure.macs import count_macs
from momify.model import MomConfig, MomForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)


class WithMask(nn.Module):
    """With the mask given: to decide whether one is needed would look at values, and the meta device has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        mask = torch.zeros(1, 1, input_ids.shape[1], input_ids.shape[1], device=input_ids.device)
        return self.model(input_ids, attention_mask=mask, use_cache=use_cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_without_holding_its_weights(attention: str) -> None:
    config = GPT2Config(**{**LARGE.to_dict(), "attn_implementation": attention})
    with torch.device("meta"):
        model, ids = GPT2LMHeadModel(config), torch.zeros(1, 1024, dtype=torch.long)
        fvcore = count_fvcore(model, ids)
        counted = count_torch(WithMask(model), ids).macs
    expected = dense_macs(config, 1, 1024).total
    assert expected / 1e12 == pytest.approx(0.887, abs=5e-4)
    assert fvcore.macs == pytest.approx(expected, rel=0.01)
    assert counted == pytest.approx(expected, rel=0.01)
    assert fvcore.unknown == ()


def test_mom_with_fixed_routing_without_holding_its_weights() -> None:
    """8 attention modules in 16 of 36 steps, 36 feed-forward modules: what design section 5 converts gpt2-large to."""
    homes = [step % 8 if step % 9 < 4 else 8 for step in range(36)]
    config = MomConfig(
        hidden_size=1280, num_attention_heads=20, intermediate_size=5120, num_mha_modules=8, num_ffn_modules=36,
        num_steps=36, mha_homes=homes, mha_reach=[[home] for home in homes], ffn_reach=[[step] for step in range(36)],
    )  # fmt: skip
    with FakeTensorMode():  # shapes alone; fvcore's trace wants values, which the test below has
        model, ids = MomForCausalLM(config), torch.zeros(1, 1024, dtype=torch.long)
        counted = count_torch(WithMask(model), ids).macs
    expected = mom_macs(config, 1, 1024, planned_usage(config, 1, 1024)).total
    assert expected / 1e12 == pytest.approx(0.699, abs=5e-4)
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("picks", [1, 2])
def test_mom_with_mixed_routing(picks: int) -> None:
    """8 attention and 36 feed-forward modules, attention in 16 of 36 steps, routers that really choose."""
    skip, everything = [8], list(range(9))
    config = MomConfig(
        hidden_size=1280, num_attention_heads=20, intermediate_size=5120, num_mha_modules=8, num_ffn_modules=36,
        num_steps=36, modules_per_token=picks,
        mha_homes=[step % 8 if step % 9 < 4 else 8 for step in range(36)],
        mha_reach=[everything if step % 9 < 4 else skip for step in range(36)],
    )  # fmt: skip
    model = MomForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for router in (model.model.mha_router, model.model.ffn_router):
            router.weight.normal_(std=0.05)
    counts = count_macs(model, [torch.randint(0, 50257, (1, 1024))])
    assert counts.agree
    assert counts.largest_difference < 0.01
    assert counts.fvcore[0].unknown == ()
    assert 0.2 < counts.mean.total / dense_macs(LARGE, 1, 1024).total < 0.9 * picks
