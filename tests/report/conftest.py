"""A report of two real tiny models, and parts to build others from."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from momify.evaluate.perplexity import Perplexity
from momify.measure.cost import parameters
from momify.measure.latency import Timing, measure_latency
from momify.measure.macs import count_macs
from momify.measure.memory import measure_memory
from momify.measure.routing import collect
from momify.model import MomConfig, MomForCausalLM
from momify.report.data import Measured, Quality
from momify.report.provenance import Origin, collect_provenance

Parts = dict[str, Any]


def scored(perplexity: float, loss: float = 2.5) -> Perplexity:
    protocol = "block 16, stride 16, 160 tokens, float32, first token of a window unscored"
    return Perplexity(loss, perplexity, 1.25, 160, 150, 10, protocol)


def tiny_mom() -> MomForCausalLM:
    """Half of the attention modules of `tiny_gpt2`, attention in 2 of 4 steps, some steps routed."""
    model = MomForCausalLM(
        MomConfig(
            vocab_size=61, n_positions=48, hidden_size=32, num_attention_heads=4, intermediate_size=128,
            num_mha_modules=2, num_ffn_modules=3, num_steps=4, bos_token_id=0, eos_token_id=0,
            mha_homes=[0, 2, 1, 2], mha_reach=[[0], [2], [0, 1, 2], [2]],
            ffn_homes=[0, 1, 2, 0], ffn_reach=[[0], [0, 1, 2, 3], [2], [0, 3]],
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def _measured() -> Parts:
    return {}


@pytest.fixture
def parts(make_gpt2: Callable[..., GPT2LMHeadModel], _measured: Parts) -> Parts:
    """Arguments of build_report, measured once a module."""
    if not _measured:
        models = {"source": make_gpt2(), "mom": tiny_mom()}
        inputs = [torch.randint(0, 61, (1, 12)) for _ in range(3)]
        for side, model in models.items():
            counts = count_macs(model, inputs, counted=2)
            _measured[side] = Measured(side, parameters(model.config), measure_memory(model, inputs[0]), counts)
        _measured["quality"] = Quality(scored(12.0), scored(15.0), scored(12.6))
        origin = Origin("gpt2-tiny", "ab" * 32, 0, {"run": {"name": "x"}}, "momify run x.yaml")
        _measured["provenance"] = collect_provenance(origin)
        _measured["latency"] = measure_latency(models, Timing(8, 4, 2, 0))
        _measured["routing"] = collect(models["mom"], inputs)
    return dict(_measured)


@pytest.fixture
def with_speed(parts: Parts) -> Callable[[float, float], Parts]:
    """The parts with the MoM this many times as fast as the source at prefill and decode."""

    def change(prefill: float, decode: float) -> Parts:
        latency = parts["latency"]
        source = latency.speeds["source"]
        mom = replace(
            source,
            prefill=replace(source.prefill, median=source.prefill.median * prefill),
            decode=replace(source.decode, median=source.decode.median * decode),
        )
        return {**parts, "latency": replace(latency, speeds={"source": source, "mom": mom})}

    return change
