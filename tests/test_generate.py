"""generate.py: what cannot be gone on from is one line, and a temperature next to 0 draws nothing."""

from collections.abc import Callable

import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from momify.cli import app
from momify.data.tokenizer import train_tokenizer
from momify.errors import MomifyError
from momify.generate import Sampling, generate_text

Make = Callable[..., GPT2LMHeadModel]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sat on the mat\n" * 20], 264)


def test_a_tiny_temperature_takes_the_likeliest_token(make_gpt2: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_gpt2(vocab_size=264)
    greedy, tiny = (generate_text(model, tokenizer, "the", Sampling(8, temperature)) for temperature in (0.0, 1e-45))
    assert tiny.text == greedy.text


def test_an_empty_prompt_begins_with_the_first_of_bos_and_eos(
    make_gpt2: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, greedy = make_gpt2(vocab_size=264), Sampling(8, 0.0)
    wanted = generate_text(model, tokenizer, "<|endoftext|>", greedy).text  # its id is 0
    tokenizer.eos_token = "e"
    assert generate_text(model, tokenizer, "", greedy).text == wanted
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.unk_token = None
    with pytest.raises(MomifyError, match=r"nothing to go on from; give --prompt$"):
        generate_text(model, tokenizer, "", greedy)
    assert generate_text(model, tokenizer, "the", greedy).tokens == 8


def test_a_prompt_beyond_the_vocabulary_is_refused(make_gpt2: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(MomifyError, match=r"token id \d+ does not fit the model's 200 entries"):
        generate_text(make_gpt2(vocab_size=200), tokenizer, "the cat", Sampling(2))


def test_a_seed_beyond_32_bits_is_refused_by_the_command() -> None:
    done = CliRunner().invoke(app, ["generate", "gone/", "--seed", str(2**32)])
    assert "--seed" in f"{done.output}{done.exception!r}"
    assert "4294967295" in f"{done.output}{done.exception!r}"
