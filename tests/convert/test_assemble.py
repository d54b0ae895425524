"""Converted models against transformers' GPT-2, intact, pruned, with reuse, shallower and deeper."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from momify.convert.assemble import RouterSettings, assemble, mom_config, network_of
from momify.convert.homes import HomePlan, Request, choose_homes, removal_quotas
from momify.convert.importance import Importance, measure_importance
from momify.convert.source import Source, open_source
from momify.errors import MomifyError

PARITY = 1e-4  # design section 3: max difference of float32 logits


def gone_from(removed: dict[str, list[int]], layers: int = 4) -> Importance:
    """An importance that removes exactly these layers of each kind, in this order."""
    rank = {
        kind: tuple(float(gone.index(i)) if i in gone else 10.0 + i for i in range(layers))
        for kind, gone in removed.items()
    }
    return Importance("leave_one_out", layers, 1, 1.0, rank["mha"], rank["ffn"])


def convert(source: Source, plan: HomePlan, **settings):
    return assemble(source, network_of(source), plan, **settings)


def full_plan(layers: int, **request) -> HomePlan:
    pool = {"mha": layers, "ffn": layers, "reach": "all"}
    return choose_homes(Importance.unmeasured(layers), Request(**{**pool, **request}))


VARIANTS = {
    "plain": {},
    "n_inner 48, relu": {"n_inner": 48, "activation_function": "relu"},
    "gelu": {"activation_function": "gelu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "untied head": {"tie_word_embeddings": False},
    "inverse layer scale": {"scale_attn_by_inverse_layer_idx": True},
    "no attention scale": {"scale_attn_weights": False},
    "neither scale as usual, upcast": {
        "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
    },
    "odd vocabulary": {"vocab_size": 53},
    "one layer": {"n_layer": 1},
    "one head, wide epsilon": {"n_head": 1, "layer_norm_epsilon": 1e-2},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_of_config_variants(make_gpt2, save_gpt2, logits, ids, variant):
    model = make_gpt2(**VARIANTS[variant])
    source = open_source(save_gpt2(model))
    converted = convert(source, full_plan(model.config.n_layer))
    assert_close(logits(converted, ids), logits(model, ids))


@pytest.mark.parametrize("form", ["no-prefix", "old-buffers", "bin", "sharded-bin", "sharded-safetensors"])
def test_parity_of_file_forms(make_gpt2, save_gpt2, logits, ids, form):
    folder = save_gpt2(make_gpt2(), form)
    reference = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert_close(logits(convert(open_source(folder), full_plan(4)), ids), logits(reference, ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_parity_of_half_precision_files(make_gpt2, save_gpt2, logits, ids, dtype, form):
    folder = save_gpt2(make_gpt2().to(dtype), form)
    reference = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    source = open_source(folder)
    assert_close(logits(convert(source, full_plan(4)), ids), logits(reference, ids))
    half = convert(source, full_plan(4), dtype=source.dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}


def test_a_converted_model_survives_saving(make_gpt2, save_gpt2, logits, ids, tmp_path):
    converted = convert(open_source(save_gpt2(make_gpt2(tie_word_embeddings=False))), full_plan(4))
    converted.save_pretrained(tmp_path / "mom")
    again = type(converted).from_pretrained(tmp_path / "mom").eval()
    assert torch.equal(logits(again, ids), logits(converted, ids))


REMOVED = {"mha": [2, 0], "ffn": [1]}
HALVES = [("mha", 2), ("mha", 0), ("ffn", 1)]


@pytest.mark.parametrize("reach", ["all", "skip", "home"])
@pytest.mark.parametrize("variant", ["plain", "inverse layer scale", "untied head"])
def test_a_pruned_conversion_equals_the_source_without_those_sublayers(
    make_gpt2, save_gpt2, without, logits, ids, reach, variant
):
    model = make_gpt2(**VARIANTS[variant])
    plan = choose_homes(gone_from(REMOVED), Request(mha=2, ffn=3, reach=reach))
    assert (plan.mha_layers, plan.ffn_layers) == ((1, 3), (0, 2, 3))
    converted = convert(open_source(save_gpt2(model)), plan)
    assert_close(logits(converted, ids), logits(without(model, HALVES), ids))
    assert (logits(converted, ids) - logits(model, ids)).abs().max() > 0.1  # the pruning is real
    assert converted.model.mha.qkv.weight.shape == (2, 32, 96)
    assert converted.config.num_hidden_layers == 2


def test_measured_and_pruned_in_one_go_has_the_measured_loss(make_gpt2, save_gpt2):
    source = open_source(save_gpt2(make_gpt2()))
    network, request = network_of(source), Request(mha=2, ffn=3, reach="all")
    text = torch.randint(0, 61, (4, 16))
    importance = measure_importance(network, text, removal_quotas(request, 4))
    converted = assemble(source, network, choose_homes(importance, request))
    with torch.no_grad():
        loss = converted(input_ids=text, labels=text).loss.item()
    assert loss == pytest.approx(importance.removals[-1].loss, abs=5e-6)


@pytest.mark.parametrize("variant", ["plain", "inverse layer scale"])
def test_reuse_equals_the_source_with_layers_replaced(make_gpt2, save_gpt2, logits, ids, variant):
    model = make_gpt2(**VARIANTS[variant])
    plan = choose_homes(gone_from(REMOVED), Request(mha=2, ffn=3, mha_steps=4, ffn_steps=4, reach="home"))
    replaced = copy.deepcopy(model)
    blocks, originals = replaced.transformer.h, model.transformer.h
    for layer, other in ((0, 1), (2, 1)):  # 2 is as near to 1 as to 3: the lower
        blocks[layer].ln_1 = copy.deepcopy(originals[other].ln_1)
        blocks[layer].attn = copy.deepcopy(originals[other].attn)
    blocks[1].ln_2, blocks[1].mlp = copy.deepcopy(originals[0].ln_2), copy.deepcopy(originals[0].mlp)
    converted = convert(open_source(save_gpt2(model)), plan)
    assert_close(logits(converted, ids), logits(replaced, ids))


def test_a_smaller_depth_equals_the_source_with_blocks_taken_out(make_gpt2, save_gpt2, logits, ids):
    model = make_gpt2()
    plan = choose_homes(gone_from({"mha": [2, 0], "ffn": [2, 0]}), Request(mha=2, ffn=2, depth=2, reach="all"))
    shorter = copy.deepcopy(model)
    shorter.transformer.h = nn.ModuleList([shorter.transformer.h[1], shorter.transformer.h[3]])
    converted = convert(open_source(save_gpt2(model)), plan)
    assert converted.config.num_steps == 2
    assert_close(logits(converted, ids), logits(shorter, ids))


@pytest.mark.parametrize("depth", [5, 7, 9])
def test_a_larger_depth_starts_equal_to_the_source(make_gpt2, save_gpt2, logits, ids, depth):
    model = make_gpt2()
    source = open_source(save_gpt2(model))
    converted = convert(source, full_plan(4, depth=depth))
    assert converted.config.num_steps == depth
    assert_close(logits(converted, ids), logits(model, ids))
    modules = [p.numel() for name, p in converted.named_parameters() if "router" not in name]
    assert sum(modules) == sum(p.numel() for p in model.parameters()) - 4 * 4 * 32  # deeper at the same weights


def test_routers_start_at_home_or_as_drawn(make_gpt2, save_gpt2, logits, ids):
    source = open_source(save_gpt2(make_gpt2()))
    home = convert(source, full_plan(4))
    random = choose_homes(gone_from(REMOVED), Request(mha=2, ffn=3, modules_per_token=2, init="random"))
    drawn, again, other = (convert(source, random, routers=RouterSettings(seed=seed)) for seed in (5, 5, 6))
    assert all(not p.any() for name, p in home.named_parameters() if name.endswith("_router.weight"))
    first, second, third = (
        {name: p for name, p in model.named_parameters() if "_router." in name} for model in (drawn, again, other)
    )
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)
    assert all(0.1 < p.std() * 32**0.5 * 3**0.5 < 1.9 for name, p in first.items() if name.endswith("weight"))
    assert drawn.config.home_bias == 0.0
    assert torch.equal(drawn.model.mha.qkv.weight, convert(source, pruned_plan()).model.mha.qkv.weight)
    assert logits(drawn, ids).isfinite().all()


def pruned_plan() -> HomePlan:
    return choose_homes(gone_from(REMOVED), Request(mha=2, ffn=3, reach="all"))


def test_a_router_with_a_hidden_layer_starts_at_home_and_random(make_gpt2, save_gpt2, logits, ids):
    model = make_gpt2()
    source = open_source(save_gpt2(model))
    converted = convert(source, full_plan(4), routers=RouterSettings(hidden=6))
    assert_close(logits(converted, ids), logits(model, ids))
    drawn = convert(source, full_plan(4, init="random"), routers=RouterSettings(hidden=6))
    bound = {name: p.abs().max() for name, p in drawn.named_parameters() if "_router." in name}
    assert bound["model.mha_router.w_in"] <= 32**-0.5 < bound["model.mha_router.weight"] <= 6**-0.5


def test_the_config_carries_what_the_source_says(make_gpt2):
    source = make_gpt2(n_inner=40, resid_pdrop=0.2, eos_token_id=3, layer_norm_epsilon=1e-3).config
    routers = RouterSettings(tau=0.2, hidden=8, home_bias=3.0, explore=0.1, skipped_keys="masked")
    config = mom_config(source, pruned_plan(), tied=False, routers=routers)
    assert config.intermediate_size == 40
    assert (config.resid_pdrop, config.eos_token_id, config.layer_norm_epsilon) == (0.2, 3, 1e-3)
    assert (config.vocab_size, config.n_positions, config.hidden_size) == (61, 48, 32)
    assert not config.tie_word_embeddings
    assert (config.router_tau, config.router_hidden, config.home_bias) == (0.2, 8, 3.0)
    assert (config.router_explore, config.skipped_keys) == (0.1, "masked")
    assert config.homes("mha") == list(pruned_plan().mha_homes)


def test_settings_that_no_model_can_have_are_a_users_mistake(make_gpt2):
    with pytest.raises(MomifyError, match="router_tau"):
        mom_config(make_gpt2().config, pruned_plan(), routers=RouterSettings(tau=0.0))


def test_a_given_folder_is_only_read(make_gpt2, save_gpt2):
    folder: Path = save_gpt2(make_gpt2())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    convert(open_source(folder), full_plan(4))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (got - expected).abs().max().item()
    assert difference <= PARITY, f"logits differ by {difference:.2e} (their spread is {expected.std():.2f})"


def test_what_stays_is_not_copied_and_what_goes_is_not_written(make_gpt2, save_gpt2, tmp_path):
    source = open_source(save_gpt2(make_gpt2()))
    network = network_of(source)
    expected = {name: getattr(network.layers, name)[[1, 3]].clone() for name in ("qkv_weight", "out_bias")}
    model = assemble(source, network, choose_homes(gone_from(REMOVED), Request(mha=2, ffn=3, reach="all")))
    qkv, down = model.model.mha.qkv.weight, model.model.ffn.down.weight
    assert torch.equal(qkv, expected["qkv_weight"])
    assert torch.equal(model.model.mha.out.bias, expected["out_bias"])
    assert qkv.data_ptr() == network.layers.qkv_weight.data_ptr()
    assert down.data_ptr() == network.layers.down_weight.data_ptr()
    model.save_pretrained(tmp_path / "m")
    written = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert 0 < written - 4 * model.num_parameters() < 10_000  # the header
