"""convert/layerdrop.py: the copy learns what transformers' GPT-2 with silenced sublayers would have to learn."""

from collections import Counter
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from momify.convert.importance import KINDS, PrunedLosses, measure_importance
from momify.convert.layerdrop import STEP_TOKENS, DropTraining, divergence, drawn, trained_with_drops
from momify.convert.network import half_weights
from momify.errors import MomifyError

LESSONS = DropTraining(learning_rate=3e-3)


@pytest.fixture
def text():
    """(768, 32) tokens with something to learn: each is its predecessor plus 1 or 2."""
    generator = torch.Generator().manual_seed(3)
    start, steps = torch.randint(0, 61, (768, 1), generator=generator), torch.randint(1, 3, (768, 31))
    return torch.cat([start, start + steps.cumsum(1)], 1) % 61


@given(layers=st.integers(1, 9), share=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=st.integers(0, 99))
def test_each_step_leaves_out_as_many_of_each_kind_as_will_go(layers, share, seed):
    quotas = tuple(round(layers * one) for one in share)
    kept = drawn(layers, quotas, torch.Generator().manual_seed(seed))
    assert kept == sorted(set(kept))
    assert all(0 <= half < 2 * layers for half in kept)
    assert [sum(half % 2 == kind for half in kept) for kind in (0, 1)] == [layers - quota for quota in quotas]


def test_every_half_layer_goes_equally_often():
    generator = torch.Generator().manual_seed(0)
    runs = Counter(half for _ in range(2000) for half in drawn(4, (2, 1), generator))
    assert all(runs[half] == pytest.approx(2000 * (0.75 if half % 2 else 0.5), rel=0.1) for half in range(8))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gone=st.sets(st.integers(0, 7), max_size=7))
def test_the_divergence_is_that_of_transformers_with_sublayers_silenced(gone, make_gpt2, network_of, without):
    model = make_gpt2()
    network, ids = network_of(model), torch.randint(0, 61, (3, 20))
    quiet = without(model, [(KINDS[half % 2], half // 2) for half in gone])
    with torch.no_grad():
        said, taught = (one(input_ids=ids).logits.log_softmax(-1).flatten(0, 1) for one in (quiet, model))
    expected = F.kl_div(said, taught, log_target=True, reduction="batchmean")
    torch.testing.assert_close(divergence(network, kept_of(network, gone), ids), expected, atol=2e-6, rtol=1e-4)


def kept_of(network, gone):
    return {half: half_weights(network.layers, half) for half in range(8) if half not in gone}


def test_the_copy_does_better_without_whatever_is_left_out(make_gpt2, network_of, text):
    network = network_of(make_gpt2())
    copy = trained_with_drops(network, text, (2, 1), LESSONS)
    for gone in ({0, 2, 1}, {4, 6, 7}, {2, 6, 3}, {0, 4, 5}):
        before, after = (float(divergence(network, kept_of(one, gone), text[:16])) for one in (network, copy))
        assert after < 0.8 * before, gone


def test_the_source_stays_as_it_was_and_a_seed_decides_the_copy(make_gpt2, network_of, text):
    network = network_of(make_gpt2())
    before = {part.name: getattr(network.layers, part.name).clone() for part in fields(network.layers)}
    told = []
    copies = [
        trained_with_drops(network, text[:80], (2, 1), DropTraining(1e-3, seed=seed), lambda *at: told.append(at))
        for seed in (0, 0, 1)
    ]
    for name, tensor in before.items():
        assert torch.equal(getattr(network.layers, name), tensor)
        first, again, other = (getattr(copy.layers, name) for copy in copies)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first, tensor)
    assert copies[0].frame is network.frame
    steps = -(-80 * 32 // STEP_TOKENS)
    assert told[:steps] == [(step + 1, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("tokens", "rate", "words"),
    [
        (torch.full((8, 32), 61), 1e-3, "token 61 is outside the vocabulary of 61"),
        (torch.ones(2, 49, dtype=torch.int64), 1e-3, "2 to 48"),
        (torch.arange(96 * 32).view(96, 32) % 61, 1e30, r"lower train\.learning_rate \(1e\+30\)"),
    ],
)
def test_what_cannot_be_learned_is_said_in_a_line(make_gpt2, network_of, tokens, rate, words):
    with pytest.raises(MomifyError, match=words):
        trained_with_drops(network_of(make_gpt2()), tokens, (2, 1), DropTraining(rate))


def test_what_the_copy_misses_least_goes_first(make_gpt2, network_of, text):
    network = network_of(make_gpt2())
    copy = trained_with_drops(network, text[:96], (1, 1), LESSONS)
    importance = measure_importance(copy, text[:64], (1, 1), "layerdrop")
    losses = PrunedLosses(copy, text[:64])
    alone = {half: losses.loss_without(half) for half in range(8)}
    first = importance.removals[0]
    assert (importance.method, 2 * first.layer + KINDS.index(first.kind)) == ("layerdrop", min(alone, key=alone.get))
    assert importance.base_loss == pytest.approx(losses.loss_without())
