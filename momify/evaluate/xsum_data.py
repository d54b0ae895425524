"""XSUM's documents and summaries, from jsonl, csv or parquet files or from the hub."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momify.errors import MomifyError
from momify.evaluate.hub import hub_rows
from momify.evaluate.split import Split
from momify.evaluate.tsv import decode, read_bytes, shown

HUB = "EdinburghNLP/xsum"
COLUMNS = ("document", "summary")
KINDS = (".jsonl", ".csv", ".parquet")
_LONGEST_CELL = 1 << 24  # characters; csv's own limit of 128 K is below some documents


@dataclass(frozen=True)
class Pair:
    """A document and what sums it up."""

    document: str
    summary: str


@dataclass(frozen=True)
class XsumData:
    """Pairs to train on and pairs to score on; `split` names the latter."""

    train: Split[Pair]
    scored: Split[Pair]
    split: str

    @property
    def sha256(self) -> str:
        """Hash of every document and summary, in order."""
        digest = hashlib.sha256()
        for split in (self.train, self.scored):
            for pair in split.examples:
                digest.update(repr((pair.document, pair.summary)).encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
        return digest.hexdigest()

    @property
    def limited(self) -> bool:
        """Whether a part of the data was left out."""
        return self.train.limited or self.scored.limited


def read_xsum(folder: Path | None, limit: int | None = None, train_limit: int | None = None) -> XsumData:
    """XSUM from `folder` (FOLDER/xsum or FOLDER; train and test, or validation where there is no test); None: the hub.

    `limit`: at most so many pairs a split; `train_limit`: of the training split. Raises MomifyError, naming the file
    (and the line), for a missing file or column, an empty text, and what cannot be read.
    """
    if folder is None:
        train, scored, split = _from_hub("train"), _from_hub("test"), "test"
    else:
        place = folder / "xsum" if (folder / "xsum").is_dir() else folder
        train = _from_file(_need(place, ("train",)))
        path = _need(place, ("test", "validation"))
        scored, split = _from_file(path), path.stem
    return XsumData(train.limit(train_limit or limit), scored.limit(limit), split)


def _need(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of the files `names` that is there, in any of the known kinds."""
    for name in names:
        for kind in KINDS:
            if (folder / f"{name}{kind}").is_file():
                return folder / f"{name}{kind}"
    raise MomifyError(
        f"xsum: {folder / names[0]}.jsonl does not exist, nor as csv or parquet; --data-dir must hold "
        "xsum/train and xsum/test with the columns document and summary"
    )


def _from_file(path: Path) -> Split[Pair]:
    read = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix]
    pairs = tuple(_pair(path, number, row) for number, row in read(path))
    if not pairs:
        raise MomifyError(f"{path} holds no pairs; give a file with the columns document and summary")
    return Split(pairs, len(pairs))


def _pair(origin: object, number: int, row: dict[str, Any]) -> Pair:
    """A pair of a row; the row's place stands in the errors."""
    for column in COLUMNS:
        if column not in row:
            known = ", ".join(shown(str(name)) for name in list(row)[:20]) or "none"
            raise MomifyError(f"{origin} line {number} has no column {column!r}; it has: {known}")
        if not isinstance(row[column], str) or not row[column].strip():
            kinds = {str: "empty", type(None): "missing"}
            kind = kinds.get(type(row[column]), f"a {type(row[column]).__name__}")
            raise MomifyError(f"{origin} line {number}: {column} is {kind}; give a text, or drop the row")
    return Pair(row["document"], row["summary"])


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(decode(read_bytes(path), path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise MomifyError(f"{path} line {number} is not JSON ({reason}); give one object a line") from None
        if not isinstance(row, dict):
            raise MomifyError(f"{path} line {number} holds a {type(row).__name__}; give one object a line")
        yield number, row


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(decode(read_bytes(path), path), newline=""), strict=True)
    before = csv.field_size_limit(_LONGEST_CELL)  # the whole process's
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise MomifyError(f'{path} line {reader.line_num} is not CSV ({error}); quote texts by "') from None
    finally:
        csv.field_size_limit(before)
    for number, row in rows:
        if None in row:  # what stands beyond the last column
            raise MomifyError(
                f"{path} line {number} has {len(row) - 1 + len(row[None])} columns instead of {len(row) - 1}; "
                'quote texts by "'
            )
        yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises a dozen kinds; each means: not to be read
        reason = " ".join(str(error).split())[:100]
        raise MomifyError(f"{path} is not a parquet file that can be read ({reason}); write it anew") from None
    yield from enumerate(rows, 1)


def _from_hub(split: str) -> Split[Pair]:
    rows = hub_rows(HUB, None, split, COLUMNS)
    pairs = [
        _pair(f"{HUB} {split}", number, dict(zip(COLUMNS, row, strict=True)))
        for number, row in enumerate(rows, 1)
        if all(isinstance(text, str) and text.strip() for text in row)  # a few published documents are empty
    ]
    if not pairs:
        raise MomifyError(f"{HUB} {split} holds no pairs; give a local copy with --data-dir")
    return Split(tuple(pairs), len(pairs))
