"""evaluate/batches.py: nothing lost, nothing that means padding inside a text, both sentences kept in part."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from momify.errors import MomifyError
from momify.evaluate.batches import by_length, check_vocabulary, encode, join, pad, shuffled

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=300)


@settings(max_examples=30, deadline=None)
@given(lengths=lengths, size=st.integers(1, 9))
def test_every_place_comes_once(lengths: list[int], size: int) -> None:
    for batches in (shuffled(lengths, size, "0/1"), by_length(lengths, size)):
        assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
        assert all(1 <= len(batch) <= size for batch in batches)
    longest = [max(lengths[place] for place in batch) for batch in by_length(lengths, size)]
    assert longest == sorted(longest, reverse=True)


def test_shuffling_follows_the_seed_and_saves_padding() -> None:
    lengths = [1 + 37 * place % 100 for place in range(1000)]
    assert shuffled(lengths, 8, "0/0") == shuffled(lengths, 8, "0/0") != shuffled(lengths, 8, "0/1")
    padded = sum(max(lengths[p] for p in batch) * len(batch) for batch in shuffled(lengths, 8, "0/0"))
    assert padded < 1.1 * sum(lengths)
    spread = [max(lengths[p] for p in batch) for batch in shuffled(lengths, 8, "0/0")]
    assert spread != sorted(spread)


def test_padding() -> None:
    ids, mask = pad([[5, 6, 7], [8]], 0)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    ids, mask = pad([[5, 6, 7], [8]], 0, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])


def test_joining_cuts_the_longer_first() -> None:
    a, b = list(range(10, 20)), [1, 2, 3]
    assert join(a, [0], b, 100) == [*a, 0, *b]
    assert join(a, [0], b, 8) == [10, 11, 12, 13, 0, 1, 2, 3]
    assert join(b, [0], a, 8) == [1, 2, 3, 0, 10, 11, 12, 13]
    assert join(a, [0], a, 8) == [10, 11, 12, 0, 10, 11, 12, 13]


@settings(max_examples=50, deadline=None)
@given(a=st.integers(1, 20), b=st.integers(1, 20), most=st.integers(5, 30))
def test_joined_texts_fill_the_room(a: int, b: int, most: int) -> None:
    found = join([1] * a, [0], [2] * b, most)
    assert len(found) == min(a + b + 1, most)
    assert found.count(1) >= min(a, (most - 1) // 2)
    assert found.count(2) >= min(b, (most - 1) // 2)


@pytest.mark.parametrize("text", ["the cat", "", "<|endoftext|>", "a<|endoftext|>b", "\ud800 lone", "ü\u2028"])
def test_texts_never_hold_the_padding_token_and_are_never_empty(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = encode(tokenizer, [text])
    assert row
    assert tokenizer.eos_token_id not in row


def test_ids_of_another_tokenizer_are_refused() -> None:
    check_vocabulary([[1, 9], [3]], 10)
    with pytest.raises(MomifyError, match="token id 9 does not fit the model's 9 entries"):
        check_vocabulary([[1, 9], [3]], 9)
