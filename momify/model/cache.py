"""Cache layers with room to grow, one of which remembers which keys may be seen."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 128
"""Room for further tokens that is made at once."""


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room for the tokens to come, of which `keys` and `values` are the filled part.

    A DynamicLayer copies the whole cache for each token. Here a token is written into its place, and the cache is
    copied once in ROOM tokens: doubling it would copy less, and hold twice the memory that skipped steps save. The
    first call makes no room: a prompt alone needs none.
    """

    _buffers: tuple[Tensor, Tensor] | None = None  # (B, N, room, D/N) each; None while there is no room

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, N, T, D/N); returns all of them, (B, N, S, D/N)."""
        if self.get_seq_length() == 0:
            self.lazy_initialization(key_states, value_states)
            # copied, since they look into a wider tensor of queries, keys and values
            self.keys, self.values = (
                part.clone(memory_format=torch.contiguous_format) for part in (key_states, value_states)
            )
            self._buffers = None
        elif torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            self._buffers = None  # autograd needs the earlier values as they are
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        else:
            self._append(key_states, value_states)
        return self.keys, self.values

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        past = self.keys.shape[2]
        length = past + key_states.shape[2]
        if self._buffers is None or self._buffers[0].shape[2] < length:
            self._buffers = _with_room(self.keys, length), _with_room(self.values, length)
        keys, values = self._buffers
        keys[:, :, past:length] = key_states
        values[:, :, past:length] = value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of the batch into the order of the beams, in place where there is room."""
        if self._buffers is None:
            super().reorder_cache(beam_idx)
        elif self.get_seq_length() > 0:
            index = beam_idx.to(self.keys.device)
            self.keys.copy_(self.keys.index_select(0, index))
            self.values.copy_(self.values.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)
        self._buffers = None

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None  # older transformers only fill them with zeros
        self.is_initialized = False
        super().reset()
        self._buffers = None


def _with_room(states: Tensor, length: int) -> Tensor:
    """A buffer with ROOM beyond `length`, and `states` (B, N, S, D/N) at its beginning."""
    batch, heads, past, size = states.shape
    buffer = states.new_empty(batch, heads, length + ROOM, size)
    buffer[:, :, :past] = states
    return buffer


class KeyedLayer(RoomyLayer):
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


def roomy_layer(cache: Cache, slot: int, keyed: bool) -> DynamicLayer:
    """The layer of `slot`; an empty dynamic layer is replaced by one with room, `keyed` by one that hides keys too.

    Raises ValueError if it must hide keys and is of another type: later tokens would see what is masked.
    """
    while len(cache.layers) <= slot and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[slot]
    if type(layer) is DynamicLayer and not layer.is_initialized:
        layer = cache.layers[slot] = KeyedLayer() if keyed else RoomyLayer()
    if keyed and not isinstance(layer, KeyedLayer):
        raise ValueError(
            f"past_key_values has a {type(layer).__name__} in slot {slot}, which cannot remember that tokens "
            "which skip are masked; pass an empty DynamicCache or none at all"
        )
    return layer
