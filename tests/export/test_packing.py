"""Packing half-steps into GPT-2 layers: in order, none lost, and as few layers as an exhaustive search finds."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momify.errors import MomifyError
from momify.export.packing import fixed_halves, is_patch, pack
from momify.model import MomConfig

SIZES: dict = {
    "vocab_size": 40, "n_positions": 16, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
    "num_mha_modules": 2, "num_ffn_modules": 2,
}  # fmt: skip


def fixed(mha: list[int], ffn: list[int], **changes: object) -> MomConfig:
    """A MoM whose step s runs mha[s] and ffn[s]; 2 is SKIP."""
    tables = {"mha_homes": mha, "ffn_homes": ffn, "mha_reach": [[m] for m in mha], "ffn_reach": [[f] for f in ffn]}
    return MomConfig(**{**SIZES, "num_steps": len(mha), **tables, **changes})


@cache
def fewest(kinds: str) -> int:
    """Layers for a word of a (attention) and f (feed-forward), each layer being af, a or f: all ways tried."""
    starts = [word for word in ("af", "a", "f") if kinds.startswith(word)]
    return min((1 + fewest(kinds[len(word) :]) for word in starts), default=0)


choices = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=8)


@given(choices, st.integers(0, 2))
def test_order_is_kept_and_no_way_needs_fewer_layers(steps: list[tuple[int, int]], patch_rank: int) -> None:
    config = fixed([m for m, _ in steps], [f for _, f in steps], patch_rank=patch_rank)
    halves = fixed_halves(config)
    layers = pack(halves)
    assert [half for layer in layers for half in layer.halves] == list(halves)
    ran = [(m, kind) for step in steps for m, kind in zip(step, "af", strict=True) if m < 2 or patch_rank]
    assert len(halves) == len(ran)
    word = "".join("f" if module == 2 else kind for module, kind in ran)
    assert len(layers) == max(1, fewest(word))
    for layer in layers:
        assert layer.attention is None or (layer.attention.kind == "mha" and not is_patch(layer.attention))
        assert layer.feed_forward is None or layer.feed_forward.kind == "ffn" or is_patch(layer.feed_forward)


def test_whole_layers_stay_whole() -> None:
    layers = pack(fixed_halves(fixed([0, 1, 0], [0, 1, 1])))
    assert [(layer.attention.home, layer.feed_forward.home) for layer in layers] == [(0, 0), (1, 1), (0, 1)]


def test_a_feed_forward_alone_closes_a_layer_that_an_attention_opened_earlier() -> None:
    """Attention at step 0 and feed-forward at step 2 with nothing between are one layer."""
    (layer,) = pack(fixed_halves(fixed([0, 2, 2], [2, 2, 1])))
    assert (layer.attention.step, layer.feed_forward.step) == (0, 2)


def test_steps_that_choose_are_named() -> None:
    for changes in ({"mha_reach": [[0], [0, 2]]}, {"ffn_reach": [[0], [0, 1, 2]], "modules_per_token": 2}):
        with pytest.raises(MomifyError, match=r"1 of 4 half-steps \(first: .* of step 1, [23] choices.*--format mom"):
            fixed_halves(fixed([0, 0], [0, 1], **changes))


def test_one_choice_is_none_whatever_k_says() -> None:
    assert len(fixed_halves(fixed([0, 1], [1, 2], modules_per_token=2))) == 3
