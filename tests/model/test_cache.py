"""The cache layer that remembers hidden keys: every way in which transformers changes a cache."""

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from momify.model.cache import KeyedLayer, RoomyLayer, roomy_layer


@pytest.fixture
def layer() -> KeyedLayer:
    """Two rows of five tokens in two calls; a key's first number tells its row and place, as keep does."""
    made = KeyedLayer()
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]]).bool()
    for part in (slice(0, 3), slice(3, 5)):
        made.update(*numbered(keep[:, part]), keep[:, part])
    return made


def numbered(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, 2, T, 4) that repeat keep, so that the two cannot part unnoticed."""
    states = keep.float()[:, None, :, None].expand(-1, 2, -1, 4)
    return states, -states


def together(layer: KeyedLayer) -> Tensor:
    """keep, after checking that keys and values still say the same."""
    assert torch.equal(layer.keys[:, 0, :, 0].bool(), layer.keep)
    assert torch.equal(layer.values, -layer.keys)
    return layer.keep.int()


def test_update_appends(layer) -> None:
    assert together(layer).tolist() == [[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]]
    assert layer.get_seq_length() == 5


def test_rows_are_reordered_repeated_and_selected(layer) -> None:
    layer.reorder_cache(torch.tensor([1, 1]))
    assert together(layer).tolist() == [[0, 1, 1, 0, 1]] * 2
    layer.keep, layer.keys = layer.keep.clone(), layer.keys.clone()
    layer.batch_repeat_interleave(2)
    assert together(layer).shape == (4, 5)
    layer.batch_select_indices(torch.tensor([0, 2, 3]))
    assert together(layer).shape == (3, 5)


def test_repeating_keeps_rows_side_by_side(layer) -> None:
    layer.batch_repeat_interleave(2)
    assert together(layer)[:, 0].tolist() == [1, 1, 0, 0]
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert together(layer)[:, 0].tolist() == [0, 1]


def test_crop_drops_the_last_tokens(layer) -> None:
    layer.crop(0)
    assert together(layer).shape == (2, 5)
    layer.crop(-2)
    assert together(layer).tolist() == [[1, 0, 1], [0, 1, 1]]


def test_reset_forgets(layer) -> None:
    layer.reset()
    assert layer.get_seq_length() == 0
    keep = torch.tensor([[True]])
    layer.update(*numbered(keep), keep)
    assert together(layer).tolist() == [[1]]


def test_tokens_are_written_into_room_and_not_copied_each_time() -> None:
    layer, right = RoomyLayer(), DynamicLayer()
    places = set()
    for length in (5, *[1] * 40, 3):
        new = torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 4)
        for ours, theirs in zip(layer.update(*new), right.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        places.add(layer.keys.data_ptr())
    assert layer.get_seq_length() == 48
    assert len(places) == 2, "the prompt's own place, and the buffer"
    layer.crop(-2)
    right.crop(-2)
    order = torch.tensor([1, 1])
    for each in (layer, right):
        each.reorder_cache(order)
        each.update(*(torch.ones(2, 3, 200, 4),) * 2)  # more than there is room for
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([0, 3]))
        each.update(*(torch.zeros(2, 3, 1, 4),) * 2)
    assert torch.equal(layer.keys, right.keys)
    assert torch.equal(layer.values, right.values)
    assert layer.keys.shape == (2, 3, 247, 4)


def test_a_cache_that_carries_gradients_is_joined_and_not_overwritten() -> None:
    parts = [torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(4)]
    layer = RoomyLayer()
    products = [layer.update(part, part)[0].square().sum() for part in parts]
    sum(products).backward()
    for at, part in enumerate(parts):
        torch.testing.assert_close(part.grad, 2 * part.detach() * (4 - at))


def test_an_empty_dynamic_layer_is_replaced_a_full_one_refused() -> None:
    cache = DynamicCache()
    assert type(roomy_layer(DynamicCache(), 0, keyed=False)) is RoomyLayer
    assert isinstance(roomy_layer(cache, 2, keyed=True), KeyedLayer)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, DynamicLayer, KeyedLayer]
    assert roomy_layer(cache, 2, keyed=True) is cache.layers[2]
    full = Cache(layers=[DynamicLayer()])
    full.update(*numbered(torch.ones(1, 2)), 0)
    with pytest.raises(ValueError, match="DynamicLayer in slot 0"):
        roomy_layer(full, 0, keyed=True)
