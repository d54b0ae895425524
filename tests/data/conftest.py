"""A tokenizer of its own for the data tests, learned in a moment, and a cache that is thrown away."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from momify.data.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    before, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)


@pytest.fixture
def files_of_at_most() -> Callable[[int], AbstractContextManager[None]]:
    """Inside of it, no file can grow beyond so many bytes."""
    return _files_of_at_most


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """265 entries: bytes and a few pairs."""
    return train_tokenizer(["the cat sat on the mat, the hat and the rat\n" * 20], 265)
