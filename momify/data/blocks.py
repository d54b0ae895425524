"""Documents -> tokens -> blocks of equal length, cached by the hash of everything that decides them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from momify.data.cache import cache_folder, making
from momify.data.documents import Corpus, read_corpus
from momify.data.hub import HubStream
from momify.data.stream import BATCH, PARTS, Encode, Limits, Progress, append, groups, stream_tokens, text_batches
from momify.errors import MomifyError
from momify.files import disk_errors, write_json
from momify.recipe_blocks import DataBlock, most_pieces

_FORMAT = 2  # of a cached folder, part of its name: raise it when the content changes
_LARGEST_HELD_OUT_SHARE = 0.1
Needs = Literal["train", "valid", "both"]
NOT_SCORED = -100  # a label that no loss counts, as torch and transformers have it


class TokenBlocks(TorchDataset):
    """Blocks of `length` consecutive tokens of a flat array; the rest that fills no block is left out.

    `block` (1,): its number, by which a user finds the text.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        block = self.tokens[index * self.length : (index + 1) * self.length]
        ids = torch.from_numpy(block.astype(np.int64))  # (T,)
        return {"input_ids": ids, "labels": ids, "block": torch.tensor([index])}


class SplicedBlocks(TokenBlocks):
    """Blocks made of as many `pieces`, each from another place of the text: every token is in one of them still.

    Piece j stays where it was in its block, so that every position is met. The first token of a piece is no label, as
    what stands before it does not tell it; so a piece has two tokens or more. `block` (pieces,): the blocks that they
    are of.
    """

    def __init__(self, tokens: np.ndarray, length: int, pieces: int) -> None:
        super().__init__(tokens, length)
        self.pieces = min(pieces, most_pieces(length))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, count = super().__getitem__(index)["input_ids"].clone(), len(self)
        labels, origins = ids.clone(), [index]
        for piece in range(1, self.pieces):
            start, end = (at * self.length // self.pieces for at in (piece, piece + 1))
            origins.append((index + piece * count // self.pieces) % count)  # as far away as can be
            ids[start:end] = labels[start:end] = super().__getitem__(origins[-1])["input_ids"][start:end]
            labels[start] = NOT_SCORED
        return {"input_ids": ids, "labels": labels, "block": torch.tensor(origins)}


@dataclass(frozen=True)
class TokenData:
    """Train and held-out tokens, flat and memory-mapped, with the hash that names them.

    noted: the highest of them, where a note of it saves looking through all.
    """

    train: np.ndarray
    valid: np.ndarray
    block_length: int
    sha256: str
    noted: int | None = None

    @property
    def highest(self) -> int:
        """The highest token."""
        return _highest_of(self.train, self.valid) if self.noted is None else self.noted

    @property
    def train_blocks(self) -> TokenBlocks:
        return TokenBlocks(self.train, self.block_length)

    def spliced_blocks(self, pieces: int) -> TokenBlocks:
        """The same text as blocks of so many pieces from different places; 1: as it stands."""
        return SplicedBlocks(self.train, self.block_length, pieces) if pieces > 1 else self.train_blocks

    def spread_blocks(self, count: int) -> torch.Tensor:
        """`count` blocks of training text (S, T) int64, evenly spaced, so that little hangs on where it begins."""
        blocks = self.train_blocks
        count = min(count, len(blocks))
        return torch.stack([blocks[index * len(blocks) // count]["input_ids"] for index in range(count)])

    def valid_tensor(self, limit: int | None = None) -> torch.Tensor:
        """Held-out tokens (N,) as int64, at most `limit`."""
        return torch.from_numpy(self.valid[:limit].astype(np.int64))


def load_tokens(
    data: DataBlock,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus | None = None,
    progress: Progress = lambda done, total: None,
    needs: Needs = "both",
) -> TokenData:
    """Tokens of a recipe's data, from the cache where they were made before; `progress` is told tokens made.

    Raises MomifyError when the text is missing, or too short for what it is needed for: one block to train on, two
    tokens to measure on.
    """
    corpus = corpus or read_corpus(data)
    key = _cache_key(corpus, tokenizer, data)
    folder = cache_folder() / "tokens" / f"{key}-{_FORMAT}"
    if not (folder / "meta.json").exists():
        with making(folder, keep=isinstance(corpus.train, HubStream)) as part:
            if part:
                _write_tokens(corpus, tokenizer, data, part, progress)
    tokens = _map_tokens(folder, data.block_length, key)
    trains = needs == "valid" or len(tokens.train) >= data.block_length
    if needs != "train" and trains and len(tokens.valid) < 2:
        raise MomifyError(
            f"data {', '.join(data.valid or data.train)} leaves nothing to be held out; set data.valid, or, in a txt "
            "file, put lines of <|endoftext|> between documents"
        )
    if not trains:
        raise MomifyError(
            f"data {', '.join(data.train)} gives {len(tokens.train):,} tokens to train on, less "
            f"than one block of {data.block_length}; give more text or a smaller data.block_length"
        )
    return tokens


def _cache_key(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: DataBlock) -> str:
    """What a text is known by, in checkpoints and results too: whatever the format of the cache."""
    parts = ["1", corpus.sha256, tokenizer_hash(tokenizer), data.column, str(data.valid_tokens)]
    parts += [] if data.train_tokens is None else [f"at most {data.train_tokens} to train on"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of all that decides what ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _map_tokens(folder: Path, block_length: int, key: str) -> TokenData:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        train, valid = (_map(folder / f"{part}.bin", meta[part], np.dtype(meta["dtype"])) for part in PARTS)
        return TokenData(train, valid, block_length, key, meta["highest"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # a file is gone, cut, or not what was written
        reason = " ".join(str(error).replace(f"{folder}{os.sep}", "").split())[:150]
        raise MomifyError(f"cached tokens {folder}: {reason}; remove that folder, it is made again") from None


def _map(path: Path, count: int, dtype: np.dtype) -> np.ndarray:
    """The `count` tokens of a file. Raises ValueError where it has more or fewer."""
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path.name} is not as long as written")
    return np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)


def _highest_of(*parts: np.ndarray) -> int:
    """The highest token of some arrays; 0 where there is none."""
    return max(int(part.max(initial=0)) for part in parts)


def _write_tokens(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: DataBlock, folder: Path, progress: Progress
) -> None:
    """train.bin, valid.bin and, last, meta.json."""
    dtype = np.dtype("uint16" if len(tokenizer) <= 2**16 else "int32")
    train, valid = corpus.train, corpus.valid
    encode = _encoder(tokenizer, dtype)
    if isinstance(train, HubStream):
        limits = Limits(0 if valid is not None else data.valid_tokens, data.train_tokens)
        counts = stream_tokens(train.open(), encode, dtype, limits, folder, progress)
    else:
        if valid is None:
            train, valid = split_by_document(train, data.valid_tokens, lambda text: sum(map(len, encode([text]))))
        counts = {"train": _write(folder / "train.bin", train, encode, data.train_tokens, progress)}
    if valid is not None:
        valid = valid.open() if isinstance(valid, HubStream) else valid
        counts["valid"] = _write(folder / "valid.bin", valid, encode, data.valid_tokens)
    highest = _highest_of(*(_map(folder / f"{part}.bin", counts[part], dtype) for part in PARTS))
    write_json(folder / "meta.json", {"dtype": dtype.name, "highest": highest, **counts})


def _encoder(tokenizer: PreTrainedTokenizerBase, dtype: np.dtype) -> Encode:
    """Token ids of each text, an end-of-text token behind it."""
    end = tokenizer.eos_token_id
    if end is None:
        raise MomifyError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")

    def encode(texts: list[str]) -> Iterator[np.ndarray]:
        for group in groups(texts):
            ids = tokenizer(group, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            yield from (np.asarray([*row, end], dtype) for row in ids)

    return encode


def _write(
    path: Path,
    documents: Dataset | IterableDataset,
    encode: Encode,
    limit: int | None,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write the tokens of `documents` to `path`, `limit` at most; how many were written.

    Raises MomifyError where a stream of them breaks off.
    """
    written = 0
    with disk_errors(path), open(path, "wb") as stream:
        for texts in text_batches(documents):
            for ids in encode(texts):
                written = append(stream, ids, written, limit)
            progress(written, limit)
            if limit is not None and written >= limit:
                break
    return written


def split_by_document(documents: Dataset, valid_tokens: int, count: Callable[[str], int]) -> tuple[Dataset, Dataset]:
    """Train and held-out documents: whole ones in the order of a hash of their text, until `valid_tokens` are held
    out or a tenth of the text; at least one where there are two."""
    order = sorted(range(len(documents)), key=lambda i: hashlib.sha256((documents[i]["text"] or "").encode()).digest())
    largest = _LARGEST_HELD_OUT_SHARE * sum(len(text or "") for batch in _columns(documents) for text in batch)
    held, tokens, characters = set(), 0, 0
    for index in order:
        text = documents[index]["text"] or ""
        if len(documents) < 2 or (held and (tokens >= valid_tokens or characters + len(text) > largest)):
            break
        held.add(index)
        tokens, characters = tokens + count(text), characters + len(text)
    rest = [i for i in range(len(documents)) if i not in held]
    return documents.select(rest), documents.select(sorted(held))


def _columns(documents: Dataset) -> Iterable[list[str]]:
    for start in range(0, len(documents), BATCH):
        yield documents[start : start + BATCH]["text"]
