"""evaluate/xsum.py and rouge.py: what is learned, that batches decode as single documents do, and the scores."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from momify.errors import MomifyError
from momify.evaluate.batches import Ids
from momify.evaluate.contestant import Contestant
from momify.evaluate.fine_tune import FineTuning
from momify.evaluate.rouge import rouge, rouge_baselines
from momify.evaluate.split import Split
from momify.evaluate.task import Turn
from momify.evaluate.xsum import PROMPT, Decoding, Reader, Xsum, decode_batch, summary_loss, training_batch
from momify.evaluate.xsum_data import Pair, XsumData

WORDS = ["the cat", "the hat", "the mat", "the rat"]
SHORT = Decoding(beams=4, max_new_tokens=12)


def pairs(count: int, start: int = 0) -> Split[Pair]:
    """Documents whose last word sums them up."""
    found = [Pair(f"{'on ' * (1 + i % 4)}{WORDS[i % 4]}", WORDS[i % 4]) for i in range(start, start + count)]
    return Split(tuple(found), count)


@pytest.fixture
def data() -> XsumData:
    return XsumData(pairs(16), pairs(6, 3), "test")


def test_rouge_by_hand() -> None:
    # 3 of 4 and of 5 words; bigrams "the cat": 1 of 3 and of 4; longest common subsequence: the cat sat
    found = rouge(["the cat sat down"], ["the cat quietly then sat"])
    assert found["rouge1"] == pytest.approx(100 * 2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))
    assert found["rouge2"] == pytest.approx(100 * 2 * (1 / 4) * (1 / 3) / (1 / 4 + 1 / 3))
    assert found["rougeL"] == pytest.approx(found["rouge1"])
    assert found["rouge"] == pytest.approx((found["rouge1"] + found["rouge2"] + found["rougeL"]) / 3)
    assert tuple(found) == Xsum(XsumData(pairs(1), pairs(1), "test"), FineTuning()).shown


def test_rouge_stems_averages_and_gives_an_empty_summary_nothing() -> None:
    assert rouge(["running dogs"], ["run dog"])["rouge1"] == 100.0
    assert rouge(["a b", "a b"], ["a b", ""])["rouge1"] == 50.0


def test_baselines_of_xsum() -> None:
    train = Split((Pair("x", "one two three"), Pair("x", "one two three four five")), 2)
    scored = Split((Pair("a b c d e f. g h", "a b c d"), Pair("only this", "this")), 2)
    lead, drawn = rouge_baselines(XsumData(train, scored, "test"))
    assert "first 4 words" in lead.how
    assert lead.metrics["rouge1"] == pytest.approx((100 + 100 * 2 / 3) / 2)
    assert rouge_baselines(XsumData(train, scored, "test"))[1] == drawn
    assert "seed 0" in drawn.how


def test_documents_are_cut_so_that_prompt_and_summary_fit(dense: Contestant) -> None:
    reader = Reader(dense.tokenizer, 40, 12)
    rows = reader.training([Pair("the cat sat on the mat " * 30, "the hat " * 30), Pair("a", "b")])
    (ids, count), (short, short_count) = rows
    assert (len(ids), count) == (40, 12)
    assert ids[-1] == short[-1] == reader.end
    assert ids[28 - len(reader.between) : 28] == reader.between
    assert dense.tokenizer.decode(short) == "a\nTL;DR: b<|endoftext|>"
    assert short_count == len(dense.tokenizer(" b")["input_ids"]) + 1
    with pytest.raises(MomifyError, match="xsum needs 12 positions for a summary"):
        Reader(dense.tokenizer, 12 + len(reader.between), 12)


@pytest.mark.parametrize("which", ["dense", "mom"])
def test_the_loss_is_that_of_each_summary_alone(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which).load()
    rows: list[tuple[Ids, int]] = [([5, 9, 200, 31, 7, 0], 3), ([44, 3, 0], 1), ([250, 12, 6, 1, 8, 9, 9, 33, 0], 4)]
    expected = 0.0
    for ids, count in rows:
        logits = model(torch.tensor([ids])).logits[0, -count - 1 : -1]
        expected += F.cross_entropy(logits, torch.tensor(ids[-count:]), reduction="sum").item()
    assert summary_loss(model, training_batch(rows, 0)).item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("which", ["dense", "mom"])
@pytest.mark.parametrize("beams", [1, 4])
def test_a_batch_decodes_as_each_document_alone(which: str, beams: int, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which).load()
    prompts = [[5, 9, 200, 31], [7], [44, 3, 17, 17, 8, 250, 12, 90, 91, 92], [1, 2, 3]]
    how = Decoding(beams=beams, max_new_tokens=12)
    together = decode_batch(model, prompts, 0, how)
    alone = [decode_batch(model, [prompt], 0, how)[0] for prompt in prompts]
    cut = [[i for i in row if i] for row in together]
    assert cut == [[i for i in row if i] for row in alone]
    assert len({tuple(row) for row in cut}) == len(prompts)


@torch.no_grad()
def test_trigrams_of_the_document_may_come_again_and_those_of_the_summary_may_not(mom: Contestant) -> None:
    model = mom.load()
    free = decode_batch(model, [[5, 9, 200]], 0, Decoding(beams=1, max_new_tokens=40, no_repeat_ngram=40))[0]
    bound = decode_batch(model, [[5, 9, 200]], 0, Decoding(beams=1, max_new_tokens=40, no_repeat_ngram=2))[0]
    grams = [list(pairwise(row)) for row in (free, bound)]
    assert len(set(grams[0])) < len(grams[0])
    assert len(set(grams[1])) == len(grams[1])
    document = [5, 9, 200, *free]  # the same continuation is in the prompt now
    again = decode_batch(model, [document], 0, Decoding(beams=1, max_new_tokens=5, no_repeat_ngram=1))[0]
    plain = model.generate(torch.tensor([document]), max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=0)
    assert again[0] == plain[0, -1]
    assert again[0] in document


@pytest.mark.parametrize("which", ["dense", "mom"])
def test_what_can_be_learned_is_learned(which: str, data: XsumData, request: pytest.FixtureRequest) -> None:
    task = Xsum(data, FineTuning(learning_rate=1e-2, epochs=25, batch_size=8, dropout=0.0), SHORT)
    one, done = request.getfixturevalue(which), []
    score = task.score(one, Turn(0, done.append))
    assert score.metrics["rouge1"] > 80
    assert sum(done) == task.work(one)
    for part in ("test split: 6 pairs", "trained on 16;", "max length 64", "loss on the summary alone", "beams 4",
                 "at most 12 new tokens", "no 3-gram twice", "rouge-score"):  # fmt: skip
        assert part in score.protocol


def test_a_seed_decides_everything_and_the_key_holds_the_rest(data: XsumData, mom: Contestant) -> None:
    settings = FineTuning(learning_rate=1e-2, epochs=1, batch_size=8)
    task = Xsum(data, settings, SHORT)
    first = task.score(mom, Turn(3))
    torch.manual_seed(99)
    assert task.score(mom, Turn(3)).metrics == first.metrics
    others = [
        Xsum(data, settings, Decoding(beams=2, max_new_tokens=12)),
        Xsum(data, settings, SHORT, max_length=40),
        Xsum(XsumData(pairs(16), pairs(5), "test"), settings, SHORT),
    ]
    assert all(other.key(mom) != task.key(mom) for other in others)


def test_a_document_beyond_the_vocabulary_is_told_before_anything_is_learned(
    tokenizer: PreTrainedTokenizerFast, make_gpt2: Callable[..., GPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("momify.evaluate.xsum.fine_tune", lambda *rest: pytest.fail("it learns"))
    entries = 1 + max(tokenizer(f"a{PROMPT} b")["input_ids"])
    assert max(tokenizer("the cat")["input_ids"]) >= entries
    one = Contestant("mom", "1", lambda: make_gpt2(vocab_size=entries), tokenizer)
    task = Xsum(XsumData(Split((Pair("a", "b"),), 1), Split((Pair("the cat", "b"),), 1), "test"), FineTuning(), SHORT)
    with pytest.raises(MomifyError, match=f"does not fit the model's {entries} entries"):
        task.score(one, Turn(0))
