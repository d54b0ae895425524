"""convert/refit.py: what fitting does to a network, and patches against a plain loop in float64."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from momify.convert.assemble import assemble
from momify.convert.assemble import network_of as source_network
from momify.convert.homes import HomePlan, Request, choose_homes, removal_quotas
from momify.convert.importance import Importance, measure_importance
from momify.convert.network import Network, embed, half_layer_update
from momify.convert.refit import Fitting, half_steps, has_to_fit, most_tokens, refit
from momify.convert.source import open_source

MakeGPT2 = Callable[..., GPT2LMHeadModel]
NetworkOf = Callable[[GPT2LMHeadModel], Network]


def plan_for(network: Network, tokens: Tensor, **request: int) -> HomePlan:
    total = network.layers.num_layers
    quotas = (total - request["mha"], total - request["ffn"])
    importance = measure_importance(network, tokens, quotas) if any(quotas) else Importance.unmeasured(total)
    return choose_homes(importance, Request(**request))


def residuals(network: Network, plan: HomePlan, tokens: Tensor) -> Tensor:
    """The last residual of the plan's network, by a plain walk over its homes."""
    x = embed(network.frame, tokens)
    for half in half_steps(plan):
        if half.runs is not None:
            x = x + half_layer_update(network, half.runs, x)
    return x


def dense_residual(network: Network, tokens: Tensor) -> Tensor:
    x = embed(network.frame, tokens)
    for half in range(2 * network.layers.num_layers):
        x = x + half_layer_update(network, half, x)
    return x


def test_full_pool_is_left_alone(make_gpt2: MakeGPT2, network_of: NetworkOf) -> None:
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (6, 24))
    fitted = refit(network, plan_for(network, tokens, mha=4, ffn=4), tokens).layers
    assert torch.equal(fitted.out_weight, network.layers.out_weight)
    assert torch.equal(fitted.down_weight, network.layers.down_weight)


def test_residual_comes_closer_also_on_other_text(make_gpt2: MakeGPT2, network_of: NetworkOf) -> None:
    network = network_of(make_gpt2())
    tokens, others = torch.randint(0, 61, (40, 32)), torch.randint(0, 61, (8, 32))
    plan = plan_for(network, tokens, mha=2, ffn=3)
    fitted = Network(refit(network, plan, tokens).layers, network.frame, network.num_heads, network.activation, 1e-5)
    for text in (tokens, others):
        goal = dense_residual(network, text)
        before, after = (torch.dist(residuals(net, plan, text), goal) for net in (network, fitted))
        assert after < 0.8 * before


def test_a_stronger_ridge_stays_nearer_to_the_source_weights_and_farther_from_its_residual(
    make_gpt2: MakeGPT2, network_of: NetworkOf
) -> None:
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (40, 32))
    plan, goal = plan_for(network, tokens, mha=2, ffn=3), dense_residual(network, tokens)
    moved, missed = [], []
    for ridge in (1e-3, 1.0, 10.0, 1e4):
        layers = refit(network, plan, tokens, Fitting(ridge)).layers
        moved.append(float(torch.dist(layers.down_weight, network.layers.down_weight)))
        missed.append(float(torch.dist(residuals(replace(network, layers=layers), plan, tokens), goal)))
    assert moved == sorted(moved, reverse=True)
    assert missed == sorted(missed)
    assert moved[0] > 2 * moved[1]
    assert moved[-1] < 0.01 * moved[0]


def test_only_kept_modules_behind_a_removal_change(make_gpt2: MakeGPT2, network_of: NetworkOf) -> None:
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (8, 24))
    plan = HomePlan(
        num_layers=4, mha_layers=(0, 1, 3), ffn_layers=(0, 1, 2, 3), step_layers=(0, 1, 2, 3),
        mha_homes=(0, 1, 3, 2), ffn_homes=(0, 1, 2, 3),
        mha_reach=((0,), (1,), (3,), (2,)), ffn_reach=((0,), (1,), (2,), (3,)),
    )  # fmt: skip
    fitted = refit(network, plan, tokens).layers
    changed = {
        f"{name}{layer}"
        for name in ("out", "down")
        for layer in range(4)
        if not torch.equal(getattr(fitted, f"{name}_weight")[layer], getattr(network.layers, f"{name}_weight")[layer])
    }
    # layer 2's attention is gone: the feed-forward before it already aims at the residual behind it
    assert changed == {"down1", "down2", "out3", "down3"}
    assert torch.equal(fitted.qkv_weight, network.layers.qkv_weight)


