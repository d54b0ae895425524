"""convert/trial.py: the choice that comes back nearest to the source after a short training is taken."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from momify.convert.homes import Request, choose_homes
from momify.convert.importance import KINDS, Importance, Removal
from momify.convert.short_training import NotFiniteError, ShortTraining, trained_copy
from momify.convert.trial import best_of_trials, set_apart, tells
from momify.errors import MomifyError

TRAINING = ShortTraining("trial", learning_rate=3e-3)
NOTHING = torch.zeros(0, 1, dtype=torch.int64)


def choice(method, *halves):
    """An importance that leaves these half-layers out."""
    removals = tuple(Removal(KINDS[half % 2], half // 2, 0.0, None) for half in halves)
    return Importance(method, 4, 9, 1.0, (0.0,) * 4, (0.0,) * 4, removals)


def tried(network, text, *choices):
    return best_of_trials(network, choices, text[:128], text[-32:], TRAINING)


@pytest.fixture
def idle(make_gpt2):
    """A GPT-2 whose attention of layer 1 and feed-forward of layer 2 add nothing."""
    model = make_gpt2()
    for projection in (model.transformer.h[1].attn.c_proj, model.transformer.h[2].mlp.c_proj):
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    return model


def test_what_costs_nothing_is_chosen_wherever_it_stands(idle, network_of, easy_text):
    free, dear = choice("every_other", 2, 5), choice("cosine", 0, 7)
    for order in ((free, dear), (dear, free)):
        best = tried(network_of(idle), easy_text, *order)
        assert (best.method, best.left_out, best.removals) == ("every_other", {2, 5}, free.removals)
        assert [trial.method for trial in best.trials] == [one.method for one in order]
        assert {trial.tokens for trial in best.trials} == {128 * 32}
        assert min(trial.divergence for trial in best.trials) < 0.1 * max(trial.divergence for trial in best.trials)


def test_what_training_brings_back_counts_not_the_start(make_gpt2, network_of, without, easy_text):
    """A constant, which the first steps make up for, beats what is nearer at the start and harder to learn."""
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)  # predictions that tell tokens apart
        model.transformer.h[3].mlp.c_proj.weight.zero_()
        model.transformer.h[3].mlp.c_proj.bias.normal_(std=2.0)
    lessons, judged = easy_text[:600], easy_text[-32:]
    constant, other = gap(model, without(model, [("ffn", 3)]), judged), gap(model, without(model, [("mha", 0)]), judged)
    assert constant > other
    choices, training = (choice("cosine", 0), choice("greedy", 7)), ShortTraining("trial", 1e-2)
    assert best_of_trials(network_of(model), choices, lessons, judged, training).method == "greedy"


def test_a_distance_is_that_of_transformers_with_the_copys_weights(make_gpt2, network_of, without, easy_text):
    model = make_gpt2()
    best = tried(network_of(model), easy_text, choice("greedy", 1, 4))
    copy = trained_copy(network_of(model), easy_text[:128], lambda _: [0, 2, 3, 5, 6, 7], TRAINING)
    student = without(model, [("ffn", 0), ("mha", 2)])
    with torch.no_grad():
        for half in (0, 2, 3, 5, 6, 7):
            block, layers = student.transformer.h[half // 2], copy.layers
            norm, into, out, names = (
                (block.ln_2, block.mlp.c_fc, block.mlp.c_proj, ("up", "down"))
                if half % 2
                else (block.ln_1, block.attn.c_attn, block.attn.c_proj, ("qkv", "out"))
            )
            norm.weight.fill_(1.0)
            norm.bias.zero_()
            for projection, name in zip((into, out), names, strict=True):
                projection.weight.copy_(getattr(layers, f"{name}_weight")[half // 2])
                projection.bias.copy_(getattr(layers, f"{name}_bias")[half // 2])
    assert best.trials[0].divergence == pytest.approx(gap(model, student, easy_text[-32:]), rel=1e-3)


@torch.no_grad()
def gap(teacher, student, ids):
    """KL(teacher || student) a token."""
    said, taught = (one(input_ids=ids).logits.log_softmax(-1).flatten(0, 1) for one in (student, teacher))
    return float(F.kl_div(said, taught, log_target=True, reduction="batchmean"))


def test_equal_choices_share_a_copy_and_the_first_is_taken(make_gpt2, network_of, easy_text):
    told = []
    best = best_of_trials(
        network_of(make_gpt2()),
        (choice("cosine", 2, 1), choice("every_other", 1, 2), choice("greedy", 4, 3)),
        easy_text[:64],
        easy_text[-32:],
        TRAINING,
        lambda *at: told.append(at),
    )
    same, other = best.trials[:2], best.trials[2]
    assert same[0].divergence == same[1].divergence != other.divergence
    assert told == [(done, 4) for done in (1, 2, 3, 4)]  # two copies, two steps each
    assert best.method in ("cosine", "greedy")


def test_trials_survive_a_file(make_gpt2, network_of, easy_text):
    best = tried(network_of(make_gpt2()), easy_text, choice("cosine", 2), choice("greedy", 4))
    assert Importance.from_dict(best.to_dict()) == best
    before = best.to_dict()
    del before["trials"]  # as files had it
    assert Importance.from_dict(before).trials == ()


def test_no_number_is_no_distance(make_gpt2, network_of, easy_text):
    """The copy learns from tokens that can be read and is judged on one that makes everything not a number."""
    model = make_gpt2(tie_word_embeddings=False)
    model.transformer.wte.weight.data[60] = float("nan")
    lessons = torch.where(easy_text == 60, 0, easy_text)[:64]
    with pytest.raises(MomifyError, match="no copy came to a number at a learning rate"):
        best_of_trials(network_of(model), [choice("cosine", 2)], lessons, easy_text[-32:], TRAINING)


def test_a_copy_that_comes_to_nothing_loses(make_gpt2, network_of, easy_text, monkeypatch):
    def fails(network, tokens, kept, *rest):
        if 2 not in kept(None):
            raise NotFiniteError("made up")
        return trained_copy(network, tokens, kept, *rest)

    monkeypatch.setattr("momify.convert.trial.trained_copy", fails)
    best = tried(network_of(make_gpt2()), easy_text, choice("cosine", 2, 5), choice("greedy", 0, 7))
    assert best.method == "greedy"
    assert [trial.divergence is None for trial in best.trials] == [True, False]
    assert Importance.from_dict(json.loads(json.dumps(best.to_dict(), allow_nan=False))) == best


TWELVE = Request(mha=6, ffn=9)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, True),
        ({"depth": 12, "patch_rank": 4, "mha_steps": 6}, True),
        ({"reach": "skip"}, True),
        ({"depth": 9}, False),
        ({"depth": 13}, False),
        ({"mha_steps": 8}, False),
        ({"mha_steps": 4, "reach": "all"}, False),
        ({"modules_per_token": 2}, False),
        ({"init": "random"}, False),
    ],
)
def test_trials_tell_where_what_goes_is_what_a_copy_does_without(changes, told):
    assert tells(replace(TWELVE, **changes), 12) is told


@given(data=st.data(), mha=st.integers(1, 12), ffn=st.integers(1, 12))
def test_where_trials_tell_the_plan_takes_what_was_left_out(data, mha, ffn):
    gone = [2 * layer for layer in data.draw(st.permutations(range(12)))[: 12 - mha]]
    gone += [2 * layer + 1 for layer in data.draw(st.permutations(range(12)))[: 12 - ffn]]
    one, request = replace(choice("cosine", *gone), **dict.fromkeys(("mha_increase", "ffn_increase"), (0.0,) * 12),
                           num_layers=12), Request(mha=mha, ffn=ffn)  # fmt: skip
    plan = choose_homes(one, request)
    left = {2 * layer + offset for offset, kind in enumerate(KINDS) for layer in range(12)
            if layer not in plan.layers(kind)}  # fmt: skip
    assert tells(request, 12)
    assert left == one.left_out


def test_one_row_cannot_be_set_apart():
    with pytest.raises(MomifyError, match="2 blocks or more, this has 1; use cosine"):
        set_apart(torch.zeros(1, 8, dtype=torch.int64), 1, NOTHING)


def test_what_candidates_were_chosen_on_does_not_judge_them():
    text = torch.arange(40)[:, None]
    lessons, judged = set_apart(text, 10, text[[0, 8, 9]])
    assert judged.flatten().tolist() == [4, 12, 16, 20, 24, 28, 32, 36]
    assert not set(lessons.flatten().tolist()) & {0, 8}
    assert len(set_apart(text, 10, text)[1]) == 10, "all there is"


@given(count=st.integers(2, 300), rows=st.integers(1, 300))
def test_rows_set_apart_are_spread_and_no_lessons(count, rows):
    lessons, judged = set_apart(torch.arange(count)[:, None], rows, NOTHING)
    assert len(judged) == min(rows, count // 2)
    assert sorted(torch.cat([lessons, judged]).flatten().tolist()) == list(range(count))
    places = judged.flatten().diff()
    assert len(judged) < 2 or int(places.max() - places.min()) <= 1
