"""Which keys are seen, and the way between a module and SKIP."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from momify.model.attention import Scene, attention_half, eager_attention, hide_keys, project
from momify.model.dispatch import make_plan
from momify.model.layout import HalfStep, half_steps
from momify.model.picking import Picks, module_shares, skip_share


def picks(modules: list[list[int]], gates: list[list[float]] | None, skip: int = 3) -> Picks:
    chosen = torch.tensor(modules)
    weights = torch.ones(chosen.shape) if gates is None else torch.tensor(gates)
    weights = weights.double()
    plan = make_plan(chosen, None if gates is None else weights, skip)
    return Picks(chosen, weights, plan, logits=None, weighted=gates is not None)


def test_shares_leave_skip_out() -> None:
    chosen = picks([[0, 3], [3, 1], [1, 2], [3, 3]], [[0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [1.0, 0.0]])
    shares = module_shares(chosen, 3)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.7], [0.0, 0.0]]).double()
    torch.testing.assert_close(shares, expected)
    torch.testing.assert_close(skip_share(chosen, 3), torch.tensor([0.8, 0.6, 0.0, 1.0]).double())
    three = picks([[0, 3, 2]], [[0.1, 0.6, 0.3]])
    torch.testing.assert_close(module_shares(three, 3), torch.tensor([[0.25, 0.0, 0.75]]).double())
    assert module_shares(picks([[1]], None), 3) is None


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


def stage(model: Any) -> tuple[HalfStep, Scene]:
    body = model.double().model
    scene = Scene(
        batch=1, heads=4, mask=None, cache=None, implementation="sdpa", dropout=0.0, module=body.mha,
        qkv=body.mha.qkv(), out=body.mha.out(),
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
    half, scene = stage(make_mom())
    x_hat = torch.randn(3, 32).double()
    chosen = picks([[1], [3], [2]], None)
    projected = project(x_hat, half, chosen, scene.qkv)
    weight, bias = scene.qkv.weight, scene.qkv.bias
    for token, module in ((0, 1), (1, half.home), (2, 2)):
        expected = x_hat[token] @ weight[module] + bias[module]
        torch.testing.assert_close(projected.key_value[token], expected[32:])
    assert projected.key_rows == 1
    assert projected.keep is None
    out = attention_half(x_hat, half, chosen, scene).output
    assert out[1].abs().max() == 0
    assert out[[0, 2]].abs().min() > 0
    masked = replace(half, key_home=None, masks_keys=True)
    hidden = project(x_hat, masked, chosen, scene.qkv)
    assert hidden.keep.tolist() == [True, False, True]
    assert hidden.key_rows == 0
