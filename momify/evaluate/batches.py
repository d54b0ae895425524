"""Token ids of examples -> padded batches, few of whose places are padding."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from momify.errors import MomifyError

_CHUNK = 50  # batches among which examples are sorted by length

Ids = list[int]


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask (B, T), and what is to be learned: labels (B,), or targets (B, T)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that pads and ends. Raises MomifyError for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise MomifyError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Token ids of each text, without the end-of-text token, which means padding here; at least one id a text."""
    end, texts = end_of_text(tokenizer), [text.encode("utf-8", "replace").decode() for text in texts]
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    blank = [i for i in tokenizer("\n", add_special_tokens=False)["input_ids"] if i != end]
    rows = [[i for i in row if i != end] or blank for row in rows]
    if not all(rows):
        raise MomifyError("the tokenizer gives no tokens for a line feed; use the model's own byte-level tokenizer")
    return rows


def check_vocabulary(rows: Sequence[Ids], entries: int) -> None:
    """Raise MomifyError for ids that a model of so many entries does not know: an index error deep inside otherwise."""
    highest = max((max(row) for row in rows), default=0)
    if highest >= entries:
        raise MomifyError(
            f"token id {highest} does not fit the model's {entries} entries: use the model's own tokenizer"
        )


def join(first: Ids, middle: Ids, second: Ids, most: int) -> Ids:
    """`first` + `middle` + `second` in at most `most` ids: the longer of both loses its end until it fits."""
    room = most - len(middle)
    half = room // 2
    keep_first = min(len(first), max(half, room - len(second)))
    return [*first[:keep_first], *middle, *second[: room - keep_first]]


def shuffled(lengths: Sequence[int], size: int, seed: str) -> list[list[int]]:
    """Places in batches of `size`, shuffled, but of similar length: sorted within chunks of the shuffled order."""
    draw, order = random.Random(seed), list(range(len(lengths)))
    draw.shuffle(order)
    batches = []
    for start in range(0, len(order), _CHUNK * size):
        chunk = sorted(order[start : start + _CHUNK * size], key=lengths.__getitem__)
        batches += [chunk[at : at + size] for at in range(0, len(chunk), size)]
    draw.shuffle(batches)
    return batches


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """All places in batches of `size`, the longest first: what does not fit into memory shows at once."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[at : at + size] for at in range(0, len(order), size)]


def pad(rows: Sequence[Ids], filler: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (B, T) int64; padding on the right, or on the left for text that is to go on."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), filler)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[place, where] = torch.tensor(row)
        mask[place, where] = 1
    return ids, mask
