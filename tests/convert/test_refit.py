"""convert/refit.py: the regression against lstsq in float64, and what it does to a network."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2LMHeadModel

from momify.convert.assemble import layer_settings
from momify.convert.homes import HomePlan, Request, choose_homes, removal_quotas
from momify.convert.importance import Importance, measure_importance
from momify.convert.layers import take_apart, take_frame
from momify.convert.network import Network, embed, half_layer_update
from momify.convert.refit import Moments, half_steps, most_tokens, refit

MakeGPT2 = Callable[..., GPT2LMHeadModel]


def network_of(model: GPT2LMHeadModel) -> Network:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    layers = take_apart(tensors, layer_settings(model.config))
    return Network(layers, take_frame(tensors), model.config.n_head, torch.nn.GELU(approximate="tanh"), 1e-5)


def plan_for(network: Network, tokens: Tensor, **request: int) -> HomePlan:
    total = network.layers.num_layers
    quotas = (total - request["mha"], total - request["ffn"])
    importance = measure_importance(network, tokens, quotas) if any(quotas) else Importance.unmeasured(total)
    return choose_homes(importance, Request(**request))


def residuals(network: Network, plan: HomePlan, tokens: Tensor) -> Tensor:
    """The last residual of the plan's network, by a plain walk over its homes."""
    x = embed(network.frame, tokens)
    for half in half_steps(plan):
        x = x + half_layer_update(network, half.runs, x)
    return x


def dense_residual(network: Network, tokens: Tensor) -> Tensor:
    x = embed(network.frame, tokens)
    for half in range(2 * network.layers.num_layers):
        x = x + half_layer_update(network, half, x)
    return x


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(3, 60), features=st.integers(1, 9), outputs=st.integers(1, 5), ridge=st.floats(1e-4, 10))
def test_moments_solve_the_ridge_problem(rows: int, features: int, outputs: int, ridge: float) -> None:
    """Against least squares on stacked rows: sqrt(n * strength) * (W - prior) as further observations."""
    x, y, prior = (torch.randn(*size).double() for size in ((rows, features), (rows, outputs), (features, outputs)))
    moments = Moments(prior)
    for part in (slice(0, rows // 2), slice(rows // 2, rows)):
        moments.add(x[part], y[part])
    weight, bias = moments.solve(prior, ridge)
    centred, strength = x - x.mean(0), ridge * x.var(0, correction=0).mean()
    factor = (rows * strength).sqrt()
    left = torch.cat([centred, factor * torch.eye(features).double()])
    right = torch.cat([y - y.mean(0), factor * prior])
    expected = torch.linalg.lstsq(left, right, driver="gelsd").solution
    assert torch.allclose(weight, expected, rtol=1e-6, atol=1e-8)
    assert torch.allclose(bias, y.mean(0) - x.mean(0) @ expected, rtol=1e-6, atol=1e-8)


def test_full_pool_is_left_alone(make_gpt2: MakeGPT2) -> None:
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (6, 24))
    fitted = refit(network, plan_for(network, tokens, mha=4, ffn=4), tokens)
    assert torch.equal(fitted.out_weight, network.layers.out_weight)
    assert torch.equal(fitted.down_weight, network.layers.down_weight)


def test_residual_comes_closer_also_on_other_text(make_gpt2: MakeGPT2) -> None:
    network = network_of(make_gpt2())
    tokens, others = torch.randint(0, 61, (40, 32)), torch.randint(0, 61, (8, 32))
    plan = plan_for(network, tokens, mha=2, ffn=3)
    fitted = Network(refit(network, plan, tokens), network.frame, network.num_heads, network.activation, 1e-5)
    for text in (tokens, others):
        goal = dense_residual(network, text)
        before, after = (torch.dist(residuals(net, plan, text), goal) for net in (network, fitted))
        assert after < 0.8 * before


def test_only_kept_modules_behind_a_removal_change(make_gpt2: MakeGPT2) -> None:
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (8, 24))
    plan = HomePlan(
        num_layers=4, mha_layers=(0, 1, 3), ffn_layers=(0, 1, 2, 3), step_layers=(0, 1, 2, 3),
        mha_homes=(0, 1, 3, 2), ffn_homes=(0, 1, 2, 3),
        mha_reach=((0,), (1,), (3,), (2,)), ffn_reach=((0,), (1,), (2,), (3,)),
    )  # fmt: skip
    fitted = refit(network, plan, tokens)
    changed = {
        f"{name}{layer}"
        for name in ("out", "down")
        for layer in range(4)
        if not torch.equal(getattr(fitted, f"{name}_weight")[layer], getattr(network.layers, f"{name}_weight")[layer])
    }
    # layer 2's attention is gone: the feed-forward before it already aims at the residual behind it
    assert changed == {"down1", "down2", "out3", "down3"}
    assert torch.equal(fitted.qkv_weight, network.layers.qkv_weight)


def test_shared_modules_keep_their_weights(make_gpt2: MakeGPT2) -> None:
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (8, 24))
    plan = plan_for(network, tokens, mha=2, ffn=4, mha_steps=4)
    shared = {half.runs // 2 for half in half_steps(plan) if half.runs % 2 == 0 and not half.alone}
    assert shared
    fitted = refit(network, plan, tokens)
    for layer in shared:
        assert torch.equal(fitted.out_weight[layer], network.layers.out_weight[layer])


@pytest.mark.parametrize("depth", [3, 6])
def test_other_depths_run_and_help(make_gpt2: MakeGPT2, depth: int) -> None:
    network, tokens = network_of(make_gpt2()), torch.randint(0, 61, (40, 32))
    total = 4
    importance = measure_importance(network, tokens, (2, 2))
    plan = choose_homes(importance, Request(mha=2, ffn=2, depth=depth, reach="all"))
    fitted = Network(refit(network, plan, tokens), network.frame, network.num_heads, network.activation, 1e-5)
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
def test_in_place_gives_the_same_bits_without_a_copy(make_gpt2: MakeGPT2, request_: Request) -> None:
    model = make_gpt2()
    network, spent, tokens = network_of(model), network_of(model), torch.randint(0, 61, (40, 32))
    plan = choose_homes(measure_importance(network, tokens, removal_quotas(request_, 4)), request_)
    fitted, in_place = refit(network, plan, tokens), refit(spent, plan, tokens, in_place=True)
    assert in_place is spent.layers
    for name in ("qkv_weight", "out_weight", "out_bias", "up_weight", "down_weight", "down_bias"):
        assert torch.equal(getattr(fitted, name), getattr(in_place, name)), name
    assert not torch.equal(fitted.down_weight, network.layers.down_weight)


def test_residuals_of_all_tokens_stay_within_400_mib() -> None:
    assert most_tokens(1600) == 32_768  # gpt2-xl: (32,768, 1600) float32, twice
    assert most_tokens(128) > 131_072  # small sources are refitted on all that the recipe asks for
