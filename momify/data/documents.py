"""Text in: the built-in corpus, local txt, jsonl or parquet files, or a hub dataset that streams in; documents out."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import datasets.config
from datasets import Dataset, load_dataset
from datasets.utils import logging as datasets_logging
from pyarrow import ArrowInvalid

from momify.data.hub import HubStream, find_on_hub
from momify.data.stream import BATCH, text_batches
from momify.demo import corpus
from momify.errors import MomifyError
from momify.files import sha256_of_files
from momify.recipe_blocks import DataBlock

BUILTIN = "builtin:demo"
SEPARATOR = "<|endoftext|>"
LINES_WITHOUT_SEPARATOR = 1000  # a file without separators is cut into documents of so many lines
MOST_CHARACTERS = 1_000_000  # with so many a document of a txt file ends, at the next end of a line
LEARNED_FROM = 100_000  # documents of a stream that a tokenizer is learned from
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_DISK_IS_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class Corpus:
    """Documents (column `text`) to train on and, where the split is given, to measure on; hash of the content."""

    train: Dataset | HubStream
    valid: Dataset | HubStream | None
    sha256: str

    def texts(self) -> Iterator[str]:
        """What a tokenizer is learned from: the training documents, of a stream the first that are not empty.

        Raises MomifyError where the stream breaks off.
        """
        if not isinstance(self.train, HubStream):
            return (row["text"] or "" for row in self.train)
        return islice(chain.from_iterable(text_batches(self.train.open())), LEARNED_FROM)


def read_corpus(data: DataBlock) -> Corpus:
    """The documents that a recipe's data block names.

    Raises MomifyError for a missing, empty or unreadable file, a missing column, or an unreachable hub dataset.
    """
    train, valid, digest = _read(data.train, data.column)
    if data.valid:
        first, held_out, valid_digest = _read(data.valid, data.column)
        valid = first if held_out is None else held_out  # of text that splits itself, what is held out
        digest = hashlib.sha256(f"{digest} {valid_digest}".encode()).hexdigest()
    return Corpus(train, valid, digest)


def _read(names: list[str], column: str) -> tuple[Dataset | HubStream, Dataset | None, str]:
    """Train documents, the held-out ones where the source splits itself, and a hash of the content."""
    if names == [BUILTIN]:
        return _builtin()
    if not names:
        raise MomifyError(f"data.train is an empty list; give txt, jsonl or parquet files, or {BUILTIN}")
    paths = [Path(name) for name in names]
    missing = [name for name in names if not os.path.exists(name)]  # Path.exists raises for a name that is too long
    if not missing:
        return _local(paths, column)
    if len(names) == 1 and paths[0].suffix not in _READERS and len(paths[0].parts) <= 2:
        stream = find_on_hub(names[0], column)
        return stream, None, stream.sha256
    raise MomifyError(
        f"data file {missing[0]} does not exist, or its folder may not be read; give txt, jsonl or parquet files, or "
        f"{BUILTIN}"
    )


def _builtin() -> tuple[Dataset, Dataset, str]:
    found = corpus.documents()
    digest = hashlib.sha256("\0".join(d.name + "\0" + d.text for d in found).encode()).hexdigest()
    train = Dataset.from_dict({"text": [d.text for d in found if not d.held_out]})
    return train, Dataset.from_dict({"text": [d.text for d in found if d.held_out]}), digest


def _local(paths: list[Path], column: str) -> tuple[Dataset, None, str]:
    kinds = {_READERS.get(path.suffix, "") for path in paths}
    if len(kinds) != 1 or "" in kinds:
        raise MomifyError(f"data files {', '.join(map(str, paths))}: give files of one kind, .txt, .jsonl or .parquet")
    folder = next((path for path in paths if not path.is_file()), None)
    if folder:
        raise MomifyError(f"{folder} is not a file; give txt, jsonl or parquet files")
    kind, digest = kinds.pop(), sha256_of_files(paths)
    names = [str(path) for path in paths]
    if kind == "text":
        # The cache of `from_generator` goes by the arguments: the hash makes it notice a changed file.
        arguments = {"paths": names, "most": MOST_CHARACTERS, "sha256": digest}
        make = partial(Dataset.from_generator, _txt_documents, gen_kwargs=arguments, writer_batch_size=BATCH)
        return _generate(names, make), None, digest
    literal = [escape(str(path.absolute())) for path in paths]  # else a name with [ in it would be a pattern
    data = _generate(names, lambda: load_dataset(kind, data_files=literal, split="train"))
    return _text_column(data, column, ", ".join(names)), None, digest


def _generate(names: list[str], make: Any) -> Dataset:
    try:
        with _unheard():
            return make()
    except Exception as error:  # the readers underneath raise a dozen kinds; each means: not to be read
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _DISK_IS_FULL:
            raise MomifyError(
                f"cannot write {datasets.config.HF_DATASETS_CACHE}: {cause.strerror}; free space or set "
                "HF_DATASETS_CACHE to another folder"
            ) from None
        reason = " ".join(str(cause).split())[:150] or "it is empty"
        raise MomifyError(f"data file {', '.join(names)} holds no documents or cannot be read: {reason}") from None


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep the readers underneath quiet: they log what they then raise, which momify says in a line of its own."""
    before = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(before)


def _text_column(data: Dataset, column: str, name: str) -> Dataset:
    if column not in data.column_names:
        known = ", ".join(map(_shown, data.column_names[:20]))
        raise MomifyError(f"{name} has no column '{column}'; set data.column to one of {known}")
    kind = getattr(data.features[column], "dtype", type(data.features[column]).__name__)
    if kind not in ("string", "large_string"):
        raise MomifyError(f"{name}: column '{column}' holds {kind}, not text")
    try:
        data.data.column(column).validate(full=True)  # the readers take any bytes between quotes for text
    except ArrowInvalid as error:
        raise MomifyError(f"{name}: column '{column}' is not UTF-8 ({str(error)[:150]}); convert the file") from None
    return (
        data.select_columns([column]).rename_column(column, "text")
        if column != "text"
        else data.select_columns(["text"])
    )


def _shown(name: str) -> str:
    return name[:40] if name.isprintable() else repr(name)[:40]


def _txt_documents(paths: list[str], most: int, sha256: str) -> Iterator[dict[str, str]]:
    """Documents of txt files: between separator lines, else so many lines each, none with twice `most` characters or
    more; bad bytes become U+FFFD."""
    for path in paths:
        for text in _split_lines(Path(path), most):
            if text.strip():
                yield {"text": text}


def _split_lines(path: Path, most: int) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as stream:
        separated = any(line.strip() == SEPARATOR for line in _lines(stream, most))
    with open(path, encoding="utf-8", errors="replace") as stream:
        document: list[str] = []
        characters = 0
        for line in _lines(stream, most):
            at_separator = line.strip() == SEPARATOR
            if not at_separator:
                document.append(line)
                characters += len(line)
            if at_separator or characters >= most or (not separated and len(document) == LINES_WITHOUT_SEPARATOR):
                yield "".join(document)
                document, characters = [], 0
        yield "".join(document)


def _lines(stream: TextIO, most: int) -> Iterator[str]:
    """The lines of a file; of one with more than `most` characters, pieces of so many."""
    return iter(partial(stream.readline, most), "")