def test_shared_modules_keep_their_weights(make_gpt2: MakeGPT2, network_of: NetworkOf) -> None:
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (8, 24))
    plan = plan_for(network, tokens, mha=2, ffn=4, mha_steps=4)
    shared = {half.runs // 2 for half in half_steps(plan) if half.runs % 2 == 0 and not half.alone}
    assert shared
    fitted = refit(network, plan, tokens).layers
    for layer in shared:
        assert torch.equal(fitted.out_weight[layer], network.layers.out_weight[layer])


@pytest.mark.parametrize("depth", [3, 6])
def test_other_depths_run_and_help(make_gpt2: MakeGPT2, depth: int, network_of: NetworkOf) -> None:
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (40, 32))
    total = 4
    importance = measure_importance(network, tokens, (2, 2))
    plan = choose_homes(importance, Request(mha=2, ffn=2, depth=depth, reach="all"))
    fitted = Network(refit(network, plan, tokens).layers, network.frame, network.num_heads, network.activation, 1e-5)
    goal = dense_residual(network, tokens)
    assert total == network.layers.num_layers
    assert torch.dist(residuals(fitted, plan, tokens), goal) < torch.dist(residuals(network, plan, tokens), goal)


PLANS = (
    Request(mha=2, ffn=3),
    Request(mha=2, ffn=2, mha_steps=4, reach="all"),
    Request(mha=3, ffn=3, depth=3),
    Request(mha=2, ffn=3, depth=6, reach="all"),
)


@pytest.mark.parametrize("request_", PLANS)
def test_in_place_gives_the_same_bits_without_a_copy(
    make_gpt2: MakeGPT2, request_: Request, network_of: NetworkOf
) -> None:
    model = make_gpt2()
    network, spent, tokens = network_of(model), network_of(model), torch.randint(0, 61, (40, 32))
    plan = choose_homes(measure_importance(network, tokens, removal_quotas(request_, 4)), request_)
    fitted = refit(network, plan, tokens).layers
    in_place = refit(spent, plan, tokens, Fitting(in_place=True)).layers
    assert in_place is spent.layers
    for name in ("qkv_weight", "out_weight", "out_bias", "up_weight", "down_weight", "down_bias"):
        assert torch.equal(getattr(fitted, name), getattr(in_place, name)), name
    assert not torch.equal(fitted.down_weight, network.layers.down_weight)


def test_residuals_of_all_tokens_stay_within_400_mib() -> None:
    assert most_tokens(1600) == 32_768  # gpt2-xl: (32,768, 1600) float32, twice
    assert most_tokens(128) > 131_072  # small sources are refitted on all that the recipe asks for


PATCHED = HomePlan(  # attention 1 and 3, feed-forward 0 and 3 are gone
    num_layers=4, mha_layers=(0, 2), ffn_layers=(1, 2), step_layers=(0, 1, 2, 3),
    mha_homes=(0, 2, 1, 2), ffn_homes=(2, 0, 1, 2),
    mha_reach=((0,), (2,), (1,), (2,)), ffn_reach=((2,), (0,), (1,), (2,)), patch_rank=3,
)  # fmt: skip
KEPT = (0, 3, 4, 5)


