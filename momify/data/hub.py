"""A dataset of the hub, read as it streams in: nothing but a batch of it is ever in memory or on this disk."""

import hashlib
import os
from dataclasses import dataclass

from datasets import IterableDataset, load_dataset

from momify.data.cache import cache_folder
from momify.errors import MomifyError
from momify.files import read_json, write_json


@dataclass(frozen=True)
class HubStream:
    """The train split of a hub dataset at one revision, and the column that holds its text."""

    name: str
    revision: str
    column: str

    @property
    def sha256(self) -> str:
        """A hash that stands for the content: a revision of the hub never changes."""
        return hashlib.sha256(f"{self.name} {self.revision}".encode()).hexdigest()

    def open(self) -> IterableDataset:
        """Its documents from the first on, as column `text`. Raises MomifyError where the hub does not give them."""
        try:
            data = load_dataset(self.name, revision=self.revision, split="train", streaming=True)
            first = {} if data.features else next(iter(data), {})
        except Exception as error:  # the hub client raises a dozen kinds; each means: not to be had
            raise _not_given(self.name, error) from None
        _check_column(self, {name: getattr(kind, "dtype", "") for name, kind in (data.features or {}).items()}, first)
        data = data.select_columns([self.column])
        return data if self.column == "text" else data.rename_column(self.column, "text")


def _check_column(stream: HubStream, kinds: dict[str, str], first: dict[str, object]) -> None:
    """Raise MomifyError unless the column is there and holds text; by its first row where nothing describes it."""
    kinds = kinds or {name: "string" if isinstance(value, str) else "" for name, value in first.items()}
    if stream.column not in kinds:
        known = ", ".join(name[:40] for name in list(kinds)[:20])
        raise MomifyError(f"{stream.name} has no column '{stream.column}'; set data.column to one of {known}")
    if kinds[stream.column] not in ("string", "large_string"):
        raise MomifyError(f"{stream.name}: column '{stream.column}' holds {kinds[stream.column] or 'values'}, not text")


def find_on_hub(name: str, column: str) -> HubStream:
    """The dataset as the hub has it now; without a network, as it was when last asked for.

    Raises MomifyError where neither is known.
    """
    from huggingface_hub import HfApi

    known = cache_folder() / "hub" / f"{name.replace('/', '--')}.json"
    try:
        revision = HfApi().dataset_info(name).sha
    except Exception as error:  # no network, no such name, no access
        if not os.path.exists(known):  # Path.exists raises for a name that is too long
            raise _not_given(name, error) from None
        return HubStream(name, str(read_json(known)["revision"]), column)
    write_json(known, {"revision": revision})
    return HubStream(name, revision, column)


def _not_given(name: str, error: Exception) -> MomifyError:
    reason = " ".join(str(error).split())[:150]
    return MomifyError(
        f"data {name} is neither a file here nor a dataset that the hub gave ({reason}); check the path, "
        "or give txt, jsonl or parquet files"
    )
