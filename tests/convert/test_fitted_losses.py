"""convert/fitted_losses.py against whole conversions, each run by itself and scored by transformers' loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from momify.convert.fitted_losses import FittedLosses
from momify.convert.homes import HomePlan
from momify.convert.importance import KINDS, PrunedLosses, judged
from momify.convert.network import embed, half_features, half_weights, last_norm, normalised
from momify.convert.refit import Fitting, refit
from momify.errors import MomifyError

TOLERANCE = 5e-6  # nats


@pytest.fixture
def text():
    """(24, 32) tokens."""
    return torch.randint(0, 61, (24, 32), generator=torch.Generator().manual_seed(5))


def plan_without(removed, rank):
    """Four layers of which the half-layers `removed` go, one step a module."""
    kept = {kind: [i for i in range(4) if 2 * i + offset not in removed] for offset, kind in enumerate(KINDS)}
    homes = {
        kind: tuple(layers.index(i) if i in layers else len(layers) for i in range(4)) for kind, layers in kept.items()
    }
    return HomePlan(
        num_layers=4, mha_layers=tuple(kept["mha"]), ffn_layers=tuple(kept["ffn"]), step_layers=(0, 1, 2, 3),
        mha_homes=homes["mha"], ffn_homes=homes["ffn"],
        mha_reach=tuple((home,) for home in homes["mha"]), ffn_reach=tuple((home,) for home in homes["ffn"]),
        patch_rank=rank,
    )  # fmt: skip


def parts(text):
    """What is fitted to, and what is scored: every fourth row."""
    scored = torch.arange(len(text)) % 4 == 3
    return text[~scored], text[scored]


def converted_loss(network, text, removed, rank, fitting):
    """The loss of what `refit` makes of the network, by a plain walk and torch's cross-entropy in float64."""
    learned, other = parts(text)
    fitted = refit(network, plan_without(removed, rank), learned, fitting)
    x = embed(network.frame, other)
    for half in range(8):
        weights = half_weights(fitted.layers, half)
        patch = fitted.stand_ins.get((f"{KINDS[half % 2]}_patch", half // 2))
        if half not in removed:
            x = x + half_features(network, half, weights, x) @ weights.out + weights.out_bias
        elif patch is not None:
            x = x + normalised(network, x) @ patch.weight_in @ patch.weight_out + patch.bias
    logits = (last_norm(network, x) @ network.frame.head.T).double()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), other[:, 1:].flatten()).item()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(8)), asked=st.lists(st.integers(0, 7), min_size=6, max_size=6), count=st.integers(0, 6),
    rank=st.sampled_from([0, 3]), modules=st.booleans(), budget=st.sampled_from([1, 1 << 18, 1 << 28]),
)  # fmt: skip
@example(  # an anchor at the module before 3, whose goal moves with it
    order=[3, 0, 1, 2, 4, 5, 6, 7], asked=[7] * 6, count=2, rank=0, modules=True, budget=1 << 28
)
def test_each_loss_is_that_of_the_conversion(order, asked, count, rank, modules, budget, make_gpt2, network_of, text):
    network, fitting = network_of(make_gpt2()), Fitting(ridge=0.1, modules=modules)
    losses = FittedLosses(network, text, fitting, rank, budget)
    removed = set()
    for half, other in zip(order[:count], asked, strict=False):  # others are asked for in between
        if other not in removed:
            expected = converted_loss(network, text, removed | {other}, rank, fitting)
            assert losses.loss_without(other) == pytest.approx(expected, abs=TOLERANCE)
        losses.remove(half)
        removed.add(half)
    assert losses.loss_without() == pytest.approx(converted_loss(network, text, removed, rank, fitting), abs=TOLERANCE)


def test_nothing_fitted_is_nothing_but_left_out(make_gpt2, network_of, text):
    network = network_of(make_gpt2())
    bare, fitted = PrunedLosses(network, parts(text)[1]), FittedLosses(network, text, Fitting(modules=False))
    for half in (5, 0, 2):
        assert fitted.loss_without(half) == pytest.approx(bare.loss_without(half), abs=TOLERANCE)
        bare.remove(half)
        fitted.remove(half)


def test_the_network_is_read_only(make_gpt2, network_of, text):
    network = network_of(make_gpt2())
    before = network.layers.down_weight.clone(), network.layers.out_weight.clone()
    judged(FittedLosses(network, text, Fitting(in_place=True), 2), (2, 2), "fitted")
    assert torch.equal(before[0], network.layers.down_weight)
    assert torch.equal(before[1], network.layers.out_weight)


def test_greedy_takes_what_costs_least_after_the_fit(make_gpt2, network_of, text):
    network, fitting = network_of(make_gpt2()), Fitting(ridge=0.1)
    found = judged(FittedLosses(network, text, fitting, 3), (2, 1), "fitted")
    first = {half: converted_loss(network, text, {half}, 3, fitting) for half in range(8)}
    chosen = [2 * removal.layer + KINDS.index(removal.kind) for removal in found.removals]
    assert chosen[0] == min(first, key=first.__getitem__)
    assert found.method == "fitted"
    for number, removal in enumerate(found.removals, 1):
        expected = converted_loss(network, text, set(chosen[:number]), 3, fitting)
        assert removal.loss == pytest.approx(expected, abs=5 * TOLERANCE)


def test_known_losses_are_not_measured_again(make_gpt2, network_of, text):
    network, known = network_of(make_gpt2()), {}
    first = judged(FittedLosses(network, text, Fitting(), 2, known=known), (2, 2), "fitted")
    again = FittedLosses(network, text, Fitting(), 2, known=known)
    assert judged(again, (2, 2), "fitted").removals == first.removals
    assert again.evaluations == 0


def test_text_that_the_network_cannot_read_is_refused(make_gpt2, network_of):
    network = network_of(make_gpt2())
    with pytest.raises(MomifyError, match="calibration token 61 is outside the vocabulary of 61"):
        FittedLosses(network, torch.full((4, 8), 61), Fitting())
    with pytest.raises(MomifyError, match="has 3 rows, of which one in 4 is scored; give 4"):
        FittedLosses(network, torch.full((3, 8), 6), Fitting())
