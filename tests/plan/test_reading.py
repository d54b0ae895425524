"""Sizes from a config alone: the published ones, a folder's, and what is refused."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config

from momify.errors import MomifyError
from momify.measure.cost import shape_of
from momify.plan.reading import dense_shape, read_shape


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads"),
    [("gpt2", 12, 768, 12), ("gpt2-medium", 24, 1024, 16), ("openai-community/gpt2-large", 36, 1280, 20),
     ("gpt2-xl", 48, 1600, 25)],
)  # fmt: skip
def test_the_published_ones(name: str, layers: int, width: int, heads: int) -> None:
    assert read_shape(name) == shape_of(GPT2Config(n_layer=layers, n_embd=width, n_head=heads))


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_inner": 50}, {"tie_word_embeddings": False}, {"activation_function": "relu"}, {"n_positions": 77}],
    ids=str,
)
def test_a_folder_says_what_transformers_reads(changes: dict, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=61, bos_token_id=0, eos_token_id=0, **changes)
    config.save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)) == shape_of(config)


def test_a_folder_wins_over_a_published_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    GPT2Config(n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0).save_pretrained("gpt2")
    assert read_shape("gpt2").width == 32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[1]", "holds a list"),
        ('{"model_type": "llama"}', "model_type is 'llama'"),
        ('{"model_type": "mom"}', "name the model it was made from"),
        ('{"n_layer": 0}', "n_layer is 0"),
        ('{"n_embd": "768"}', "n_embd is '768'"),
        ('{"n_embd": null}', "n_embd is None"),
        ('{"n_embd": {"a": 1}}', "n_embd is {'a': 1}"),
        ('{"n_inner": {"a": 1}}', "n_inner is {'a': 1}"),
        ('{"vocab_size": true}', "vocab_size is True"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_what_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(MomifyError, match=words):
        read_shape(str(tmp_path))


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MomifyError, match=r"no config\.json in"):
        read_shape(str(tmp_path))
    with pytest.raises(MomifyError, match="neither a folder, nor a run"):
        read_shape("nobody/has-this-one")


def test_defaults_are_transformers_own() -> None:
    assert dense_shape(json.loads('{"model_type": "gpt2"}'), "x") == shape_of(GPT2Config())