def best_map(x: Tensor, y: Tensor, rank: int, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Reduced-rank ridge regression on rows, in the plainest way: weight (D, D) of that rank and bias."""
    penalty = (x.shape[0] * ridge * x.var(0, correction=0).mean()).sqrt() * torch.eye(x.shape[1]).double()
    left = torch.cat([x - x.mean(0), penalty])
    full = torch.linalg.lstsq(left, torch.cat([y - y.mean(0), torch.zeros_like(penalty)])).solution
    directions = torch.linalg.svd(left @ full, full_matrices=False)[2][:rank]
    weight = full @ directions.T @ directions
    return weight, y.mean(0) - x.mean(0) @ weight


def patched_loop(network: Network, tokens: Tensor, text: Tensor) -> Tensor:
    """The last residual on `text` with PATCHED's patches, fitted on `tokens`: half by half, in float64."""
    states = [embed(network.frame, tokens)]
    for half in range(8):
        states.append(states[-1] + half_layer_update(network, half, states[-1]))
    ours, x = states[0], embed(network.frame, text)
    for half in range(8):
        if half in KEPT:
            ours, x = (it + half_layer_update(network, half, it) for it in (ours, x))
            continue
        goal = min([kept for kept in KEPT if kept > half], default=8)
        weight, bias = best_map(hat(ours).flatten(0, 1), (states[goal] - ours).flatten(0, 1), PATCHED.patch_rank)
        ours, x = (it + hat(it) @ weight + bias for it in (ours, x))
    return x


def hat(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def in_double(network: Network) -> Network:
    parts = (type(part)(*(getattr(part, one.name).double() for one in fields(part)))
             for part in (network.layers, network.frame))  # fmt: skip
    return Network(*parts, network.num_heads, network.activation, network.epsilon)


def test_patched_conversion_computes_what_a_plain_loop_does(make_gpt2: MakeGPT2, tmp_path: Path) -> None:
    model = make_gpt2()
    model.save_pretrained(tmp_path)
    source, tokens, text = open_source(tmp_path), torch.randint(0, 61, (30, 32)), torch.randint(0, 61, (4, 24))
    network = source_network(source)
    x = patched_loop(in_double(network), tokens, text)
    fitted = refit(network, PATCHED, tokens, Fitting(modules=False))
    assert torch.equal(fitted.layers.out_weight, network.layers.out_weight)
    converted = assemble(source, replace(network, layers=fitted.layers), PATCHED, stand_ins=fitted.stand_ins)
    with torch.no_grad():
        expected = model.double().lm_head(model.transformer.ln_f(x))
        found, bare = converted(input_ids=text).logits, model.float()(input_ids=text).logits
    assert torch.dist(found, expected.float()) < 1e-3 * torch.dist(found, bare)
    assert (found - expected).abs().max() < 2e-4


def test_patches_bring_the_residual_closer(make_gpt2: MakeGPT2, network_of: NetworkOf) -> None:
    network = network_of(make_gpt2())
    tokens, text = torch.randint(0, 61, (40, 32)), torch.randint(0, 61, (8, 32))
    goal, found = dense_residual(network, text), {}
    for rank in (0, 2, 16):
        plan = replace(PATCHED, patch_rank=rank)
        x, fitted = embed(network.frame, text), refit(network, plan, tokens, Fitting(modules=False))
        for half in half_steps(plan):
            if half.runs is None:
                patch = fitted.stand_ins[f"{half.kind}_patch", half.step]
                x = x + hat(x) @ patch.weight_in @ patch.weight_out + patch.bias
            else:
                x = x + half_layer_update(network, half.runs, x)
        found[rank] = torch.dist(x, goal)
    assert found[16] < 0.9 * found[0]
    assert found[16] < found[2] < found[0]


def test_a_patch_beside_a_module_stands_in_for_it(make_gpt2: MakeGPT2, network_of: NetworkOf) -> None:
    """Full pool, SKIP in reach, rank as the width: each patch is the full ridge regression on the update."""
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (40, 32))
    plan = choose_homes(Importance.unmeasured(4), Request(mha=4, ffn=4, reach="skip", patch_rank=32))
    assert has_to_fit(plan, Fitting())
    fitted = refit(network, plan, tokens)
    assert torch.equal(fitted.layers.down_weight, network.layers.down_weight)
    assert len(fitted.stand_ins) == 8
    double, x = in_double(network), embed(network.frame, tokens).double()
    for half in half_steps(plan):
        assert half.runs is not None
        update = half_layer_update(double, half.runs, x)
        weight, bias = best_map(hat(x).flatten(0, 1), update.flatten(0, 1), 32)
        patch = fitted.stand_ins[f"{half.kind}_patch", half.step]
        assert torch.dist(patch.weight_in @ patch.weight_out, weight.float()) < 1e-3 * weight.norm()
        assert torch.allclose(patch.bias, bias.float(), atol=1e-3)
        x = x + update


def test_there_is_nothing_to_fit_where_nothing_goes() -> None:
    def needs(fitting: Fitting, **request: object) -> bool:
        return has_to_fit(choose_homes(Importance("leave_one_out", 4, 1, 1.0, (1.0,) * 4, (1.0,) * 4),
                                       Request(**request)), fitting)  # fmt: skip

    assert not needs(Fitting(), mha=4, ffn=4, patch_rank=2)
    assert not needs(Fitting(modules=False), mha=3, ffn=4)
    assert needs(Fitting(), mha=3, ffn=4)
    assert needs(Fitting(modules=False), mha=3, ffn=4, patch_rank=2)
    assert needs(Fitting(), mha=3, ffn=4, mha_steps=4)
