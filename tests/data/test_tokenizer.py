"""data/tokenizer.py: bytes come back as they were; a folder without a tokenizer is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from momify.data.tokenizer import load_tokenizer, train_tokenizer
from momify.errors import MomifyError


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_round_trip_of_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    text = text.encode("utf-8", "replace").decode().replace("<|endoftext|>", "")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_saved_tokenizer_is_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "x = [ the, cat ]  # é .\n\n\tif"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.eos_token_id == tokenizer.eos_token_id == 0
    assert again.decode(again(text)["input_ids"]) == text


def test_size_is_as_asked_or_refused() -> None:
    assert len(train_tokenizer(["the cat the cat " * 9], 260)) == 260
    with pytest.raises(MomifyError, match="not 4096"):
        train_tokenizer(["the cat"], 4096)
    with pytest.raises(MomifyError, match="257"):
        train_tokenizer(["the cat"], 100)


def test_folder_without_tokenizer_is_refused(tmp_path: Path, make_gpt2) -> None:
    make_gpt2().save_pretrained(tmp_path)
    with pytest.raises(MomifyError, match="tokenizer"):
        load_tokenizer(tmp_path)
