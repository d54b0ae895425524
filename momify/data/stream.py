"""Documents that stream in -> token files, in one pass: memory for a batch, and a killed pass goes on where it was."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from datasets import Dataset, IterableDataset

from momify.errors import MomifyError
from momify.files import disk_errors, read_json, write_json

BATCH = 256  # documents read at once
_TOKENISED_AT_ONCE = 2_000_000  # characters; the tokenizer takes 100 to 500 bytes for each
PARTS = ("train", "valid")
_SAVE_EVERY = 1 << 25  # tokens between notes of how far it has come
_LEAST, _LARGEST = 0.01, 0.1  # share of documents held out
_STATE = "state.json"

Encode = Callable[[list[str]], Iterator[np.ndarray]]
Progress = Callable[[int, int | None], None]  # tokens done, of how many if that is known


@dataclass(frozen=True)
class Limits:
    """Most tokens to hold out (0: none, held-out text comes from elsewhere) and to train on (None: all)."""

    valid: int
    train: int | None = None

    @property
    def share(self) -> float:
        """Share of the documents that is held out: a hundredth, or what the limits ask for, at most a tenth."""
        if not self.valid:
            return 0.0
        return min(_LARGEST, max(_LEAST, self.valid / self.train)) if self.train else _LEAST


@dataclass
class State:
    """How far a pass has come: where in the stream, and tokens written of each part."""

    where: dict[str, Any] | None = None
    documents: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))


def stream_tokens(
    documents: IterableDataset, encode: Encode, dtype: np.dtype, limits: Limits, folder: Path, progress: Progress
) -> dict[str, int]:
    """Write train.bin and valid.bin to `folder`, or go on with what an earlier pass wrote there; tokens of each.

    A document is held out by a hash of its text, so that a copy of it is no training text either; beyond the limit such
    documents are left out. Raises MomifyError where the stream breaks off; started again, it goes on from there.
    """
    state = _read_state(folder, dtype)
    if state.where:
        documents.load_state_dict(state.where)
    files = {part: _open_at(folder / f"{part}.bin", state.tokens[part] * dtype.itemsize) for part in PARTS}
    saved_at = state.tokens["train"]
    try:
        for texts in text_batches(documents, state.documents):
            _write_batch(texts, encode, limits, files, state.tokens)
            state.documents += len(texts)
            progress(state.tokens["train"], limits.train)
            if limits.train is not None and state.tokens["train"] >= limits.train:
                break
            if state.tokens["train"] - saved_at >= _SAVE_EVERY:
                saved_at = state.tokens["train"]
                _save(documents, files, state, folder)
    finally:
        for stream in files.values():
            with disk_errors(Path(stream.name)):
                stream.close()
    (folder / _STATE).unlink(missing_ok=True)
    return state.tokens


def text_batches(documents: Dataset | IterableDataset, before: int = 0) -> Iterator[list[str]]:
    """The texts that are not empty, a batch at a time.

    Raises MomifyError, saying how far it came (`before`: in earlier passes), where the stream breaks off.
    """
    seen = before
    try:
        for batch in documents.iter(BATCH):
            texts = [text for text in batch["text"] if text]
            yield texts
            seen += len(texts)
    except Exception as error:  # the network and the readers raise nearly anything
        reason = " ".join(str(error).split())[:150]
        raise MomifyError(
            f"the stream of documents broke off after {seen:,} of them ({reason}); start the same again, what is "
            "there of the training text is kept"
        ) from error


def groups(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, as many at a time as may be tokenised at once: one at least."""
    start = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if index > start and characters > _TOKENISED_AT_ONCE:
            yield texts[start:index]
            start, characters = index, len(text)
    if texts:
        yield texts[start:]


def _write_batch(
    texts: list[str], encode: Encode, limits: Limits, files: dict[str, BinaryIO], done: dict[str, int]
) -> None:
    """Append the tokens of some documents to the part that each belongs to, up to its limit."""
    for text, ids in zip(texts, encode(texts), strict=True):
        part, limit = ("valid", limits.valid) if is_held_out(text, limits.share) else ("train", limits.train)
        done[part] = append(files[part], ids, done[part], limit)


def append(stream: BinaryIO, ids: np.ndarray, done: int, limit: int | None) -> int:
    """Append a document's tokens to a file that holds `done`, as far as `limit` lets; how many it holds then."""
    ids = ids if limit is None else ids[: max(0, limit - done)]
    with disk_errors(Path(stream.name)):
        stream.write(ids.tobytes())  # not tofile, which does not say why it failed
    return done + len(ids)


def is_held_out(text: str, share: float) -> bool:
    """Whether a hash of the text falls into the first `share` of all hashes."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") < share * 2**64


def _open_at(path: Path, size: int) -> BinaryIO:
    """The file, cut to the `size` that is known to be whole, at its end."""
    with disk_errors(path):
        stream = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (the caller closes it)
        stream.truncate(size)
        stream.seek(size)
        return stream


def _save(documents: IterableDataset, files: dict[str, BinaryIO], state: State, folder: Path) -> None:
    """Note how far it has come; what the note speaks of is on the disk before it."""
    for stream in files.values():
        with disk_errors(Path(stream.name)):
            stream.flush()
            os.fsync(stream.fileno())
    state.where = documents.state_dict()
    write_json(folder / _STATE, asdict(state))


def _read_state(folder: Path, dtype: np.dtype) -> State:
    """How far an earlier pass came; the beginning where there was none, or where its files are not as it says."""
    path = folder / _STATE
    if not path.exists():
        return State()
    state = State(**read_json(path))
    sizes = {part: (folder / f"{part}.bin").stat().st_size for part in PARTS if (folder / f"{part}.bin").exists()}
    whole = all(sizes.get(part, -1) >= state.tokens[part] * dtype.itemsize for part in PARTS)
    return state if whole else State()
