"""Rows of a dataset on the hub, for who gives no folder."""

from typing import Any

from momify.errors import MomifyError


def hub_rows(name: str, configuration: str | None, split: str, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """The named columns of each row of a split. Raises MomifyError, with the way around, for what is not to be had."""
    from datasets import load_dataset

    try:
        data = load_dataset(name, configuration, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds; each means: not to be had
        reason = " ".join(str(error).split())[:120]
        asked = " ".join(filter(None, (name, configuration, split)))
        raise MomifyError(
            f"the hub did not give {asked} ({reason}); give a local copy with --data-dir FOLDER"
        ) from None
    absent = [column for column in columns if column not in data.column_names]
    if absent:
        raise MomifyError(f"{name} {split} on the hub has no column {absent[0]!r}; give a local copy with --data-dir")
    return list(zip(*(data[column] for column in columns), strict=True))
