"""A tokenizer of its own for the data tests, learned in a moment, and a cache that is thrown away."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from momify.data.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """265 entries: bytes and a few pairs."""
    return train_tokenizer(["the cat sat on the mat, the hat and the rat\n" * 20], 265)
