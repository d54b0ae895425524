"""The words and numbers that a user reads before anything is removed, against counts by hand."""

from dataclasses import replace

import pytest

from momify.convert.assemble import mom_config
from momify.convert.describe import COST_HEAD, removal_rows
from momify.convert.homes import Request, choose_homes
from momify.convert.importance import Importance, Removal

FOUR = Importance(
    method="greedy",
    num_layers=4,
    tokens=4080,
    base_loss=2.0,
    mha_increase=(0.9, 0.3, 0.05, 0.7),
    ffn_increase=(0.8, 0.1, 0.4, 0.6),
    removals=(Removal("mha", 2, 0.05, 2.05), Removal("ffn", 1, 0.1, 2.15), Removal("mha", 1, 0.35, 2.5)),
)


@pytest.fixture
def tell(make_gpt2):
    """The texts for a request, on a 4-layer source of width 32."""

    def run(importance: Importance = FOUR, **request):
        plan = choose_homes(importance, Request(**{"mha": 2, "ffn": 3, "reach": "all", **request}))
        source = make_gpt2().config
        return removal_rows(plan, importance, source, mom_config(source, plan))

    return run


def test_the_first_line_says_what_goes(tell):
    # a module pair has 4 * 32 * 32 + 4 * 32 = 4224 and 2 * 32 * 128 + 160 = 8352 weights
    share = round(100 * (2 * 4224 + 8352) / (4 * (4224 + 8352)))
    assert tell().lines[0] == (
        "removes 2 of 4 attention modules (layers 1, 2) and 1 of 4 feed-forward modules (layer 1); "
        f"{share}% of block weights; attention runs at 2 of 4 steps, feed-forward at 3 of 4"
    )
    assert "none of 4 feed-forward modules;" in tell(ffn=4).lines[0]
    assert tell(mha=4, ffn=4).lines[0].startswith("removes no module; attention runs at 4 of 4 steps")


def test_reuse_depth_and_random_starts_are_said(tell):
    reused = tell(mha_steps=4)
    assert "attention of removed layers that still runs: layer 1 runs 0's, layer 2 runs 3's" in reused.lines
    assert "attention runs at 4 of 4 steps" in reused.lines[0]
    assert any("--depth 3 drops 1 whole layers: 1" in line for line in tell(depth=3).lines)
    assert any("--depth 5 adds steps 2, which skip" in line for line in tell(depth=5).lines)
    assert any("drawn at random" in line for line in tell(init="random").lines)


def test_the_flags_are_told_apart(tell):
    flags = tell().lines[-1]
    assert "--mha and --ffn set the pool: weights" in flags
    assert "--mha-steps" in flags
    assert "KV cache" in flags


def test_the_loss_is_told_only_where_just_this_was_measured(tell):
    said = [line for line in tell().lines if "calibration loss" in line]
    assert said == [
        "calibration loss 2.000 -> 2.500 nats per token with these left out, before training (4,080 tokens, greedy)"
    ]
    assert any("2.000 -> 2.150" in line for line in tell(mha=3).lines)  # a prefix of what was measured
    assert not any("calibration loss" in line for line in tell(mha=2, ffn=4).lines)


def test_one_row_a_layer(tell):
    told = tell(mha_steps=3)
    assert told.head == ("layer", "attention", "loss +", "feed-forward", "loss +")
    assert tell(replace(FOUR, method="cosine")).head[2] == "1 - cos"
    rows = told.rows
    assert all(len(row) == len(told.head) for row in rows)
    assert rows == (
        ("0", "kept", "+0.9000", "kept", "+0.8000"),
        ("1", "removed, runs 0's", "+0.3500", "removed", "+0.1000"),
        ("2", "removed", "+0.0500", "kept", "+0.4000"),
        ("3", "kept", "+0.7000", "kept", "+0.6000"),
    )


def test_added_and_dropped_layers_have_rows_too(tell):
    added = tell(mha=4, ffn=4, depth=6).rows
    assert [row[0] for row in added] == ["0", "+", "1", "2", "+", "3"]
    assert added[1] == ("+", "added, may run", "-", "added, may run", "-")
    dropped = tell(mha=4, ffn=4, depth=3).rows
    assert [row[0] for row in dropped] == ["0", "1", "2", "3"]
    assert ("in the pool, no step of its own", "in the pool, no step of its own") in [(r[1], r[3]) for r in dropped]
    unmeasured = tell(Importance.unmeasured(4), mha=4, ffn=4).rows
    assert unmeasured[0] == ("0", "kept", "-", "kept", "-")


def test_costs_before_and_after(tell):
    costs = {row[0]: row for row in tell(reach="home").costs}
    assert all(len(row) == len(COST_HEAD) for row in costs.values())
    n, core = 48, 2 * 48 * 32
    before = n * (4 * (4 * 32 * 32 + core + 2 * 32 * 128) + 32 * 61)
    after = before - n * (2 * (4 * 32 * 32 + core) + 2 * 32 * 128)
    assert costs["MACs, 48 tokens"][1:4] == (f"{before / 1e6:.3g} M", f"{after / 1e6:.3g} M", f"{after / before:.2f}x")
    assert costs["KV cache per token, 16 bit"][1:] == ("512 B", "256 B", "0.50x", "--mha-steps")
    assert costs["parameters"][4] == "--mha --ffn"


def test_what_stands_in_is_told_with_its_costs(tell):
    told = tell(reach="home", patch_rank=3)
    patches = [line for line in told.lines if line.startswith("patches")]
    numbers, total = 3 * (2 * 32 * 3 + 32), 2 * 4224 + 3 * 8352 + 61 * 32 + 48 * 32 + 2 * 32
    whole = 2 * (4 * 32 * 32 + 2 * 48 * 32) + 3 * 2 * 32 * 128 + 32 * 61 + 3 * 2 * 32 * 3
    assert patches == [
        f"patches of rank 3 at 2 attention and 1 feed-forward steps: {numbers} parameters "
        f"({numbers / (total + numbers):.1%}), {3 * 2 * 32 * 3 / whole:.1%} of the MACs"
    ]
    assert [row[1] for row in told.rows] == ["kept", "removed, patched", "removed, patched", "kept"]
    changed = tell(reach="home", mha_steps=4, step_rank=2)
    assert [row[1] for row in changed.rows] == [
        "kept, changed", "removed, runs 0's, changed", "removed, runs 3's, changed", "kept, changed",
    ]  # fmt: skip
    assert any(line.startswith("changes to shared modules of rank 2 at 4 attention and 0") for line in changed.lines)
    assert not any("rank" in line for line in tell(reach="home").lines)
