"""A cache layer that remembers which keys may be seen, for steps whose skipping tokens are masked."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class KeyedLayer(DynamicLayer):
    """Keys and values of one slot together with `keep` (B, S): False hides a key, now and in later calls."""

    keep: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Tensor, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, N, T, D/N); the one further argument is their keep (B, T) bool."""
        (keep,) = args
        self.keep = keep if self.keep is None else torch.cat([self.keep, keep], dim=1)
        return super().update(key_states, value_states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of the batch into the order of the beams."""
        super().reorder_cache(beam_idx)
        if self.keep is not None:
            self.keep = self.keep.index_select(0, beam_idx.to(self.keep.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.keep is not None:
            self.keep = self.keep.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)
        if self.keep is not None:
            self.keep = self.keep[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; their number is given as a negative number."""
        super().crop(tokens_to_remove)
        if self.keep is not None and tokens_to_remove < 0:
            self.keep = self.keep[:, :tokens_to_remove]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.keep = None


def count_tokens(cache: Cache, embeds: Tensor) -> None:
    """Mark the tokens in slot 0, one number each, of a model without attention: the length stays known."""
    mark = embeds.new_zeros(embeds.shape[0], 1, embeds.shape[1], 1)
    cache.update(mark, mark, 0)


def keyed_layer(cache: Cache, slot: int) -> KeyedLayer:
    """The layer of `slot`, which remembers hidden keys from here on; it replaces an empty dynamic layer.

    Raises ValueError for a cache of another type: it would let later tokens see keys that are masked.
    """
    while len(cache.layers) <= slot and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[slot]
    if type(layer) is DynamicLayer and not layer.is_initialized:
        layer = cache.layers[slot] = KeyedLayer()
    if not isinstance(layer, KeyedLayer):
        raise ValueError(
            f"past_key_values has a {type(layer).__name__} in slot {slot}, which cannot remember that tokens "
            "which skip are masked; pass an empty DynamicCache or none at all"
        )
    return layer
