"""Which keys are seen, and the way between a module and SKIP."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from momify.model.attention import Scene, attention_half, eager_attention, hide_keys, project
from momify.model.dispatch import BACKENDS
from momify.model.layout import HalfStep, half_steps
from momify.model.picking import Choosing, Picks, module_shares, pick
from momify.model.plan import make_plan


def picks(modules: list[list[int]], gates: list[list[float]] | None, skip: int = 3) -> Picks:
    chosen = torch.tensor(modules)
    weights = None if gates is None else torch.tensor(gates).double()
    return Picks(make_plan(chosen, weights, skip), chosen, weights)


def scored(modules: list[list[int]], gates: list[list[float]]) -> Picks:
    """Picks as a router of K > 1 makes them."""
    made = picks(modules, gates)
    return replace(made, scores=made.gates.log())


def test_shares_leave_skip_out() -> None:
    chosen = picks([[0, 3], [3, 1], [1, 2], [3, 3]], [[0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [1.0, 0.0]])
    shares = module_shares(chosen, 3)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.7], [0.0, 0.0]]).double()
    torch.testing.assert_close(shares, expected)
    three = scored([[0, 3, 2]], [[0.1, 0.6, 0.3]])
    torch.testing.assert_close(module_shares(three, 3), torch.tensor([[0.25, 0.0, 0.75]]).double())
    assert module_shares(picks([[1]], None), 3) is None


def test_shares_are_no_zeros_where_every_gate_but_that_of_skip_is(make_mom) -> None:
    """At a tiny tau SKIP takes all: a key of nothing would be seen by later tokens, in the way of real ones."""
    model = make_mom(modules_per_token=3, router_tau=0.01, mha_homes=[3] * 4).model
    x_hat, choosing = torch.randn(50, 32), Choosing(3, 0.01, 0.0, BACKENDS["reference"])
    found = pick(x_hat, half_steps(model.config)[0], model.mha_router()[0], choosing)
    live = found.modules != 3
    vanished = (found.gates * live).sum(1) == 0
    assert vanished.any()
    shares = module_shares(found, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(50))
    expected = torch.softmax(found.logits.double()[:, :3] / 0.01, dim=1).gather(1, found.modules.clamp_max(2)) * live
    torch.testing.assert_close(shares, (expected / expected.sum(1, keepdim=True)).float())


def test_the_part_on_skip_takes_its_key_from_the_home(make_mom) -> None:
    half, _ = stage(make_mom())
    chosen = picks([[1, 3], [3, 2], [3, 3], [1, 2]], [[0.2, 0.8], [0.0, 1.0], [1.0, 0.0], [0.3, 0.7]])
    assert chosen.key_modules(half).tolist() == [[1, 0], [3, 2], [0, 3], [1, 2]]
    assert picks([[1], [3]], None).key_modules(half).tolist() == [[1], [0]]


def test_hidden_keys_are_seen_by_nobody_but_their_own_token() -> None:
    keep = torch.tensor([[True, False, True, False]])
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    assert torch.equal(hide_keys(None, keep, 4)[0, 0], expected)
    assert torch.equal(hide_keys(None, keep, 2)[0, 0], expected[2:])
    assert torch.equal(hide_keys(torch.ones(1, 1, 4, 4).tril().bool(), keep, 4)[0, 0], expected)
    added = hide_keys(torch.full((4, 4), -1e9).triu(1)[None, None], keep, 4)
    assert torch.equal((added > -1e8)[0, 0], expected)


def test_eager_attention_equals_sdpa() -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8).double().unbind(0)
    mask = torch.zeros(2, 1, 5, 5).double().masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    y, weights = eager_attention(torch.nn.Module(), query, key, value, mask, dropout=0.0, scaling=0.3)
    right = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    torch.testing.assert_close(y, right.transpose(1, 2))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5).double())


def stage(model: Any, tokens: int = 4) -> tuple[HalfStep, Scene]:
    body = model.double().model
    qkv = body.mha.qkv()
    scene = Scene(
        batch=1, tokens=tokens, heads=4, mask=None, cache=None, implementation="sdpa", dropout=0.0, module=body.mha,
        qkv=qkv, query=qkv.columns(0, 32), key_value=qkv.columns(32), out=body.mha.out(), backend=BACKENDS["reference"],
    )  # fmt: skip
    return half_steps(model.config)[0], scene


@pytest.mark.parametrize("pair", [(0, 3), (1, 3), (3, 1), (1, 2), (3, 0)])
@torch.no_grad()
def test_exploring_leads_from_one_choice_to_the_other_without_a_jump(make_mom, pair) -> None:
    """At gate 1 all is as if only the best had been chosen, at gate 0 as if only the rival had, keys included."""
    half, scene = stage(make_mom())
    assert (half.home, half.key_home) == (0, 0)
    x_hat = torch.randn(4, 32).double()
    others = [[1, 3], [2, 3], [3, 3], [0, 3]]

    def outputs(modules: list[list[int]], gates: list[list[float]] | None) -> Tensor:
        return attention_half(x_hat, half, picks(modules, gates), scene).output

    for alpha, chosen in ((1.0, pair[0]), (0.0, pair[1])):
        mixed = [others[0], list(pair), *others[2:]]
        gates = [[1.0, 0.0], [alpha, 1 - alpha], [1.0, 0.0], [1.0, 0.0]]
        alone = [[row[0]] for row in others]
        alone[1] = [chosen]
        torch.testing.assert_close(outputs(mixed, gates), outputs(alone, None))
    between = outputs([others[0], list(pair), *others[2:]], [[1.0, 0.0], [0.4, 0.6], [1.0, 0.0], [1.0, 0.0]])
    assert torch.isfinite(between).all()


@torch.no_grad()
def test_a_token_that_skips_gets_key_and_value_but_no_output(make_mom) -> None:
    half, scene = stage(make_mom(), tokens=3)
    x_hat = torch.randn(3, 32).double()
    chosen = picks([[1], [3], [2]], None)
    query, key_value = project(x_hat, half, chosen, scene)
    weight, bias = scene.qkv.weight, scene.qkv.bias
    for token, module in ((0, 1), (1, half.home), (2, 2)):
        expected = x_hat[token] @ weight[module] + bias[module]
        torch.testing.assert_close(key_value[token], expected[32:])
        torch.testing.assert_close(query[token], torch.zeros(32).double() if token == 1 else expected[:32])
    out = attention_half(x_hat, half, chosen, scene).output
    assert out[1].abs().max() == 0
    assert out[[0, 2]].abs().min() > 0
    masked = replace(half, key_home=None, masks_keys=True)
    hidden = attention_half(x_hat, masked, chosen, replace(scene, mask=torch.ones(1, 1, 3, 3).bool().tril()))
    alone = attention_half(x_hat[[0, 2]], masked, picks([[1], [2]], None), replace(scene, tokens=2))
    torch.testing.assert_close(hidden.output[[0, 2]], alone.output, msg="nobody sees the token that skipped")
