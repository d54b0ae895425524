"""convert/refit.py: a shared module's changes at single steps, in the assembled model against the source itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from momify.convert.assemble import assemble, network_of
from momify.convert.homes import HomePlan
from momify.convert.refit import Fitted, Fitting, refit
from momify.convert.source import open_source
from momify.model import MomForCausalLM

MakeGPT2 = Callable[..., GPT2LMHeadModel]
PAIRS = HomePlan(  # attention of layers 0 and 3, feed-forward of 1 and 2, at two steps each
    num_layers=4, mha_layers=(0, 3), ffn_layers=(1, 2), step_layers=(0, 1, 2, 3),
    mha_homes=(0, 0, 1, 1), ffn_homes=(0, 0, 1, 1),
    mha_reach=((0,), (0,), (1,), (1,)), ffn_reach=((0,), (0,), (1,), (1,)), step_rank=4,
)  # fmt: skip


@pytest.fixture
def text() -> Tensor:
    return torch.randint(0, 61, (40, 32))


@pytest.fixture
def convert(save_gpt2, text: Tensor) -> Callable[..., tuple[MomForCausalLM, Fitted]]:
    def run(model: GPT2LMHeadModel, plan: HomePlan, **fitting: bool) -> tuple[MomForCausalLM, Fitted]:
        source = open_source(save_gpt2(model))
        network = network_of(source)
        fitted = refit(network, plan, text, Fitting(**fitting))
        return assemble(source, replace(network, layers=fitted.layers), plan, stand_ins=fitted.stand_ins), fitted

    return run


@torch.no_grad()
def copy_shuffled(model: GPT2LMHeadModel, start: int, end: int) -> None:
    """Let layer `end` be layer `start` with heads and neurons in another order."""
    model.transformer.h[end].load_state_dict(model.transformer.h[start].state_dict())
    block, width, heads = model.transformer.h[end], model.config.n_embd, model.config.n_head
    columns = torch.arange(width).view(heads, -1)[torch.randperm(heads)].flatten()
    block.attn.c_attn.weight.copy_(block.attn.c_attn.weight.view(width, 3, width)[:, :, columns].flatten(1))
    block.attn.c_attn.bias.copy_(block.attn.c_attn.bias.view(3, width)[:, columns].flatten())
    block.attn.c_proj.weight.copy_(block.attn.c_proj.weight[columns])
    order = torch.randperm(4 * width)
    block.mlp.c_fc.weight.copy_(block.mlp.c_fc.weight[:, order])
    block.mlp.c_fc.bias.copy_(block.mlp.c_fc.bias[order])
    block.mlp.c_proj.weight.copy_(block.mlp.c_proj.weight[order])


def test_a_shuffled_copy_needs_no_change(make_gpt2: MakeGPT2, convert, logits, ids) -> None:
    model = make_gpt2()
    copy_shuffled(model, 0, 1)
    copy_shuffled(model, 3, 2)
    converted, fitted = convert(model, PAIRS)
    assert (logits(converted, ids) - logits(model, ids)).abs().max() < 1e-4
    assert {name for name, _ in fitted.stand_ins} == {
        "mha_delta.qkv",
        "mha_delta.out",
        "ffn_delta.up",
        "ffn_delta.down",
    }
    for (name, step), part in fitted.stand_ins.items():
        assert part.product().abs().max() < 1e-3, (name, step)
        assert part.bias.abs().max() < 1e-3, (name, step)


def test_changes_of_full_rank_make_the_source_again(make_gpt2: MakeGPT2, convert, logits, ids) -> None:
    model = make_gpt2()
    converted, _ = convert(model, replace(PAIRS, step_rank=32))
    bare, _ = convert(model, replace(PAIRS, step_rank=0), modules=False)
    expected = logits(model, ids)
    assert (logits(bare, ids) - expected).abs().max() > 0.5
    assert (logits(converted, ids) - expected).abs().max() < 2e-3


def test_more_rank_comes_nearer_on_other_text(make_gpt2: MakeGPT2, convert, logits) -> None:
    model, other = make_gpt2(), torch.randint(0, 61, (8, 32))
    expected, away = logits(model, other), []
    for rank in (0, 4, 16):
        converted, _ = convert(model, replace(PAIRS, step_rank=rank), modules=False)
        away.append(float(torch.dist(logits(converted, other), expected)))
    assert away[2] < 0.8 * away[1] < 0.8 * away[0]


def test_shared_modules_stay_and_the_first_step_at_home_has_no_change(make_gpt2: MakeGPT2, convert) -> None:
    model = make_gpt2()
    converted, fitted = convert(model, PAIRS)
    untouched, _ = convert(model, replace(PAIRS, step_rank=0), modules=False)
    for name, parameter in untouched.named_parameters():
        assert torch.equal(parameter, converted.get_parameter(name)), name
    # layer 0's attention at its own place, with nothing before it that differs
    assert ("mha_delta.qkv", 0) not in fitted.stand_ins
    assert not converted.model.mha_delta.qkv.weight_out[0].any()
    assert converted.model.mha_delta.out.weight_in[0].std() > 0.01
    assert ("mha_delta.out", 3) in fitted.stand_ins
