"""A step's batch in parts that fit into memory, weighted so that together they are the whole batch."""

from collections.abc import Mapping

from torch import Tensor


def micro_batches(batch: Mapping[str, Tensor], size: int | None) -> list[tuple[float, dict[str, Tensor]]]:
    """Parts of at most `size` blocks (None: all at once), each with its share of the blocks of the batch (B, ...).

    The last is smaller where `size` does not divide B: the last batch of a pass over the text holds what is left. All
    blocks have equally many tokens and scored labels, so the mean over the batch is that of the parts' means by share.
    """
    total = len(next(iter(batch.values())))
    starts = range(0, total, size or total)
    parts = ({name: value[at : at + (size or total)] for name, value in batch.items()} for at in starts)
    return [(len(next(iter(part.values()))) / total, part) for part in parts]
