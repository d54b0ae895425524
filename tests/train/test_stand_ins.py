"""train/stand_ins.py: what is held back does not move by a bit, what learns does so as if the rest were not there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, set_seed

from momify.data.blocks import TokenData
from momify.errors import MomifyError
from momify.model import MomConfig, MomForCausalLM
from momify.recipe_blocks import TrainBlock
from momify.train.fit import Place, fit

STEPS, ALONE = 8, 4
SHAPE = {
    "vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
    "num_mha_modules": 2, "num_ffn_modules": 2, "num_steps": 4, "patch_rank": 2, "step_rank": 2,
    "mha_homes": [0, 0, 1, 2], "mha_reach": [[0], [0], [0, 1, 2], [2]],
    "ffn_homes": [0, 1, 1, 0], "ffn_reach": [[0, 1, 2], [1], [1], [0, 2]], "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LAYERS = [0, 1, 2, 3]
WAYS = {
    "adamw": {"optimizer": "adamw"},
    "normuon, hidden states": {"optimizer": "normuon", "hidden": 0.5},
    "muon, no clipping, checkpointed, cut": {
        "optimizer": "muon",
        "clip": 0.0,
        "gradient_checkpointing": True,
        "micro_batch": 2,
    },
}


def added(name: str) -> bool:
    """As the names in a state dict say, read apart from the code."""
    return name.split(".")[1].endswith(("_router", "_patch", "_delta"))


@pytest.fixture
def data() -> TokenData:
    tokens = np.random.default_rng(0).integers(0, 61, 16 * 60).astype(np.uint16)
    return TokenData(tokens[: 16 * 50], tokens[16 * 50 :], 16, "0" * 32)


@pytest.fixture
def teach(make_gpt2: Callable[..., GPT2LMHeadModel]) -> Callable[[], GPT2LMHeadModel]:
    """Makes the same teacher at each call, without touching the seed of the run."""

    def make() -> GPT2LMHeadModel:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return make_gpt2()

    return make


def mom(**changes: object) -> MomForCausalLM:
    set_seed(3)
    model = MomForCausalLM(MomConfig(**{**SHAPE, "router_explore": 0.3, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if added(name) and "router" not in name:
                parameter.normal_(std=0.1)
    return model


def block(**changes: object) -> TrainBlock:
    values = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "save_every": 1, "keep": 99,
              "log_every": 1, "clip": 0.05, "warmup": 0.0, "stand_ins_first": ALONE / STEPS}  # fmt: skip
    return TrainBlock(**{**values, **changes})


def train(folder: Path, model: MomForCausalLM, pair: tuple, settings: TrainBlock, resume: bool = False) -> Path:
    """Train from (data, teacher); the folder with the checkpoints."""
    folder.mkdir(exist_ok=True)
    set_seed(0)
    place = Place(folder, "test", Console(quiet=True), 0, resume)
    fit(model, pair[1], pair[0], settings, place, LAYERS)
    return folder / "checkpoints"


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def bits(folder: Path) -> dict[object, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint."""
    state = torch.load(folder / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"]
    return weights(folder, STEPS) | {
        (place, name): value for place, one in state.items() for name, value in one.items()
    }


@pytest.mark.parametrize("way", WAYS)
def test_the_others_stay_to_the_bit_and_then_all_learn(tmp_path, data, teach, way):
    begin = {name: tensor.clone() for name, tensor in mom().state_dict().items()}
    folder = train(tmp_path / "run", mom(), (data, teach()), block(**WAYS[way]))
    for name, tensor in weights(folder, ALONE).items():
        assert torch.equal(tensor, begin[name]) != added(name), name
    before, after = weights(folder, ALONE), weights(folder, ALONE + 1)
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_it_is_as_if_the_others_could_not_learn_at_all(tmp_path, data, teach, way):
    folder = train(tmp_path / "run", mom(), (data, teach()), block(**WAYS[way]))
    frozen = mom()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(added(name))
    other = train(tmp_path / "frozen", frozen, (data, teach()), block(**{**WAYS[way], "stand_ins_first": 0.0}))
    for step in (1, ALONE):
        ours, theirs = weights(folder, step), weights(other, step)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7, msg=name)
    for ours, theirs in zip(rows(tmp_path / "run"), rows(tmp_path / "frozen")[:ALONE], strict=False):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "loss" in row]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in found]


def test_the_optimizer_keeps_nothing_of_who_does_not_learn(tmp_path, data, teach):
    folder = train(tmp_path / "run", mom(), (data, teach()), block(optimizer="muon"))
    learned = len([name for name, _ in mom().named_parameters() if added(name)])
    for step, expected in ((ALONE, learned), (ALONE + 1, len(list(mom().parameters())))):
        state = torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
        assert len(state) == expected
    assert {int(one["step"]) for one in state.values()} == {1, ALONE + 1}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("cut", [2, ALONE, 6])
def test_a_run_cut_in_either_phase_goes_on_to_the_same_bits(tmp_path, data, teach, optimizer, cut):
    settings = block(optimizer=optimizer, hidden=0.5)
    whole = train(tmp_path / "whole", mom(), (data, teach()), settings)
    again = tmp_path / "cut" / "checkpoints"
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(cut + 1, STEPS + 1):
        shutil.rmtree(again / f"checkpoint-{step}")
    train(tmp_path / "cut", mom(), (data, teach()), settings, resume=True)
    ours, theirs = (bits(folder) for folder in (again, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_refused_where_nothing_was_added(tmp_path, data, teach):
    place = Place(tmp_path / "run", "test", Console(quiet=True))
    static = {"mha_reach": [[0], [0], [1], [2]], "ffn_reach": [[0], [1], [1], [0]]}
    with pytest.raises(MomifyError, match=r"mom\.patch_rank or mom\.step_rank"):
        fit(mom(**static, patch_rank=0, step_rank=0), teach(), data, block(), place)
    untaught = mom(patch_rank=0, step_rank=0, router_explore=0.0)  # routers are there, but nothing teaches them
    with pytest.raises(MomifyError, match="routers that are taught"):
        fit(untaught, teach(), data, block(), place)
    with pytest.raises(MomifyError, match="phase 2"):
        fit(teach(), None, data, block(), place)
