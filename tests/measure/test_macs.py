"""Closed form, fvcore and torch on routed models: equal to the last digit, and to a sum over records."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momify.measure.cost import Macs, attention_steps, kv_bytes_per_token, mom_macs, parameters, planned_usage
from momify.measure.flops import Count, UnsupportedOperator, count_fvcore, count_torch
from momify.measure.macs import MacCounts, closed_form, count_macs
from momify.measure.routing import realised
from momify.model import MomConfig, MomForCausalLM
from momify.model.outputs import CACHE

MakeMom = Callable[..., MomForCausalLM]

STATIC = {
    "mha_homes": [0, 3, 1, 2], "mha_reach": [[0], [3], [1], [2]],
    "ffn_homes": [0, 1, 4, 3], "ffn_reach": [[0], [1], [4], [3]],
}  # fmt: skip
MIXED = {
    "mha_homes": [0, 1, 3, 2], "mha_reach": [[0], [0, 1, 2, 3], [0, 1, 3], [2, 3]],
    "ffn_homes": [4, 1, 2, 3], "ffn_reach": [[0, 1, 2, 3, 4], [1, 2], [4, 2][::-1], [3]],
}  # fmt: skip
SHARED = {
    "mha_homes": [1, 3, 1, 1], "mha_reach": [[1], [3], [1], [1, 3]],
    "ffn_homes": [0, 4, 0, 0], "ffn_reach": [[0], [4], [0, 1, 4], [0]],
}  # fmt: skip
MODELS = {
    "everything reachable": {},
    "static": STATIC,
    "mixed": MIXED,
    "mixed, masked keys": {**MIXED, "skipped_keys": "masked"},
    "two modules a token": {"modules_per_token": 2},
    "two modules a token, mixed": {**MIXED, "modules_per_token": 2},
    "all modules": {"modules_per_token": 5},
    "wide routers": {**MIXED, "router_hidden": 7},
    "untied": {**MIXED, "tie_word_embeddings": False},
    "patches": {"patch_rank": 3},
    "patches, static": {**STATIC, "patch_rank": 5},
    "patches, mixed": {**MIXED, "patch_rank": 3},
    "patches, mixed, masked keys": {**MIXED, "patch_rank": 3, "skipped_keys": "masked"},
    "patches, two choices a token": {**MIXED, "patch_rank": 3, "modules_per_token": 2},
    "patches, all choices": {"patch_rank": 3, "modules_per_token": 5},
    "patches and deltas": {**SHARED, "patch_rank": 3, "step_rank": 2},
    "patches, no attention": {"mha_homes": [3] * 4, "mha_reach": [[3]] * 4, "patch_rank": 2},
    "no attention": {"mha_homes": [3] * 4, "mha_reach": [[3]] * 4},
    "one module": {
        "num_mha_modules": 1, "num_ffn_modules": 1, "mha_reach": [[0]] * 4, "ffn_reach": [[0]] * 4,
    },
}  # fmt: skip


def by_hand(model: MomForCausalLM, ids: torch.Tensor) -> int:
    """Products from the picks of each token and the shapes of the weights, written out without cost.py."""
    config, body, (batch, tokens) = model.config, model.model, ids.shape
    with torch.no_grad():
        routing = model(ids, use_cache=False, output_router_logits=True).routing
    macs = batch * tokens * model.lm_head.weight.numel()
    for record in routing:
        attention = record.kind == "mha"
        skip = config.num_mha_modules if attention else config.num_ffn_modules
        pool = (body.mha.qkv, body.mha.out) if attention else (body.ffn.up, body.ffn.down)
        runs = record.modules != skip
        macs += int(runs.sum()) * sum(part.weight[0].numel() for part in pool)
        macs += of_small_parts(model, record.kind, record.step, record.modules)
        if record.routed:
            router = body.mha_router if attention else body.ffn_router
            matrices = [router.weight] if router.w_in is None else [router.w_in, router.weight]
            macs += batch * tokens * sum(matrix[0].numel() for matrix in matrices)
        if attention and runs.any():
            macs += 2 * batch * tokens * tokens * config.hidden_size
            if config.skipped_keys == "home" and config.mha_homes[record.step] != skip:
                macs += int((~runs).all(dim=1).sum()) * 2 * config.hidden_size**2
    return macs


def of_small_parts(model: MomForCausalLM, kind: str, step: int, modules: torch.Tensor) -> int:
    """Products of patches for the tokens that lie on SKIP, and of deltas for all tokens of a step that has them."""
    config, skip = model.config, model.config.num_modules(kind)
    patch, delta = getattr(model.model, f"{kind}_patch"), getattr(model.model, f"{kind}_delta")
    macs = 0
    if patch is not None:
        skipping = int((modules == skip).any(dim=1).sum())
        macs += skipping * (patch.weight_in[0].numel() + patch.weight_out[0].numel())
    homes, alone = config.homes(kind), len(config.reach(kind)[step]) == 1
    if delta is not None and alone and homes[step] != skip and homes.count(homes[step]) > 1:
        parts = [part for name, part in delta.named_parameters() if "weight" in name]
        macs += len(modules) * sum(part[0].numel() for part in parts)
    return macs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_three_ways_agree_exactly(make_mom: MakeMom, name: str, attention: str) -> None:
    model = make_mom(**MODELS[name], attn_implementation=attention)
    ids = torch.randint(0, 61, (2, 13))
    expected = by_hand(model, ids)
    if model.config.patch_rank:
        assert closed_form(model, ids).patches > 0
    assert closed_form(model, ids).total == expected
    assert count_torch(model, ids).macs == expected
    fvcore = count_fvcore(model, ids)
    assert (fvcore.macs, fvcore.unknown) == (expected, ())


def test_the_mixed_models_really_mix(make_mom: MakeMom) -> None:
    """Else the test above would compare less than it says: skipped tokens, kept keys, several modules."""
    model, ids = make_mom(**MIXED), torch.randint(0, 61, (2, 13))
    with torch.no_grad():
        usage = realised(model(ids, output_router_logits=True).routing, 26)
    attention = [half for half in usage if half.kind == "mha"]
    assert any(half.kept for half in attention)
    assert any(0 < half.rows < 26 for half in attention)
    assert any(0 < half.rows < 26 for half in usage if half.kind == "ffn")


def test_a_step_that_every_token_skips(make_mom: MakeMom) -> None:
    """Without a cache neither keys nor the core are computed, and the router is still paid for."""
    model = make_mom(mha_homes=[0, 1, 3, 2], ffn_homes=[4, 1, 2, 3])
    with torch.no_grad():
        for router in (model.model.mha_router, model.model.ffn_router):
            router.weight.zero_()
            router.bias[:] = router.home_rows(50.0)
            router.bias[1] = router.home_rows(0.0)[1]
            router.bias[1, -1] = 50.0  # step 1: SKIP, though its home is a module
    ids = torch.randint(0, 61, (2, 13))
    assert by_hand(model, ids) == closed_form(model, ids).total == count_fvcore(model, ids).macs
    assert count_torch(model, ids).macs == closed_form(model, ids).total


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_planned_is_realised_for_fixed_routing(data: st.DataObject) -> None:
    """What a plan promises from the config alone is what the model is and does: parameters, KV, MACs."""
    mha, ffn, steps = (data.draw(st.integers(1, 4)) for _ in range(3))
    mha_homes = data.draw(st.lists(st.integers(0, mha), min_size=steps, max_size=steps))
    ffn_homes = data.draw(st.lists(st.integers(0, ffn), min_size=steps, max_size=steps))
    config = MomConfig(
        vocab_size=data.draw(st.integers(5, 40)), n_positions=16, hidden_size=8, num_attention_heads=2,
        intermediate_size=data.draw(st.integers(1, 30)),
        num_mha_modules=mha, num_ffn_modules=ffn, num_steps=steps,
        mha_homes=mha_homes, mha_reach=[[home] for home in mha_homes],
        ffn_homes=ffn_homes, ffn_reach=[[home] for home in ffn_homes],
        tie_word_embeddings=data.draw(st.booleans()), bos_token_id=0, eos_token_id=0,
        patch_rank=data.draw(st.integers(0, 8)), step_rank=data.draw(st.integers(0, 8)),
    )  # fmt: skip
    model = MomForCausalLM(config).eval()
    ids = torch.zeros(2, 6, dtype=torch.long)
    planned = mom_macs(config, 2, 6, planned_usage(config, 2, 6)).total
    assert planned == closed_form(model, ids).total == count_torch(model, ids).macs
    assert parameters(config).total == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        cache = getattr(model(ids, use_cache=True), CACHE)
    stored = sum(t.numel() for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values))
    marks = 0 if attention_steps(config) else 2 * 12  # a model without attention counts its tokens in the cache
    assert kv_bytes_per_token(config, 4) * 12 == 4 * (stored - marks)


def test_routers_count_as_parameters(make_mom: MakeMom) -> None:
    for changes in MODELS.values():
        model = make_mom(**changes)
        assert parameters(model.config).total == sum(p.numel() for p in model.parameters())


def test_several_inputs(make_mom: MakeMom) -> None:
    model = make_mom(**MIXED)
    inputs = [torch.randint(0, 61, (1, 9)) for _ in range(5)]
    counts = count_macs(model, inputs, counted=2)
    totals = [by_hand(model, ids) for ids in inputs]
    assert len(counts.closed) == 5
    assert [count.macs for count in counts.fvcore] == totals[:2] == [count.macs for count in counts.torch]
    assert counts.mean.total == pytest.approx(sum(totals) / 5)
    closed, fvcore = counts.ways()["closed_form"], counts.ways()["fvcore"]
    assert (closed.inputs, closed.low, closed.high) == (5, min(totals), max(totals))
    assert closed.low < closed.mean < closed.high
    assert closed.deviation == pytest.approx(torch.tensor(totals).double().std(correction=0).item())
    assert (fvcore.inputs, fvcore.mean) == (2, sum(totals[:2]) / 2)
    assert counts.agree
    assert counts.largest_difference == 0
    assert (counts.batch, counts.tokens) == (1, 9)
    assert len(count_macs(model, inputs).fvcore) == 5


def counted(closed: float, fvcore: int, torch_macs: int, kind: str | None = None) -> MacCounts:
    odd = () if kind is None else (UnsupportedOperator("aten::odd", 1, kind),)
    return MacCounts(1, 1, (Macs(ffn=closed),), (Count(fvcore, {}, odd),), (Count(torch_macs),))


def test_disagreement_is_seen() -> None:
    assert counted(1000, 1010, 990).agree
    assert counted(1000, 1010, 990).largest_difference == pytest.approx(0.01)
    assert not counted(1000, 1011, 1000).agree
    assert not counted(1000, 1000, 989).agree
    assert counted(1000, 1000, 1000, "elementwise").agree
    assert not counted(1000, 1000, 1000, "unknown").agree
    assert not MacCounts(1, 1, (Macs(ffn=1),), (), ()).agree  # nobody looked


def test_training_mode_is_kept(make_mom: MakeMom) -> None:
    model = make_mom(**MIXED, router_explore=0.5).train()
    ids = torch.randint(0, 61, (2, 13))
    first, second = closed_form(model, ids), closed_form(model, ids)
    assert first == second  # an exploring router would draw anew
    assert model.training
