"""Checkpoints on disk in every form that a GPT-2 comes in, and GPT-2s with sublayers taken out."""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2LMHeadModel

from momify.convert.assemble import network_of as network_of_source
from momify.convert.network import HalfWeights, Network, half_weights
from momify.model import MomConfig, MomForCausalLM

Save = Callable[..., Path]


def write_config(folder: Path, model: GPT2LMHeadModel) -> None:
    data = json.loads(model.config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps({**data, "model_type": "gpt2"}))


def state_without_tied_head(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def save_form(model: GPT2LMHeadModel, folder: Path, form: str = "safetensors") -> Path:
    """Write `model` as safetensors, bin, sharded-safetensors, sharded-bin, no-prefix or old-buffers."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, model)
    state = state_without_tied_head(model)
    if form == "no-prefix":
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    if form == "old-buffers":
        for layer in range(model.config.n_layer):
            mask = torch.ones(1, 1, 48, 48, dtype=torch.uint8).tril()
            state |= {f"transformer.h.{layer}.attn.bias": mask}
            state |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
    suffix = "bin" if form.endswith("bin") else "safetensors"
    write = torch.save if suffix == "bin" else save_file
    stem = "pytorch_model" if suffix == "bin" else "model"
    if not form.startswith("sharded"):
        write(state, folder / f"{stem}.{suffix}")
        return folder
    names = sorted(state)
    files = {f"{stem}-0000{i + 1}-of-00003.{suffix}": names[i::3] for i in range(3)}
    for file, part in files.items():
        write({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def save_gpt2(tmp_path: Path) -> Save:
    """Writes a model to a folder in one of the forms, and gives the folder."""

    def save(model: GPT2LMHeadModel, form: str = "safetensors", name: str = "source") -> Path:
        return save_form(model, tmp_path / name, form)

    return save


def silence(model: GPT2LMHeadModel, removed: Iterable[tuple[str, int]]) -> GPT2LMHeadModel:
    """A copy of `model` in which the sublayers (kind, layer) add exactly nothing."""
    quiet = copy.deepcopy(model)
    for kind, layer in removed:
        block = quiet.transformer.h[layer]
        projection = (block.attn if kind == "mha" else block.mlp).c_proj
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    return quiet


@pytest.fixture
def network_of() -> Callable[[GPT2LMHeadModel], Network]:
    """The network that a GPT-2 is taken apart into, with no file between."""

    def apart(model: GPT2LMHeadModel) -> Network:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
        return network_of_source(SimpleNamespace(tensors=tensors, config=model.config))

    return apart


@pytest.fixture
def without() -> Callable[[GPT2LMHeadModel, Iterable[tuple[str, int]]], GPT2LMHeadModel]:
    """`silence`: a copy with sublayers taken out, made of transformers' own blocks."""
    return silence


@pytest.fixture
def logits() -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """The logits of a causal language model, without cache."""

    @torch.no_grad()
    def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits.float()

    return run


@pytest.fixture
def ids() -> torch.Tensor:
    """(3, 20) token ids, drawn once."""
    return torch.randint(0, 53, (3, 20), generator=torch.Generator().manual_seed(7))


ROUTED_SHAPE = {
    "vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
    "bos_token_id": 0, "eos_token_id": 0,
    "num_mha_modules": 3, "num_ffn_modules": 3, "num_steps": 3, "mha_homes": [0, 1, 2], "ffn_homes": [0, 1, 2],
    "mha_reach": [[0, 3], [1, 3], [2]], "ffn_reach": [[0, 3], [1, 3], [2, 3]], "patch_rank": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def routed_model() -> Callable[..., MomForCausalLM]:
    """Makes a random MoM whose half-steps, but one, may run their home or skip."""

    def make(**changes: Any) -> MomForCausalLM:
        model = MomForCausalLM(MomConfig(**{**ROUTED_SHAPE, **changes}))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                std = 0.5 if "wte" in name else 0.0 if "ln_f.bias" in name else 0.15
                if "ln_f.weight" not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def text() -> Callable[..., torch.Tensor]:
    """Makes random tokens (rows, 32) for it."""

    def make(rows: int = 24, seed: int = 4) -> torch.Tensor:
        return torch.randint(1, 61, (rows, 32), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def easy_text() -> torch.Tensor:
    """(768, 32) tokens with something to learn: each is its predecessor plus 1 or 2."""
    generator = torch.Generator().manual_seed(3)
    start, steps = torch.randint(0, 61, (768, 1), generator=generator), torch.randint(1, 3, (768, 31))
    return torch.cat([start, start + steps.cumsum(1)], 1) % 61


@pytest.fixture
def kept_of() -> Callable[[Network, Iterable[int]], dict[int, HalfWeights]]:
    """The half-layers of a network that run, all but those that are gone."""

    def kept(network: Network, gone: Iterable[int]) -> dict[int, HalfWeights]:
        halves = range(2 * network.layers.num_layers)
        return {half: half_weights(network.layers, half) for half in halves if half not in set(gone)}

    return kept
