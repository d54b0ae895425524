"""Losses with half-layers left out, against transformers' GPT-2 with those sublayers silenced."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momify.convert.importance import (
    KINDS,
    Importance,
    PrunedLosses,
    Removal,
    measure_importance,
    pruned_loss,
)
from momify.convert.layers import LayerSettings, take_apart, take_frame
from momify.convert.network import Network
from momify.errors import MomifyError

TOLERANCE = 2e-6  # nats, float32 sums of about 60 tokens


@pytest.fixture
def model(make_gpt2):
    """Three layers whose half-layers matter by very different, shuffled amounts."""
    model = make_gpt2(n_layer=3)
    for half, size in enumerate((0.9, 0.2, 0.05, 0.6, 0.35, 0.12)):
        block = model.transformer.h[half // 2]
        projection = (block.mlp if half % 2 else block.attn).c_proj
        with torch.no_grad():
            projection.weight *= size
            projection.bias *= size
    return model


@pytest.fixture
def text(model):
    """(4, 16) tokens that the model itself finds likely, so that removing anything costs."""
    ids = torch.randint(0, 61, (4, 1), generator=torch.Generator().manual_seed(1))
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_length=16, do_sample=True, eos_token_id=None)


@torch.no_grad()
def reference_loss(model, text) -> float:
    return model(input_ids=text, labels=text).loss.item()


def test_losses_equal_transformers_for_every_set_of_one_and_some_of_more(model, without, text, network_of):
    network = network_of(model)
    sets = [[], *([(kind, layer)] for kind in KINDS for layer in range(3))]
    sets += [[("mha", 0), ("ffn", 0)], [("ffn", 2), ("mha", 1), ("ffn", 0)], [(k, i) for k in KINDS for i in range(3)]]
    for removed in sets:
        expected = reference_loss(without(model, removed), text)
        assert pruned_loss(network, text, removed) == pytest.approx(expected, abs=TOLERANCE), removed


@given(batch=st.integers(1, 80), budget=st.integers(1, 60_000), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_batches_and_few_anchors_change_no_loss(batch, budget, seed):
    torch.manual_seed(seed)
    layers, width = 3, 8
    shapes = {"ln_1": 0, "ln_2": 0, "attn.c_attn": 3 * width, "attn.c_proj": width}
    shapes |= {"mlp.c_fc": width, "mlp.c_proj": width}
    tensors = {"wte.weight": torch.randn(11, width), "wpe.weight": torch.randn(16, width)}
    tensors |= {"ln_f.weight": torch.ones(width), "ln_f.bias": torch.zeros(width)}
    for name in (f"h.{layer}.{part}" for layer in range(layers) for part in shapes):
        columns = shapes[name.split(".", 2)[2]]
        tensors[f"{name}.weight"] = torch.randn(width, columns) / 3 if columns else torch.ones(width)
        tensors[f"{name}.bias"] = torch.randn(columns or width) / 3
    frame, stack = take_frame(tensors), take_apart(tensors, LayerSettings(layers, 2))
    network = Network(stack, frame, 2, torch.tanh, 1e-5)
    text = torch.randint(0, 11, (5, 16))
    usual, tight = PrunedLosses(network, text), PrunedLosses(network, text, batch, budget)
    for losses in (usual, tight):
        losses.loss_without()
    for remove in (4, 1, 2):  # backwards and forwards, so that stale anchors would show
        for half in range(6):
            assert tight.loss_without(half) == pytest.approx(usual.loss_without(half), abs=TOLERANCE)
        for losses in (usual, tight):
            losses.remove(remove)
    held = sum(x.numel() * 4 for anchors in tight.anchors for x in anchors.values())
    assert held <= budget + 5 * 16 * width * 4  # the one before the first half-layer is always held


def test_greedy_equals_brute_force(model, without, text, network_of):
    measured = measure_importance(network_of(model), text, (2, 1))
    left, gone, expected = {"mha": 2, "ffn": 1}, [], []
    while any(left.values()):
        candidates = [(kind, i) for kind in KINDS if left[kind] for i in range(3) if (kind, i) not in gone]
        losses = {half: reference_loss(without(model, [*gone, half]), text) for half in candidates}
        best = min(losses, key=losses.__getitem__)
        gone.append(best)
        left[best[0]] -= 1
        expected.append((*best, losses[best]))
    assert [(r.kind, r.layer) for r in measured.removals] == [(kind, layer) for kind, layer, _ in expected]
    for removal, (_, _, loss) in zip(measured.removals, expected, strict=True):
        assert removal.loss == pytest.approx(loss, abs=TOLERANCE)
    assert measured.evaluations < 1 + 6 + 5 + 4 + 3  # lazy: not every candidate anew


def test_greedy_measures_each_removal_beside_those_before(make_gpt2, without, network_of):
    model = make_gpt2()  # half-layers of like weight: the order is a close call, the values must still be right
    text = torch.randint(0, 61, (3, 12))
    measured = measure_importance(network_of(model), text, (3, 4))
    gone, before = [], measured.base_loss
    for removal in measured.removals:
        gone.append((removal.kind, removal.layer))
        loss = reference_loss(without(model, gone), text)
        assert removal.loss == pytest.approx(loss, abs=TOLERANCE)
        assert removal.increase == pytest.approx(loss - before, abs=2 * TOLERANCE)
        before = loss
    assert sorted(kind for kind, _ in gone) == ["ffn"] * 4 + ["mha"] * 3
    assert len(set(gone)) == 7


def test_leave_one_out_equals_transformers(model, without, text, network_of):
    measured = measure_importance(network_of(model), text, (1, 2), method="leave_one_out")
    base = reference_loss(model, text)
    assert measured.base_loss == pytest.approx(base, abs=TOLERANCE)
    assert measured.tokens == 4 * 15
    for kind in KINDS:
        for layer in range(3):
            expected = reference_loss(without(model, [(kind, layer)]), text) - base
            assert measured.increases(kind)[layer] == pytest.approx(expected, abs=2 * TOLERANCE)
    assert [r.layer for r in measured.removals if r.kind == "mha"] == [
        min(range(3), key=measured.mha_increase.__getitem__)
    ]
    assert [r.layer for r in measured.removals if r.kind == "ffn"] == sorted(
        range(3), key=measured.ffn_increase.__getitem__
    )[:2]
    gone = [(r.kind, r.layer) for r in measured.removals]
    assert measured.removals[-1].loss == pytest.approx(reference_loss(without(model, gone), text), abs=TOLERANCE)
    assert [r.loss for r in measured.removals[:-1]] == [None, None]


@pytest.mark.parametrize("method", ["greedy", "leave_one_out"])
def test_progress_is_told_and_ends_at_the_total(model, text, method, network_of):
    seen: list[tuple[int, int]] = []
    measure_importance(network_of(model), text, (1, 1), method, lambda *step: seen.append(step))
    assert seen == [(done, 8) for done in range(1, 9)]


def test_known_losses_are_not_measured_again_and_change_nothing(model, text, network_of):
    network, known = network_of(model), {}
    first = measure_importance(network, text, (1, 1), known=known)
    assert known.keys() >= {"", "0", "5"}
    assert len(known) == first.evaluations
    again = measure_importance(network, text, (1, 1), known=dict(known))
    assert (again.removals, again.evaluations) == (first.removals, 0)
    further, anew = measure_importance(network, text, (2, 2), known=known), measure_importance(network, text, (2, 2))
    assert further.removals == anew.removals
    assert 0 < further.evaluations < anew.evaluations - 6
    known[""] = 100.0  # they are really read
    assert measure_importance(network, text, (1, 1), known=known).base_loss == 100.0


def test_json_round_trip(model, text, network_of):
    measured = measure_importance(network_of(model), text, (1, 1))
    assert Importance.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_order_is_removals_first_then_by_leave_one_out():
    removals = (Removal("mha", 3, 0.5, 2.5), Removal("ffn", 0, 0.1, 2.6), Removal("mha", 1, 0.2, 2.8))
    importance = Importance("greedy", 4, 9, 2.0, (0.3, 0.1, 0.2, 0.4), (0.0, 0.2, 0.1, 0.3), removals)
    assert importance.order("mha") == [3, 1, 2, 0]
    assert importance.order("ffn") == [0, 2, 1, 3]
    assert importance.cost("mha", 3) == 0.5
    assert importance.cost("mha", 2) == 0.2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 49, dtype=torch.long), r"1 rows x 49 tokens.*2 to 48"),
        (torch.zeros(2, 1, dtype=torch.long), r"2 rows x 1 tokens"),
        (torch.zeros(0, 8, dtype=torch.long), r"0 rows x 8 tokens"),
        (torch.full((1, 8), 61), r"token 61 is outside the vocabulary of 61"),
        (torch.full((1, 8), -1), r"token -1 is outside"),
    ],
)
def test_unreadable_calibration_text_is_refused(model, tokens, message, network_of):
    with pytest.raises(MomifyError, match=message):
        measure_importance(network_of(model), tokens, (1, 1))


@pytest.mark.parametrize("method", ["greedy", "cosine"])
def test_a_source_that_comes_to_no_number_is_refused(model, text, method, network_of):
    network = network_of(model)
    with torch.no_grad():
        network.frame.ln_f_weight.fill_(float("nan"))
    with pytest.raises(MomifyError, match="the source's loss on the calibration text is nan, no number"):
        measure_importance(network, text, (1, 1), method)


def test_an_unknown_method_is_refused(model, text, network_of):
    with pytest.raises(MomifyError, match="'magic' is unknown; use one of greedy, layerdrop, leave_one_out, cos"):
        measure_importance(network_of(model), text, (1, 1), method="magic")


@pytest.mark.parametrize("method", ["greedy", "leave_one_out"])
@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_what_leaves_no_number_is_removed_last(model, text, method, loss, network_of):
    """Only as no other attention is left; and it can be written as JSON."""
    known = {}
    losses = measure_importance(network_of(model), text, (3, 0), method, known=known)
    first = losses.order("mha")[0]
    spoilt = {key: loss if str(2 * first) in key.split() else value for key, value in known.items()}
    for quota in (1, 3):
        found = measure_importance(network_of(model), text, (quota, 0), method, known=dict(spoilt))
        assert (first in [removal.layer for removal in found.removals]) == (quota == 3)
        assert found.cost("mha", first) == float("inf")
        written = json.dumps(found.to_dict(), allow_nan=False)
        assert Importance.from_dict(json.loads(written)).order("mha") == found.order("mha")
    assert found.removals[-1].layer == first
