"""What was scored, kept as one JSON file a task: an entry is written as it is done, and used again for the same key."""

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from momify.errors import MomifyError
from momify.files import disk_errors, read_json, write_json

Key = dict[str, str | int | float | bool | None]
"""All that decides a number besides the seed: hashes of weights, tokenizer and data, and the protocol's settings."""


@dataclass(frozen=True)
class Score:
    """What one model reached on one task with one seed: metrics (the main one first) and how they were taken."""

    metrics: dict[str, float | int | None]
    protocol: str
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Entry:
    """A kept score: of which role, with which seed (None where nothing is random), under which key."""

    role: str
    seed: int | None
    key: Key
    score: Score


class Results:
    """The kept scores of one task. Raises MomifyError, naming the file, for one that momify did not write."""

    def __init__(self, path: Path, task: str) -> None:
        self.path, self.task, self.entries = path, task, read_results(path)

    def find(self, seed: int | None, key: Key) -> Score | None:
        """The score under this seed and key, if there is one, of whatever role: the weights are the same."""
        same = [entry for entry in self.entries if entry.seed == seed and entry.key == key]
        return same[-1].score if same else None

    def share(self, role: str, seed: int | None, key: Key) -> None:
        """Keep the score of another role with the same weights under `role` too, where it is not yet."""
        same = [entry for entry in self.entries if entry.seed == seed and entry.key == key]
        if same and all(entry.role != role for entry in same):
            self.add(Entry(role, seed, key, same[-1].score))

    def add(self, entry: Entry) -> None:
        """Keep one more score, on disk before this returns, beside those of another process that scores other seeds."""
        with _alone_in(self.path.parent):
            self.entries = [*read_results(self.path), entry]
            write_json(self.path, {"task": self.task, "entries": [asdict(one) for one in self.entries]})


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let other processes of this machine that write here wait; the system lets go of it however this one ends."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_results(path: Path) -> list[Entry]:
    """The kept scores, oldest first; none where there is no file. Raises MomifyError for a damaged file."""
    if not path.exists():
        return []
    try:
        return [_entry(raw) for raw in read_json(path)["entries"]]
    except (KeyError, TypeError, AttributeError):
        raise MomifyError(f"{path} is not a result file of momify eval; remove it, the scores are made again") from None


def _entry(raw: Any) -> Entry:
    """Raises TypeError, KeyError or AttributeError for what is no kept score."""
    entry = Entry(**{**raw, "score": Score(**raw["score"])})
    score, whole = entry.score, isinstance(entry.seed, int) and not isinstance(entry.seed, bool)
    texts = (entry.role, score.protocol, score.note)
    if not isinstance(entry.key, dict) or not all(isinstance(text, str) for text in texts):
        raise TypeError("not a kept score")
    if not (whole or entry.seed is None) or not score.metrics:
        raise TypeError("not a kept score")
    if not all(_is_number(value) for value in score.metrics.values() if value is not None):
        raise TypeError("not a number")
    if not _is_number(score.seconds) or not all(isinstance(name, str) for name in score.metrics):
        raise TypeError("not a number")
    return entry


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
