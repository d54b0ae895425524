"""The closed form against numbers worked out by hand and real weights; counters are in test_macs.py."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from momify.errors import MomifyError
from momify.measure.cost import (
    HalfStep,
    attention_steps,
    dense_macs,
    kv_bytes_per_token,
    mom_macs,
    parameters,
    planned_usage,
)
from momify.model import MomConfig

MakeGpt2 = Callable[..., GPT2LMHeadModel]


@pytest.mark.parametrize(
    ("width", "layers", "heads", "tera_flops", "million", "kib"),
    [  # FLOPs of one 1024-token sequence as published for the family (0.29, 0.83, 1.77, 3.51)
        (768, 12, 12, 0.29, 124.4, 36),
        (1024, 24, 16, 0.83, 354.8, 96),
        (1280, 36, 20, 1.77, 774.0, 180),
        (1600, 48, 25, 3.51, 1557.6, 300),
    ],
)
def test_the_gpt2_family(width: int, layers: int, heads: int, tera_flops: float, million: float, kib: int) -> None:
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    assert dense_macs(config, 1, 1024).flops / 1e12 == pytest.approx(tera_flops, abs=0.006)
    assert parameters(config).total / 1e6 == pytest.approx(million, abs=0.05)
    assert kv_bytes_per_token(config) == kib * 1024


def test_gpt2_large_by_part() -> None:
    macs = dense_macs(GPT2Config(n_embd=1280, n_layer=36, n_head=20), 1, 1024)
    assert macs.parts() == {
        "projections": 36 * 1024 * 4 * 1280 * 1280,
        "attention": 36 * 1024 * 2 * 1024 * 1280,
        "ffn": 36 * 1024 * 2 * 1280 * 5120,
        "patches": 0,
        "deltas": 0,
        "routers": 0,
        "head": 1024 * 1280 * 50257,
    }
    assert macs.total == pytest.approx(0.887e12, rel=1e-3)


@pytest.mark.parametrize("variant", [{}, {"n_inner": 50}, {"tie_word_embeddings": False}, {"n_layer": 1}], ids=str)
def test_dense_parameters_are_those_of_the_module(make_gpt2: MakeGpt2, variant: dict) -> None:
    model = make_gpt2(**variant)
    assert parameters(model.config).total == sum(p.numel() for p in model.parameters())


def small(**changes: object) -> MomConfig:
    settings: dict = {
        "vocab_size": 61, "n_positions": 48, "hidden_size": 8, "num_attention_heads": 2,
        "intermediate_size": 20,
        "num_mha_modules": 2, "num_ffn_modules": 3, "num_steps": 3,
        "mha_homes": [0, 2, 1], "mha_reach": [[0], [2], [0, 1, 2]],
        "ffn_homes": [0, 1, 3], "ffn_reach": [[0], [0, 1, 2, 3], [1, 3]],
    }  # fmt: skip
    return MomConfig(**{**settings, **changes})


def test_mom_by_hand() -> None:
    """D 8, I 20, V 61; 2 x 5 tokens; step 1 has no attention, step 2 a router for it."""
    usage = [
        HalfStep(0, "mha", rows=10, queries=10),
        HalfStep(0, "ffn", rows=10),
        HalfStep(1, "ffn", rows=7),
        HalfStep(2, "mha", rows=6, kept=4, queries=10),
        HalfStep(2, "ffn", rows=1),
    ]
    macs = mom_macs(small(), 2, 5, usage)
    assert macs.parts() == {
        "projections": 16 * 4 * 64 + 4 * 2 * 64,
        "attention": 20 * 2 * 5 * 8,
        "ffn": 18 * 2 * 8 * 20,
        "patches": 0,
        "deltas": 0,
        "routers": 10 * 8 * 3 + 2 * 10 * 8 * 4,
        "head": 10 * 8 * 61,
    }
    wide = mom_macs(small(router_hidden=6), 2, 5, usage)
    assert wide.routers == 10 * (8 * 6 + 6 * 3) + 2 * 10 * (8 * 6 + 6 * 4)


def test_patches_and_deltas_by_hand() -> None:
    """Ranks 3 and 2 of D 8, I 20; attention can skip at steps 1 and 2 of four, feed-forward at step 3 only."""
    config = small(
        num_steps=4, patch_rank=3, step_rank=2,
        mha_homes=[0, 2, 1, 0], mha_reach=[[0], [2], [1, 2], [0]],
        ffn_homes=[0, 0, 0, 3], ffn_reach=[[0], [0, 1], [0], [3]],
    )  # fmt: skip
    usage = [
        HalfStep(0, "mha", rows=10, queries=10), HalfStep(0, "ffn", rows=10),
        HalfStep(1, "mha", rows=0, skipped=10), HalfStep(1, "ffn", rows=10),
        HalfStep(2, "mha", rows=7, kept=3, queries=10, skipped=3), HalfStep(2, "ffn", rows=10),
        HalfStep(3, "mha", rows=10, queries=10), HalfStep(3, "ffn", rows=0, skipped=10),
    ]  # fmt: skip
    macs, counts = mom_macs(config, 2, 5, usage), parameters(config)
    assert macs.patches == 23 * 2 * 8 * 3
    assert macs.deltas == 2 * 10 * 2 * (8 + 24 + 8 + 8) + 2 * 10 * 2 * (8 + 20 + 20 + 8)
    assert counts.patches == 3 * (2 * 8 * 3 + 8)
    assert counts.deltas == 2 * (2 * (8 + 24 + 8 + 8) + 24 + 8) + 2 * (2 * (8 + 20 + 20 + 8) + 20 + 8)
    config.patch_rank = config.step_rank = 0
    assert macs.total - macs.patches - macs.deltas == mom_macs(config, 2, 5, usage).total
    config.patch_rank = 3
    assert attention_steps(config) == 3
    assert {(h.step, h.kind) for h in planned_usage(config, 2, 5) if h.skipped} == {(1, "mha"), (3, "ffn")}


def test_planned_usage() -> None:
    by_place = {(half.step, half.kind): half for half in planned_usage(small(), 2, 5)}
    assert by_place[0, "mha"] == HalfStep(0, "mha", 10, queries=10)
    assert by_place[1, "mha"] == HalfStep(1, "mha", 0)
    assert by_place[2, "mha"].rows == 10
    assert [by_place[step, "ffn"].rows for step in range(3)] == [10, 10, 0]

    two = {(half.step, half.kind): half.rows for half in planned_usage(small(modules_per_token=2), 2, 5)}
    assert [two[step, "mha"] for step in range(3)] == [10, 0, 20]
    assert [two[step, "ffn"] for step in range(3)] == [10, 20, 10]  # a home SKIP is one of the two picks


def test_kv_cache_follows_the_steps_and_not_the_pool() -> None:
    assert attention_steps(small()) == 2
    assert kv_bytes_per_token(small(), 4) == 2 * 2 * 8 * 4
    assert kv_bytes_per_token(small(num_mha_modules=2, mha_homes=[2] * 3, mha_reach=[[2]] * 3)) == 0


def test_another_model_type() -> None:
    with pytest.raises(MomifyError, match="model_type 'llama'"):
        parameters(AutoConfig.for_model("llama"))


def test_the_module_needs_no_torch() -> None:
    code = "import sys, momify.measure.cost; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
