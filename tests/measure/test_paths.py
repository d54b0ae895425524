"""Paths against the model's own records, and leaving out against models that never had the module."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from momify.errors import MomifyError
from momify.measure.paths import leave_one_out, trace_paths, without
from momify.model import MomForCausalLM

MakeMom = Callable[..., MomForCausalLM]
IDS = torch.randint(0, 61, (1, 20), generator=torch.Generator().manual_seed(3))


def loss_of(model: MomForCausalLM) -> float:
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], IDS[0, 1:]).item()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("picks", [1, 2])
def test_paths_are_what_the_model_did(make_mom: MakeMom, picks: int, rank: int) -> None:
    reach = {"mha_reach": [[0], [0, 1, 2, 3], [3], [1, 2]], "mha_homes": [0, 1, 3, 2]}
    model = make_mom(modules_per_token=picks, patch_rank=rank, **reach)
    paths = trace_paths(model, IDS)
    with torch.no_grad():
        records = model(IDS, use_cache=False, output_router_logits=True).routing
    assert [(half.step, half.kind, half.fixed) for half in paths.halves] == [
        (record.step, record.kind, not record.routed) for record in records
    ]
    for half, record in zip(paths.halves, records, strict=True):
        for token, found in enumerate(half.picks):
            assert [module for module, _ in found] == record.modules[token].tolist()
            assert [gate for _, gate in found] == pytest.approx(record.gates[token].tolist())
    patched = [(half.step, half.fixed) for half in paths.halves if half.kind == "mha" and half.patched]
    assert patched == ([(1, False), (2, True)] if rank else [])
    assert paths.halves[0].home == 0
    assert paths.loss == pytest.approx(loss_of(model), rel=1e-5)
    assert paths.losses[0] is None
    assert len(paths.losses) == 20


def test_without_a_module_is_the_model_that_cannot_reach_it(make_mom: MakeMom) -> None:
    """Rebuilt with smaller reaches; a fixed step of that module only skips there."""
    reach = {"mha_reach": [[1], [0, 1, 2, 3], [0, 1, 2, 3], [1, 2]], "mha_homes": [1, 0, 2, 2]}
    model = make_mom(**reach, skipped_keys="masked")
    smaller = make_mom(mha_reach=[[3], [0, 2, 3], [0, 2, 3], [2]], mha_homes=[3, 0, 2, 2], skipped_keys="masked")
    state = model.state_dict()
    for name in ("model.mha_router.weight", "model.mha_router.bias"):
        state[name] = state[name][:2]  # the fourth step has one choice left, and so no router
    smaller.load_state_dict(state)
    before = loss_of(model)
    with without(model, "mha", 1):
        left = loss_of(model)
    assert left == pytest.approx(loss_of(smaller), rel=1e-5)
    assert abs(left - before) > 1e-4
    assert loss_of(model) == before


def test_without_a_module_its_deltas_add_nothing_either(make_mom: MakeMom) -> None:
    fixed = {"ffn_reach": [[1], [0], [1], [4]], "ffn_homes": [1, 0, 1, 4], "patch_rank": 2}
    model = make_mom(**fixed, step_rank=3)
    bare = make_mom(**{**fixed, "ffn_reach": [[4], [0], [4], [4]], "ffn_homes": [4, 0, 4, 4]}, mha_homes=[0, 1, 2, 0])
    state = {name: tensor for name, tensor in model.state_dict().items() if "delta" not in name}
    for name in ("weight_in", "weight_out", "bias"):  # the steps that skip now have patches that add nothing
        last = state[f"model.ffn_patch.{name}"]
        state[f"model.ffn_patch.{name}"] = torch.cat([torch.zeros_like(last).expand(2, *last.shape[1:]), last])
    bare.load_state_dict(state)
    with without(model, "ffn", 1):
        assert loss_of(model) == pytest.approx(loss_of(bare), rel=1e-5)
    assert abs(loss_of(model) - loss_of(bare)) > 1e-4


def test_every_used_module_is_left_out_once(make_mom: MakeMom) -> None:
    model = make_mom()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = trace_paths(model, IDS)
    steps = []
    rises = leave_one_out(model, IDS, paths, lambda done, total: steps.append((done, total)))
    expected = {("mha", m) for m in paths.used("mha") - {3}} | {("ffn", m) for m in paths.used("ffn") - {4}}
    assert set(rises) == expected
    assert steps == [(number, len(expected)) for number in range(len(expected))]
    assert any(abs(rise) > 1e-3 for rise in rises.values())
    for (kind, module), rise in rises.items():
        with without(model, kind, module):
            assert rise == pytest.approx(loss_of(model) - paths.loss, abs=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_an_unused_module_is_not_left_out(make_mom: MakeMom) -> None:
    model = make_mom(mha_reach=[[0], [0], [0], [0]], mha_homes=[0] * 4)
    paths = trace_paths(model, IDS)
    assert [place for place in leave_one_out(model, IDS, paths) if place[0] == "mha"] == [("mha", 0)]


def test_what_cannot_be_traced(make_mom: MakeMom, make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    with pytest.raises(MomifyError, match="no routing"):
        trace_paths(make_gpt2(), IDS)
    with pytest.raises(MomifyError, match="the text is empty"):
        trace_paths(make_mom(), IDS[:, :0])
    with pytest.raises(MomifyError, match="has 60 tokens, the model 48 positions"):
        trace_paths(make_mom(), IDS.repeat(1, 3))
    model = make_mom()
    one = trace_paths(model, IDS[:, :1])
    assert one.loss is None
    with pytest.raises(MomifyError, match="one token has no loss"):
        leave_one_out(model, IDS[:, :1], one)
