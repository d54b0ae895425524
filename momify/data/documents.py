"""Text in: the built-in corpus, local txt, jsonl or parquet files, or a hub dataset that streams in; documents out."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.utils import logging as datasets_logging
from pyarrow import ArrowInvalid

from momify.data.hub import HubStream, find_on_hub
from momify.data.stream import text_batches
from momify.demo import corpus
from momify.errors import MomifyError
from momify.files import sha256_of_files
from momify.recipe_blocks import DataBlock

BUILTIN = "builtin:demo"
SEPARATOR = "<|endoftext|>"
LINES_WITHOUT_SEPARATOR = 1000  # a file without separators is cut into documents of so many lines
LEARNED_FROM = 100_000  # documents of a stream that a tokenizer is learned from
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


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
    paths = [Path(name) for name in names]
    if all(path.exists() for path in paths):
        return *_local(paths, column), sha256_of_files(paths)
    if len(names) == 1 and paths[0].suffix not in _READERS and len(paths[0].parts) <= 2:
        stream = find_on_hub(names[0], column)
        return stream, None, stream.sha256
    missing = next(name for name, path in zip(names, paths, strict=True) if not path.exists())
    raise MomifyError(f"data file {missing} does not exist; give txt, jsonl or parquet files, or {BUILTIN}")


def _builtin() -> tuple[Dataset, Dataset, str]:
    found = corpus.documents()
    digest = hashlib.sha256("\0".join(d.name + "\0" + d.text for d in found).encode()).hexdigest()
    train = Dataset.from_dict({"text": [d.text for d in found if not d.held_out]})
    return train, Dataset.from_dict({"text": [d.text for d in found if d.held_out]}), digest


def _local(paths: list[Path], column: str) -> tuple[Dataset, None]:
    kinds = {_READERS.get(path.suffix, "") for path in paths}
    if len(kinds) != 1 or "" in kinds:
        raise MomifyError(f"data files {', '.join(map(str, paths))}: give files of one kind, .txt, .jsonl or .parquet")
    folder = next((path for path in paths if not path.is_file()), None)
    if folder:
        raise MomifyError(f"{folder} is not a file; give txt, jsonl or parquet files")
    kind = kinds.pop()
    names = [str(path) for path in paths]
    if kind == "text":
        # The hash in the arguments makes the cache of `from_generator` notice a changed file.
        arguments = {"paths": names, "sha256": sha256_of_files(paths)}
        return _generate(names, lambda: Dataset.from_generator(_txt_documents, gen_kwargs=arguments)), None
    literal = [escape(str(path.absolute())) for path in paths]  # else a name with [ in it would be a pattern
    data = _generate(names, lambda: load_dataset(kind, data_files=literal, split="train"))
    return _text_column(data, column, ", ".join(names)), None


def _generate(names: list[str], make: Any) -> Dataset:
    try:
        with _unheard():
            return make()
    except Exception as error:  # the readers underneath raise a dozen kinds; each means: not to be read
        reason = " ".join(str(error.__cause__ or error).split())[:150] or "it is empty"
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


def _txt_documents(paths: list[str], sha256: str) -> Iterator[dict[str, str]]:
    """Documents of txt files: between separator lines, else so many lines each; bad bytes become U+FFFD."""
    for path in paths:
        for text in _split_lines(Path(path)):
            if text.strip():
                yield {"text": text}


def _split_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as lines:
        separated = any(line.strip() == SEPARATOR for line in lines)
    with open(path, encoding="utf-8", errors="replace") as lines:
        document: list[str] = []
        for line in lines:
            at_separator = line.strip() == SEPARATOR
            if not at_separator:
                document.append(line)
            if at_separator or (not separated and len(document) == LINES_WITHOUT_SEPARATOR):
                yield "".join(document)
                document = []
        yield "".join(document)
