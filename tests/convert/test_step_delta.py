"""convert/refit.py: a shared module's changes at single steps, in the assembled model against the source itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from momify.convert.align import aligned
from momify.convert.assemble import assemble, network_of
from momify.convert.homes import HomePlan
from momify.convert.merge import merged_modules, shared_modules
from momify.convert.network import HalfWeights, half_weights
from momify.convert.refit import Fitted, Fitting, refit, unfitted
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


def parts(weights: HalfWeights) -> list[Tensor]:
    return [weights.into, weights.into_bias, weights.out, weights.out_bias]


def test_the_mean_of_a_layer_and_its_shuffled_copy_is_the_layer(make_gpt2: MakeGPT2, save_gpt2, logits, ids) -> None:
    model = make_gpt2()
    copy_shuffled(model, 0, 1)
    copy_shuffled(model, 3, 2)
    source = open_source(save_gpt2(model))
    network, plan = network_of(source), replace(PAIRS, step_rank=0)
    assert shared_modules(plan) == {0: [0, 2], 6: [4, 6], 3: [1, 3], 5: [5, 7]}
    for half, mean in merged_modules(network, plan).items():
        for part, own in zip(parts(mean), parts(half_weights(network.layers, half)), strict=True):
            assert torch.allclose(part, own, atol=1e-5), half
    merged = assemble(source, replace(network, layers=unfitted(network, plan, Fitting(merge=True)).layers), plan)
    assert (logits(merged, ids) - logits(model, ids)).abs().max() < 1e-4


def test_a_mean_is_of_all_the_layers_a_module_stands_for(make_gpt2: MakeGPT2, save_gpt2) -> None:
    network = network_of(open_source(save_gpt2(make_gpt2())))
    before = [part.clone() for half in range(8) for part in parts(half_weights(network.layers, half))]
    plan = replace(PAIRS, mha_layers=(1,), mha_homes=(0, 0, 1, 0), mha_reach=((0,), (0,), (1,), (0,)), step_rank=0)
    assert shared_modules(plan)[2] == [0, 2, 6]
    mean, to = merged_modules(network, plan)[2], half_weights(network.layers, 2)
    others = [aligned(half_weights(network.layers, half), to, network.num_heads) for half in (0, 6)]
    for place, part in enumerate(parts(mean)):
        three = torch.stack([parts(one)[place] for one in (to, *others)])
        assert torch.allclose(part, three.mean(0), atol=1e-6)
    now = [part for half in range(8) for part in parts(half_weights(network.layers, half))]
    assert all(torch.equal(old, new) for old, new in zip(before, now, strict=True))


@pytest.mark.parametrize("step_rank", [0, 3])
def test_merging_in_place_gives_the_same_bits(make_gpt2: MakeGPT2, save_gpt2, text: Tensor, step_rank: int) -> None:
    source, plan = open_source(save_gpt2(make_gpt2())), replace(PAIRS, step_rank=step_rank)
    network, spent = network_of(source), network_of(source)
    fitted = refit(network, plan, text, Fitting(merge=True))
    in_place = refit(spent, plan, text, Fitting(merge=True, in_place=True))
    assert in_place.layers is spent.layers
    for half in (0, 3, 5, 6):
        pairs = [parts(half_weights(layers, half)) for layers in (fitted.layers, in_place.layers)]
        assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))
        mean = merged_modules(network, plan)[half]
        assert all(torch.equal(one, other) for one, other in zip(pairs[0], parts(mean), strict=True))
    assert fitted.stand_ins.keys() == in_place.stand_ins.keys()
    assert bool(fitted.stand_ins) == (step_rank > 0)
    for key, part in fitted.stand_ins.items():
        assert torch.equal(part.product(), in_place.stand_ins[key].product())


def test_full_rank_changes_of_merged_modules_make_the_source_again(make_gpt2: MakeGPT2, convert, logits, ids) -> None:
    model = make_gpt2()
    converted, fitted = convert(model, replace(PAIRS, step_rank=32), merge=True)
    assert len(fitted.stand_ins) == 16
    assert (logits(converted, ids) - logits(model, ids)).abs().max() < 2e-3
