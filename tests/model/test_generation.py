"""Decoding with a cache: step by step equals all at once, and generate gives the uncached text."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from momify.model.cache import KeyedLayer, RoomyLayer
from momify.model.outputs import CACHE

KINDS: list[dict[str, Any]] = [
    {},
    {"skipped_keys": "masked"},
    {"mha_homes": [3, 0, 3, 1]},
    {"modules_per_token": 2},
    {"mha_reach": [[3], [0, 1, 3], [2], [3]], "mha_homes": [3, 3, 2, 3], "ffn_reach": [[0], [1, 4], [4], [2]],
     "ffn_homes": [0, 4, 4, 2]},
    {"mha_reach": [[3]] * 4, "mha_homes": [3] * 4},
    {"mha_reach": [[3], [0, 1, 3], [2], [2]], "mha_homes": [3, 3, 2, 2], "ffn_reach": [[0], [1, 4], [4], [0]],
     "ffn_homes": [0, 4, 4, 0], "patch_rank": 3, "step_rank": 2},
]  # fmt: skip
SEEDS = range(4)


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of different length, padded on the left with token 0, and their mask."""
    ids = ids.clone()
    ids[0, :3] = 0
    ids[1, :1] = 0
    return ids, (ids != 0).long()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", KINDS, ids=str)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(make_mom, token_ids, changes, implementation) -> None:
    model = make_mom(**changes).double()
    model.set_attn_implementation(implementation)
    ids, mask = padded(token_ids)
    for given in (None, mask):
        full = model(ids, attention_mask=given).logits
        cache, parts, start = None, [], 0
        for size in (4, 1, 2, 1, 1, 2):
            seen = None if given is None else given[:, : start + size]
            piece = ids[:, start : start + size]
            out = model(piece, attention_mask=seen, **{CACHE: cache}, use_cache=True)
            cache, start = getattr(out, CACHE), start + size
            parts.append(out.logits)
            assert cache.get_seq_length() == start
        real = mask.bool() if given is not None else torch.ones_like(mask).bool()
        assert (torch.cat(parts, 1) - full)[real].abs().max() < 1e-9


@torch.no_grad()
def test_cache_has_a_slot_only_where_attention_may_run(make_mom, token_ids) -> None:
    model = make_mom(mha_reach=[[3], [0], [3], [1, 3]], mha_homes=[3, 0, 3, 3])
    cache = getattr(model(token_ids, use_cache=True), CACHE)
    assert [layer.keys.shape for layer in cache.layers] == [(3, 4, 11, 8)] * 2
    assert [type(layer) is KeyedLayer for layer in cache.layers] == [False, True]
    skips = model(token_ids, output_router_logits=True).routing[-2]
    assert skips.step == 3
    assert torch.equal(cache.layers[1].keep, (skips.modules != 3).reshape(3, 11))
    nothing = getattr(make_mom(mha_reach=[[3]] * 4, mha_homes=[3] * 4)(token_ids, use_cache=True), CACHE)
    assert sum(layer.keys.numel() for layer in nothing.layers) == 33, "one number a token, to know the length"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize(
    "way",
    [{}, {"do_sample": True, "temperature": 1.5}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=str,
)
def test_generate_with_cache_equals_without(make_mom, token_ids, changes, seed, way) -> None:
    model = make_mom(seed=seed, **changes)
    ids, mask = padded(token_ids)
    texts = []
    for use_cache in (True, False, True):
        torch.manual_seed(seed)
        settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "use_cache": use_cache}
        texts.append(model.generate(ids, attention_mask=mask, **{**settings, **way}))
    assert texts[0].shape[1] > ids.shape[1]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("changes", KINDS[:2], ids=str)
def test_padded_rows_generate_what_they_would_alone(make_mom, token_ids, changes) -> None:
    model = make_mom(**changes)
    ids, mask = padded(token_ids)
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)
    alone = model.generate(token_ids[:1, 3:], **settings)
    assert torch.equal(together[0, 11 : 11 + alone.shape[1] - 8], alone[0, 8:])


def test_beams_notice_a_cache_that_forgets_to_reorder_its_masks(make_mom, token_ids, monkeypatch) -> None:
    """The beam comparison above can fail: without KeyedLayer's own reordering some text comes out different."""
    monkeypatch.delattr(KeyedLayer, "reorder_cache")
    settings = {"do_sample": False, "num_beams": 3, "max_new_tokens": 12, "pad_token_id": 0}
    differ = 0
    for seed in range(8):
        model = make_mom(seed=seed, mha_homes=[3, 3, 3, 3])
        right = model.generate(token_ids, use_cache=False, **settings)
        differ += not torch.equal(model.generate(token_ids, **settings), right)
    assert differ > 0


@pytest.mark.parametrize("changes", KINDS[:3], ids=str)
def test_prompt_lookup_which_crops_the_cache_gives_the_greedy_text(make_mom, changes) -> None:
    model = make_mom(**changes)
    ids = torch.tensor([[5, 9, 5, 9, 5, 9, 5]])
    settings = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}
    looked_up = model.generate(ids, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(looked_up, model.generate(ids, **settings))


def test_generate_reads_the_prompt_once_and_copies_no_cache(make_mom, token_ids) -> None:
    model = make_mom()
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(token_ids, return_dict_in_generate=True, **settings)
    assert seen == [11, 1, 1, 1, 1, 1]
    assert {type(layer) for layer in getattr(out, CACHE).layers} == {RoomyLayer}
    assert {layer.get_seq_length() for layer in getattr(out, CACHE).layers} == {16}


@torch.no_grad()
def test_caches_of_other_kinds(make_mom, token_ids) -> None:
    kept = make_mom().double()
    full = kept(token_ids).logits
    for cache in (DynamicCache(), DynamicCache(config=kept.config), StaticCache(kept.config, max_cache_len=16)):
        first = kept(token_ids[:, :6], **{CACHE: cache}).logits
        mask = torch.ones(3, 11, dtype=torch.long)
        second = kept(token_ids[:, 6:], attention_mask=mask, **{CACHE: cache}).logits
        assert (torch.cat([first, second], 1) - full).abs().max() < 1e-9
    masked = make_mom(skipped_keys="masked")
    for cache in (DynamicCache(), DynamicCache(config=masked.config)):
        masked(token_ids[:, :6], **{CACHE: cache})
        second = masked(token_ids[:, 6:], **{CACHE: cache}).logits
        assert (second - masked(token_ids).logits[:, 6:]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="StaticLayer in slot 0"):
        masked(token_ids, **{CACHE: StaticCache(masked.config, max_cache_len=16)})


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.no_grad()
def test_the_cache_is_taken_by_either_name_that_transformers_had_for_it(make_mom, token_ids, name):
    model = make_mom()
    first = model(token_ids[:, :7], use_cache=True)
    later = model(token_ids[:, 7:], **{name: getattr(first, CACHE)}).logits
    torch.testing.assert_close(later, model(token_ids).logits[:, 7:], rtol=1e-4, atol=1e-5)
    assert CACHE in first  # as generate looks for it
