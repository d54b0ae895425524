"""evaluate/ppl.py: the task `ppl` gives what perplexity() gives, per token, per word and in bits per byte."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from momify.data.blocks import TokenData
from momify.data.tokenizer import train_tokenizer
from momify.errors import MomifyError
from momify.evaluate.contestant import Contestant
from momify.evaluate.perplexity import Perplexity, Protocol, perplexity
from momify.evaluate.ppl import BESIDE, Ppl, count_words, documents, from_score, per_word, to_score
from momify.evaluate.task import Turn

TEXT = "the cat sat on the mat, the hat and the rat\n" * 4


@pytest.fixture
def one(make_gpt2: Callable[..., GPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast) -> Contestant:
    model = make_gpt2(vocab_size=270, n_positions=16)
    return Contestant("source", "1", lambda: model, tokenizer)


def token_data(tokenizer: PreTrainedTokenizerFast) -> TokenData:
    ids = np.array(tokenizer(TEXT)["input_ids"], dtype=np.uint16)
    return TokenData(ids, ids, 16, "a" * 32 + str(len(tokenizer)))


def test_the_score_is_the_perplexity(one: Contestant) -> None:
    task, done = Ppl(token_data, 16, 16, batch=2), []
    score = task.score(one, Turn(0, done.append))
    tokens = token_data(one.tokenizer).valid_tensor()
    expected = perplexity(one.load(), tokens, Protocol(16, 16))
    assert score.metrics["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert score.metrics["bits_per_byte"] > 0
    assert set(task.shown) - {"divergence", "agreement"} <= set(score.metrics)
    assert task.work(one) == math.ceil(expected.windows / 2)
    assert sum(done) == task.work(one)
    words = len(TEXT.split())
    assert score.metrics["word_perplexity"] == pytest.approx(math.exp(expected.loss * len(tokens) / words), rel=1e-5)


def test_a_sliding_window_and_a_limit_are_other_protocols(one: Contestant) -> None:
    task = Ppl(token_data, 16, 16)
    sliding, limited = replace(task, stride=8), replace(task, limit=2)
    assert len({str(t.key(one)) for t in (task, sliding, limited)}) == 3
    assert sliding.score(one, Turn(0)).metrics["scored"] == len(token_data(one.tokenizer).valid) - 1
    assert limited.score(one, Turn(0)).metrics["tokens"] == 32
    assert (task.limited, limited.limited) == (False, True)


def test_each_contestant_reads_with_its_own_tokenizer(one: Contestant) -> None:
    bytes_only = train_tokenizer(["x"], 257)
    other = replace(one, tokenizer=bytes_only)
    task = Ppl(token_data, 16, 16)
    assert len(task.tokens(other)) == len(TEXT) > len(task.tokens(one))
    assert task.key(other) != task.key(one)
    assert count_words(bytes_only, task.tokens(other)) == count_words(one.tokenizer, task.tokens(one)) == 44
    for who in (one, other):
        assert f"{len(task.tokens(who)):,} tokens of {len(TEXT):,} bytes" in task.score(who, Turn(0)).protocol


def test_the_last_word_of_a_document_is_not_the_first_of_the_next(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["the cat", "sat", " on the\n", "", "mat, the hat"]
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert documents(tokenizer, torch.tensor(ids)) == [text for text in texts if text]
    assert count_words(tokenizer, torch.tensor(ids)) == sum(len(text.split()) for text in texts) == 8


def test_with_other_tokens_only_what_is_per_byte_and_word_is_comparable(one: Contestant) -> None:
    other, task = replace(one, tokenizer=train_tokenizer(["x"], 257)), Ppl(token_data, 16, 16)
    assert task.incomparable(one, replace(one, role="mom", sha256="2")) is None
    assert task.incomparable(one, other).metrics == ("perplexity", "loss")
    cut = replace(task, limit=2).incomparable(one, other)  # 32 tokens of each: other texts
    assert set(cut.metrics) == set(task.shown) - {"divergence", "agreement"}
    assert "another stretch of text" in cut.why


def test_a_limit_that_leaves_nothing_out_is_none(one: Contestant) -> None:
    tokens, task = len(token_data(one.tokenizer).valid), Ppl(token_data, 16, 16)
    other = replace(one, tokenizer=train_tokenizer(["x"], 257))
    generous, tight = replace(task, limit=-(-tokens // 16)), replace(task, limit=tokens // 16)
    assert not generous.among([one]).limited
    assert generous.key(one) == task.key(one) != tight.key(one)
    assert tight.among([one]).limited
    assert generous.among([one, other]).limited, "the other has more tokens"
    assert generous.among([other, one]).key(one) == task.key(one)
    assert generous.among([one]).reference is one


def test_others_of_the_same_text_are_compared_with_the_reference(
    one: Contestant, make_gpt2: Callable[..., GPT2LMHeadModel]
) -> None:
    model = make_gpt2(vocab_size=270, n_positions=16, n_layer=1)
    other, task = Contestant("mom", "2", lambda: model, one.tokenizer), Ppl(token_data, 16, 16, batch=4)
    beside = replace(task, reference=one)
    score, tokens = beside.score(other, Turn(0)), token_data(one.tokenizer).valid_tensor()
    expected = perplexity(model, tokens, Protocol(16, 16, 4), reference=one.load())
    assert score.metrics["divergence"] == pytest.approx(expected.divergence, rel=1e-5)
    assert score.metrics["agreement"] == expected.agreement
    assert score.note == BESIDE
    assert from_score(score).divergence == score.metrics["divergence"]
    assert task.key(other) != beside.key(other) != replace(task, reference=replace(one, sha256="3")).key(other)
    assert beside.work(other) == math.ceil(expected.windows / 2)


def test_what_cannot_be_compared_is_not(one: Contestant, make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    task = Ppl(token_data, 16, 16, reference=one)
    padded = make_gpt2(vocab_size=272, n_positions=16)
    others = [one, replace(one, role="mom"), replace(one, sha256="2", tokenizer=train_tokenizer(["x"], 257)),
              Contestant("mom", "2", lambda: padded, one.tokenizer)]  # fmt: skip
    for other in others:
        score = task.score(other, Turn(0))
        assert "divergence" not in score.metrics
        assert score.note == ""
    assert task.key(one) == replace(task, reference=None).key(one)


def test_what_is_not_finite_is_kept_as_none_and_comes_back() -> None:
    found = replace(from_score(to_score(_example())), loss=math.inf, perplexity=math.inf)
    assert to_score(found).metrics["perplexity"] is None
    assert from_score(to_score(found)).perplexity == math.inf
    assert from_score(to_score(_example())) == _example()
    assert per_word(_example(), 0) is None


def _example() -> Perplexity:
    return Perplexity(1.0, math.e, None, 9, 8, 1, "block 9")


def test_an_impossible_window_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(MomifyError, match="stride 17 must lie in"):
        Ppl(token_data, 16, 17).check()
