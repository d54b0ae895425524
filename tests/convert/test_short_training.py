"""convert/short_training.py: a copy learns what transformers' GPT-2 with silenced sublayers would have to learn."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup

from momify.convert.importance import KINDS
from momify.convert.short_training import STEP_TOKENS, ShortTraining, divergence, trained_copy
from momify.errors import MomifyError


def all_but(*gone):
    return lambda generator: [half for half in range(8) if half not in gone]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gone=st.sets(st.integers(0, 7), max_size=7))
def test_the_divergence_is_that_of_transformers_with_sublayers_silenced(gone, make_gpt2, network_of, kept_of, without):
    model = make_gpt2()
    network, ids = network_of(model), torch.randint(0, 61, (3, 20))
    quiet = without(model, [(KINDS[half % 2], half // 2) for half in gone])
    expected = gap(quiet, model, ids).detach()
    torch.testing.assert_close(divergence(network, kept_of(network, gone), ids), expected, atol=2e-6, rtol=1e-4)


def test_a_copy_learns_what_transformers_would_learn(make_gpt2, network_of, kept_of, without, easy_text):
    model, gone, seed, steps = make_gpt2(), (2, 5), 4, 12
    for name, parameter in model.named_parameters():
        if "ln_1" in name or "ln_2" in name:  # as the copy has it, whose matrices hold what a norm scales
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
    lessons, judged = easy_text[: steps * STEP_TOKENS // 32], easy_text[-64:]
    copy = trained_copy(network_of(model), lessons, all_but(*gone), ShortTraining("trial", 2e-3, seed=seed))
    found = float(divergence(network_of(model), kept_of(copy, gone), judged))

    student = without(model, [(KINDS[half % 2], half // 2) for half in gone])
    taught = [
        parameter
        for half, sublayer in enumerate(part for block in student.transformer.h for part in (block.attn, block.mlp))
        if half not in gone
        for parameter in sublayer.parameters()
    ]
    optimizer = torch.optim.AdamW(taught, 2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    rate = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    shuffled = lessons[torch.randperm(len(lessons), generator=torch.Generator().manual_seed(seed))]
    before = gap(student, model, judged).item()
    for batch in shuffled.split(STEP_TOKENS // 32):
        optimizer.zero_grad()
        gap(student, model, batch).backward()
        torch.nn.utils.clip_grad_norm_(taught, 1.0)
        optimizer.step()
        rate.step()
    assert found < 0.8 * before
    assert found == pytest.approx(gap(student, model, judged).item(), rel=2e-3)


def gap(student, teacher, ids):
    """KL(teacher || student) a token."""
    with torch.no_grad():
        taught = teacher(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)
    said = student(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)
    return F.kl_div(said, taught, log_target=True, reduction="batchmean")


def test_the_source_stays_as_it_was_and_a_seed_decides_the_copy(make_gpt2, network_of, easy_text):
    network = network_of(make_gpt2())
    before = {part.name: getattr(network.layers, part.name).clone() for part in fields(network.layers)}
    told = []
    copies = [
        trained_copy(
            network, easy_text[:80], all_but(2, 5), ShortTraining("trial", 1e-3, seed=seed), lambda *at: told.append(at)
        )
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
        trained_copy(network_of(make_gpt2()), tokens, all_but(2, 5), ShortTraining("layerdrop", rate))
