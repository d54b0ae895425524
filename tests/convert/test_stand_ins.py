"""convert/stand_ins.py: what the plan calls for is what the model has, and what was not fitted does nothing yet."""

import pytest
import torch

from momify.convert.assemble import assemble, mom_config, network_of
from momify.convert.homes import HomePlan, Request, choose_homes
from momify.convert.importance import Importance
from momify.convert.regression import Factors
from momify.convert.source import open_source
from momify.convert.stand_ins import stand_in_state

MEASURED = Importance("leave_one_out", 4, 1, 1.0, (0.9, 0.1, 0.2, 0.8), (0.7, 0.3, 0.9, 0.1))
REQUESTS = (
    Request(mha=2, ffn=3, patch_rank=3),
    Request(mha=2, ffn=3, patch_rank=3, reach="skip"),
    Request(mha=2, ffn=2, mha_steps=4, ffn_steps=3, patch_rank=2, step_rank=4),
    Request(mha=2, ffn=2, mha_steps=4, step_rank=4, reach="all"),
    Request(mha=1, ffn=4, mha_steps=3, depth=3, step_rank=5),
    Request(mha=3, ffn=3, depth=6, patch_rank=1, step_rank=1),
)


def plan_of(request: Request) -> HomePlan:
    return choose_homes(MEASURED, request)


@pytest.mark.parametrize("request_", REQUESTS)
def test_plan_and_config_agree(make_gpt2, request_: Request) -> None:
    plan = plan_of(request_)
    config = mom_config(make_gpt2().config, plan)
    for kind in ("mha", "ffn"):
        assert plan.patched(kind) == config.patched(kind)
        assert plan.adapted(kind) == config.adapted(kind)


@pytest.mark.parametrize("request_", REQUESTS)
def test_unfitted_stand_ins_do_nothing_but_learn(make_gpt2, save_gpt2, logits, ids, request_: Request) -> None:
    source = open_source(save_gpt2(make_gpt2(n_inner=48)))
    plain = Request(**{**request_.__dict__, "patch_rank": 0, "step_rank": 0})
    with_parts, without = (assemble(source, network_of(source), plan_of(request)) for request in (request_, plain))
    assert torch.allclose(logits(with_parts, ids), logits(without, ids), atol=1e-5)
    names = [name for name, _ in with_parts.named_parameters() if "_patch." in name or "_delta." in name]
    assert bool(names) == any(plan_of(request_).patched(k) or plan_of(request_).adapted(k) for k in ("mha", "ffn"))
    if with_parts.config.routed("mha") or with_parts.config.routed("ffn"):
        return  # what no token has chosen gets no gradient
    with_parts(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in with_parts.named_parameters():
        if name in names and name.endswith("weight_out"):
            assert parameter.grad.abs().sum(dim=(1, 2)).gt(0).all(), name


def test_found_maps_stand_in_their_rows_and_idle_terms_are_drawn(make_gpt2, save_gpt2) -> None:
    network = network_of(open_source(save_gpt2(make_gpt2())))
    plan = plan_of(Request(mha=2, ffn=3, patch_rank=3))
    assert plan.patched("mha") == [1, 2]
    found = Factors(torch.randn(32, 3), torch.randn(3, 32), torch.randn(32))
    found.weight_in[:, 1] = 0
    found.weight_out[1] = 0
    state = stand_in_state(plan, network.layers, {("mha_patch", 2): found}, 0.02, seed=5)
    assert sorted(state) == [
        f"model.{k}_patch.{part}" for k in ("ffn", "mha") for part in ("bias", "weight_in", "weight_out")
    ]
    weight_in, weight_out = state["model.mha_patch.weight_in"], state["model.mha_patch.weight_out"]
    assert torch.equal(weight_in[1] @ weight_out[1], found.weight_in @ found.weight_out)
    assert torch.equal(state["model.mha_patch.bias"][1], found.bias)
    assert not weight_out[0].any()
    assert not weight_out[1, 1].any()
    assert 0.01 < weight_in[0].std() < 0.03
    assert 0.01 < weight_in[1, :, 1].std() < 0.03
    again, other = (stand_in_state(plan, network.layers, {}, 0.02, seed=seed) for seed in (5, 6))
    assert torch.equal(again["model.mha_patch.weight_in"][0], weight_in[0])
    assert not torch.equal(other["model.mha_patch.weight_in"][0], weight_in[0])
