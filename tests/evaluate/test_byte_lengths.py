"""evaluate/byte_lengths.py: every byte of a text is counted once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from momify.data.tokenizer import train_tokenizer
from momify.evaluate.byte_lengths import byte_lengths

TOKENIZER = train_tokenizer(["the cat sat on the mat, the hat and the rat\n" * 20], 265)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=50))
def test_lengths_of_a_texts_tokens_add_up_to_its_bytes(text: str) -> None:
    text = text.encode("utf-8", "replace").decode().replace("<|endoftext|>", "")
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert byte_lengths(TOKENIZER)[torch.tensor(ids, dtype=torch.int64)].sum() == len(text.encode())


def test_special_tokens_are_no_text() -> None:
    assert byte_lengths(TOKENIZER)[TOKENIZER.eos_token_id] == 0


def test_other_kinds_of_vocabulary_have_no_lengths() -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"日本": 0, "a b": 1}, unk_token="日本"))
    assert byte_lengths(PreTrainedTokenizerFast(tokenizer_object=words)) is None
