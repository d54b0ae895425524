"""A plan's figures against what a report measures on the converted model, over random configurations."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from momify.convert.assemble import assemble, network_of
from momify.convert.homes import Request, check_request, choose_homes
from momify.convert.importance import Importance
from momify.convert.source import open_source
from momify.errors import MomifyError
from momify.measure.flops import count_torch
from momify.measure.macs import closed_form
from momify.measure.memory import measure_memory
from momify.model.layout import half_steps
from momify.plan.figures import figures_of, planned_shape
from momify.plan.reading import dense_shape

MakeGpt2 = Callable[..., GPT2LMHeadModel]
CONFIGURATIONS = 20


def random_request(draw: random.Random, layers: int) -> Request:
    """A request that the source can fulfil; K > 1 only where each token runs all that it can (fixed routing)."""
    while True:
        reach = draw.choice(["all", "skip", "home"])
        request = Request(
            mha=draw.randint(1, layers),
            ffn=draw.randint(1, layers),
            depth=draw.choice([None, draw.randint(1, layers), layers + 2]),
            modules_per_token=draw.choice([1, 2]) if reach == "skip" else 1,
            mha_steps=draw.choice([None, draw.randint(1, layers)]),
            ffn_steps=draw.choice([None, draw.randint(1, layers)]),
            reach=reach,
            patch_rank=draw.choice([0, 3]),
            step_rank=draw.choice([0, 5]),
        )
        try:
            check_request(request, layers)
        except MomifyError:
            continue
        return request


def random_importance(draw: random.Random, layers: int) -> Importance:
    """What a calibration could have found."""
    increases = [tuple(draw.random() for _ in range(layers)) for _ in range(2)]
    return Importance("leave_one_out", layers, 100, 3.0, *increases)


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_plan_is_what_report_measures(make_gpt2: MakeGpt2, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    layers = draw.randint(2, 5)
    variant = {
        "n_layer": layers, "n_embd": draw.choice([16, 32]), "n_inner": draw.choice([None, 24]),
        "vocab_size": draw.randint(53, 90), "tie_word_embeddings": draw.random() < 0.7,
    }  # fmt: skip
    make_gpt2(**variant).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    request = random_request(draw, layers)
    homes = choose_homes(random_importance(draw, layers), request)
    model = assemble(source, network_of(source), homes)

    dense = dense_shape(json.loads((tmp_path / "config.json").read_text()), "config.json")
    planned = figures_of(planned_shape(dense, request), tokens=12, batches=(1, 3))
    ids = torch.randint(0, 53, (1, 12))
    memory = measure_memory(model.to(torch.bfloat16), [ids, ids.expand(3, 12)])
    model = model.float()

    assert planned.parameters["total"] == sum(parameter.numel() for parameter in model.parameters())
    for part in ("patches", "deltas"):
        word = {"patches": "_patch.", "deltas": "_delta."}[part]
        named = [p.numel() for name, p in model.named_parameters() if word in name]
        assert planned.parameters[part] == sum(named)
    assert planned.weight_bytes["bfloat16"] == memory.weight_bytes
    masks = sum(half.masks_keys for half in half_steps(model.config))  # a byte a token: whether its key may be seen
    assert planned.kv_bytes_per_token == memory.kv_bytes_per_token == memory.kv_bytes_per_token_measured - masks
    assert planned.macs == closed_form(model, ids).total == count_torch(model, ids).macs
    assert planned.macs_at_most >= planned.macs
    for load in memory.loads:
        if load.phase == "prompt":
            # which steps skip, and so how full the cache is at the peak, only calibration says
            total = planned.weight_bytes["bfloat16"] + load.batch * planned.kv_bytes + planned.activations[load.batch]
            assert total == pytest.approx(load.total.measured, rel=0.15)


@pytest.mark.parametrize("variant", [{}, {"n_inner": 50}, {"tie_word_embeddings": False}], ids=str)
def test_the_source_too(make_gpt2: MakeGpt2, tmp_path: Path, variant: dict) -> None:
    model = make_gpt2(**variant)
    model.save_pretrained(tmp_path)
    found = figures_of(dense_shape(json.loads((tmp_path / "config.json").read_text()), "config.json"), tokens=12)
    assert found.parameters["total"] == model.num_parameters()
    assert found.macs == found.macs_at_most == count_torch(model, torch.zeros(1, 12, dtype=torch.long)).macs
    assert found.flops == 2 * found.macs
    assert found.to_dict()["flops_per_token"] == found.flops / 12


def test_the_most_is_what_running_everything_costs(make_gpt2: MakeGpt2, tmp_path: Path) -> None:
    """Routers that never skip and always disagree with SKIP: added steps run too."""
    make_gpt2().save_pretrained(tmp_path)
    source = open_source(tmp_path)
    request = Request(mha=2, ffn=3, depth=6, patch_rank=2)
    model = assemble(source, network_of(source), choose_homes(random_importance(random.Random(0), 4), request))
    with torch.no_grad():
        for router in (model.model.mha_router, model.model.ffn_router):
            router.bias[:, 0] = 100.0
    planned = figures_of(planned_shape(dense_shape(source.config.to_dict(), "x"), request), tokens=12)
    ids = torch.zeros(1, 12, dtype=torch.long)
    assert planned.macs < planned.macs_at_most == closed_form(model, ids).total


@pytest.mark.parametrize("wrong", [{"patch_rank": 17}, {"step_rank": -1}], ids=str)
def test_a_rank_that_no_map_needs(wrong: dict) -> None:
    dense = dense_shape({"n_layer": 3, "n_embd": 16, "vocab_size": 50, "n_positions": 16}, "x")
    with pytest.raises(MomifyError, match=r"_rank is (17|-1); use 0 \(none\) to 16, the source's width"):
        planned_shape(dense, Request(2, 2, **wrong))


def test_a_patch_costs_a_little_and_a_step_more() -> None:
    """A step without attention: bare, with a patch, with another step's module, and that changed by a delta."""
    dense = dense_shape({"n_layer": 3, "n_embd": 16, "vocab_size": 50, "n_positions": 16}, "x")
    requests = [Request(2, 3), Request(2, 3, patch_rank=4), Request(2, 3, mha_steps=3, step_rank=0),
                Request(2, 3, mha_steps=3, patch_rank=4, step_rank=4)]  # fmt: skip
    bare, patched, reused, adapted = (figures_of(planned_shape(dense, request), tokens=8) for request in requests)
    assert patched.macs - bare.macs == patched.parts["patches"] == 8 * 2 * 16 * 4
    assert patched.kv_bytes == bare.kv_bytes < reused.kv_bytes == adapted.kv_bytes
    assert adapted.macs - reused.macs == adapted.parts["deltas"] == 8 * 2 * 4 * (16 + 48 + 16 + 16)
    assert adapted.parameters["patches"] == 0, "nothing skips"
    usual, named = (
        figures_of(planned_shape(dense, Request(2, 3, mha_steps=3, step_rank=rank)), 8) for rank in (None, 16)
    )
    assert usual == named, "16, which is the width too"
