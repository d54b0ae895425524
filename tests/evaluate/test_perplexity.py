"""Perplexity against loops written out by hand, over windows with and without overlap."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel

from momify.errors import MomifyError
from momify.evaluate.perplexity import Protocol, perplexity, windows

MakeGpt2 = Callable[..., GPT2LMHeadModel]


def nll_per_token(model: GPT2LMHeadModel, tokens: torch.Tensor, block: int, stride: int) -> dict[int, float]:
    """-log p of each scored token: window by window, token by token, one unbatched forward pass each."""
    found: dict[int, float] = {}
    begin = 0
    while True:
        chunk = tokens[begin : begin + block]
        with torch.no_grad():
            log_p = model(chunk[None]).logits[0].double().log_softmax(-1)
        for position in range(1, len(chunk)):
            found.setdefault(begin + position, -log_p[position - 1, chunk[position]].item())
        if begin + block >= len(tokens):
            return found
        begin += stride


@pytest.mark.parametrize(
    ("count", "block", "stride", "batch"),
    [
        (48, 16, 16, 2),  # whole windows
        (50, 16, 16, 3),  # a last window of 2 tokens
        (49, 16, 16, 8),  # a last window of 1 token: nothing to score in it
        (50, 16, 4, 3),  # overlap, the last window partial
        (48, 16, 8, 1),  # overlap, the last window whole
        (53, 16, 15, 4),  # overlap of one token: the first token of a window is the last of the one before
        (10, 16, 16, 4),  # shorter than a block
        (2, 2, 1, 4),  # as small as it gets
    ],
)
def test_equals_the_loop(make_gpt2: MakeGpt2, count: int, block: int, stride: int, batch: int) -> None:
    model = make_gpt2()
    tokens = torch.randint(0, 61, (count,))
    expected = nll_per_token(model, tokens, block, stride)
    sizes = torch.randint(1, 9, (count,))
    found = perplexity(model, tokens, Protocol(block, stride, batch), sizes)

    mean = sum(expected.values()) / len(expected)
    assert found.scored == len(expected)
    assert found.tokens == count
    assert found.loss == pytest.approx(mean, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    size = sum(int(sizes[i]) for i in expected)
    assert found.bits_per_byte == pytest.approx(sum(expected.values()) / math.log(2) / size, rel=1e-5)


def test_whole_windows_give_the_loss_of_transformers(make_gpt2: MakeGpt2) -> None:
    model = make_gpt2()
    tokens = torch.randint(0, 61, (64,))
    rows = tokens.view(4, 16)
    with torch.no_grad():
        expected = model(rows, labels=rows).loss.item()
    assert perplexity(model, tokens, Protocol(16, 16, 3)).loss == pytest.approx(expected, rel=1e-5)


@given(st.integers(2, 300), st.integers(2, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_each_token_is_scored_once(count: int, block: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, block))
    plan = list(windows(count, Protocol(block, stride)))
    scored = [token for window in plan for token in range(window.first, window.end)]
    assert len(scored) == len(set(scored))
    starts = {0} if stride < block else set(range(0, count, block))
    assert set(scored) == set(range(count)) - starts
    assert all(window.begin < window.first and window.end - window.begin <= block for window in plan)


@pytest.mark.parametrize(("stride", "batch"), [(16, 3), (16, 1), (5, 4)])
def test_divergence_and_agreement_are_those_of_a_loop(make_gpt2: MakeGpt2, stride: int, batch: int) -> None:
    model, reference = make_gpt2(), make_gpt2(n_layer=1)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)  # far from uniform
        reference.transformer.wte.weight.copy_(model.transformer.wte.weight + torch.randn(61, 32))
    tokens, scored = torch.randint(0, 61, (50,)), []
    for window in windows(50, Protocol(16, stride)):
        for at in range(window.first, window.end):
            with torch.no_grad():
                context = tokens[window.begin : at][None]
                p, q = (one(context).logits[0, -1].double().softmax(-1) for one in (model, reference))
            scored.append(((q * (q / p).log()).sum().item(), int(p.argmax()) == int(q.argmax())))
    found = perplexity(model, tokens, Protocol(16, stride, batch), reference=reference)
    assert found.scored == len(scored)
    assert found.divergence == pytest.approx(sum(kl for kl, _ in scored) / len(scored), rel=1e-4)
    assert found.divergence > 0.05
    assert found.agreement == pytest.approx(100 * sum(same for _, same in scored) / len(scored))
    assert 0 < found.agreement < 100


def test_a_model_is_nowhere_apart_from_itself_and_the_rest_is_as_without_a_reference(make_gpt2: MakeGpt2) -> None:
    model, tokens = make_gpt2(), torch.randint(0, 61, (50,))
    found, alone = (perplexity(model, tokens, Protocol(16, 16), reference=other) for other in (model, None))
    assert (found.divergence, found.agreement) == (pytest.approx(0, abs=1e-7), 100)
    assert replace(found, divergence=None, agreement=None) == alone


def test_a_broken_model_is_not_near_to_its_reference(make_gpt2: MakeGpt2) -> None:
    model, reference = make_gpt2(), make_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(math.nan)
    assert math.isnan(perplexity(model, torch.arange(20), Protocol(8, 8), reference=reference).divergence)


def test_a_reference_in_training_mode_has_no_dropout_and_stays_in_it(make_gpt2: MakeGpt2) -> None:
    model, reference = make_gpt2(), make_gpt2(resid_pdrop=0.5).train()
    expected = perplexity(model, torch.arange(40), Protocol(16, 16), reference=reference).divergence
    assert perplexity(model, torch.arange(40), Protocol(16, 16), reference=reference).divergence == expected
    assert reference.training


def test_a_reference_of_another_vocabulary_is_refused(make_gpt2: MakeGpt2) -> None:
    with pytest.raises(MomifyError, match=r"61 entries .* reference's 70"):
        perplexity(make_gpt2(), torch.arange(20), Protocol(8, 8), reference=make_gpt2(vocab_size=70))


def test_no_byte_counts_no_bits_per_byte(make_gpt2: MakeGpt2) -> None:
    assert perplexity(make_gpt2(), torch.arange(20), Protocol(8, 8)).bits_per_byte is None


def test_dropout_is_off_and_the_mode_comes_back(make_gpt2: MakeGpt2) -> None:
    model = make_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    tokens = torch.arange(40) % 61
    expected = perplexity(model, tokens, Protocol(16, 16)).loss
    model.train()
    assert perplexity(model, tokens, Protocol(16, 16)).loss == expected
    assert model.training


def test_describe() -> None:
    line = Protocol(256, 256).describe(65536, torch.float32)
    assert line == "block 256, stride 256, 65,536 tokens, float32, first token of a window unscored"
    assert "65,536 tokens of 190,000 bytes, float32" in Protocol(256, 256).describe(65536, torch.float32, 190_000)
    line = Protocol(256, 64).describe(1000, torch.bfloat16)
    assert line == "block 256, stride 64, 1,000 tokens, bfloat16, every token but the first scored once"


def test_a_hopeless_model_has_infinite_perplexity_and_a_finite_loss(make_gpt2: MakeGpt2) -> None:
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e5)
    found = perplexity(model, torch.arange(20), Protocol(8, 8))
    assert math.isfinite(found.loss)
    assert found.perplexity == math.inf


@pytest.mark.parametrize(
    ("protocol", "words"),
    [((1, 1, 1), "block 1 "), ((8, 9, 1), "stride 9 "), ((8, 0, 1), "stride 0 "), ((8, 8, 0), "batch 0 ")],
)
def test_protocols_that_make_no_sense(protocol: tuple[int, int, int], words: str) -> None:
    with pytest.raises(MomifyError, match=words):
        Protocol(*protocol)


def test_text_that_does_not_fit(make_gpt2: MakeGpt2) -> None:
    model, protocol = make_gpt2(), Protocol(16, 16)
    with pytest.raises(MomifyError, match="block 64"):
        perplexity(model, torch.arange(20), Protocol(64, 64))
    with pytest.raises(MomifyError, match=r"token ids 0\.\.61"):
        perplexity(model, torch.arange(62), protocol)
    with pytest.raises(MomifyError, match="cannot be scored"):
        perplexity(model, torch.arange(1), protocol)
    with pytest.raises(MomifyError, match="cannot be scored"):
        perplexity(model, torch.arange(20)[None], protocol)
    with pytest.raises(MomifyError, match="token_bytes"):
        perplexity(model, torch.arange(20), protocol, torch.ones(19))
