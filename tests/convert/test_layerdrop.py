"""convert/layerdrop.py: a copy that learned with other half-layers left out in each step does without any of them."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from momify.convert.importance import KINDS, PrunedLosses, measure_importance
from momify.convert.layerdrop import drawn, trained_with_drops
from momify.convert.short_training import ShortTraining, divergence

LESSONS = ShortTraining("layerdrop", learning_rate=3e-3)


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


def test_the_copy_does_better_without_whatever_is_left_out(make_gpt2, network_of, kept_of, easy_text):
    network = network_of(make_gpt2())
    copy = trained_with_drops(network, easy_text, (2, 1), LESSONS)
    for gone in ({0, 2, 1}, {4, 6, 7}, {2, 6, 3}, {0, 4, 5}):
        before, after = (float(divergence(network, kept_of(one, gone), easy_text[:16])) for one in (network, copy))
        assert after < 0.8 * before, gone


def test_what_the_copy_misses_least_goes_first(make_gpt2, network_of, easy_text):
    network = network_of(make_gpt2())
    copy = trained_with_drops(network, easy_text[:96], (1, 1), LESSONS)
    importance = measure_importance(copy, easy_text[:64], (1, 1), "layerdrop")
    losses = PrunedLosses(copy, easy_text[:64])
    alone = {half: losses.loss_without(half) for half in range(8)}
    first = importance.removals[0]
    assert (importance.method, 2 * first.layer + KINDS.index(first.kind)) == ("layerdrop", min(alone, key=alone.get))
    assert importance.base_loss == pytest.approx(losses.loss_without())
