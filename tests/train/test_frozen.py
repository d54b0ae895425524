"""train/frozen.py: what does not learn keeps its bits, and the rest learns as it would beside it."""

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

SHAPE = {
    "vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
    "num_mha_modules": 2, "num_ffn_modules": 2, "num_steps": 4, "patch_rank": 2,
    "mha_homes": [0, 2, 1, 2], "mha_reach": [[0], [2], [1], [2]],
    "ffn_homes": [0, 1, 2, 2], "ffn_reach": [[0], [1], [2], [2]], "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
EMBEDDINGS = {"model.wte.weight", "model.wpe.weight"}


@pytest.fixture
def data() -> TokenData:
    tokens = np.random.default_rng(0).integers(0, 61, 16 * 60).astype(np.uint16)
    return TokenData(tokens[: 16 * 50], tokens[16 * 50 :], 16, "0" * 32)


def mom(**changes: object) -> MomForCausalLM:
    set_seed(3)
    return MomForCausalLM(MomConfig(**{**SHAPE, **changes}))


def trained(folder: Path, model: MomForCausalLM, teacher: GPT2LMHeadModel | None, data: TokenData, **changes: object):
    """Names and weights of the last checkpoint, and its optimizer's state."""
    values = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "clip": 0.0, "warmup": 0.0}
    settings = TrainBlock(**{**values, **changes})
    folder.mkdir()
    set_seed(0)
    fit(model, teacher, data, settings, Place(folder, "test", Console(quiet=True)), [0, 1, 2, 3])
    last = folder / "checkpoints" / f"checkpoint-{settings.steps}"
    return load_file(last / "model.safetensors"), torch.load(last / "optimizer.pt", weights_only=True)["state"]


WAYS = {
    "adamw": {"optimizer": "adamw"},
    "normuon": {"optimizer": "normuon"},
    "checkpointed": {"gradient_checkpointing": True, "hidden": 0.5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_keep_their_bits_and_have_no_state(tmp_path, data, make_gpt2, way, tied):
    model = mom(tie_word_embeddings=tied)
    begin = {name: tensor.clone() for name, tensor in model.named_parameters()}
    after, state = trained(tmp_path / "run", model, make_gpt2(), data, freeze_embeddings=True, **WAYS[way])
    still = EMBEDDINGS if tied else {*EMBEDDINGS, "lm_head.weight"}
    for name, tensor in begin.items():
        assert torch.equal(after[name], tensor) == (name in still), name
    assert len(state) == len(begin) - len(still)


def test_the_rest_makes_the_first_step_that_it_would_have_made(tmp_path, data, make_gpt2):
    """AdamW moves each weight by its own gradient, which in the first step is that of the same model."""
    teacher = make_gpt2()
    how = {"steps": 1, "optimizer": "adamw"}
    free, _ = trained(tmp_path / "free", mom(), teacher, data, **how)
    frozen, _ = trained(tmp_path / "frozen", mom(), teacher, data, freeze_embeddings=True, **how)
    for name, tensor in free.items():
        if name not in EMBEDDINGS:
            torch.testing.assert_close(frozen[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
        else:
            assert not torch.equal(frozen[name], tensor), name


def test_a_run_cut_short_goes_on_to_the_same_bits(tmp_path, data, make_gpt2):
    teacher, settings = make_gpt2(), {"freeze_embeddings": True, "save_every": 1, "steps": 3}
    whole, _ = trained(tmp_path / "whole", mom(), teacher, data, **settings)
    block = TrainBlock(
        **{"batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "clip": 0.0, "warmup": 0.0}, **settings
    )
    folder = tmp_path / "whole"
    for name in ("checkpoint-2", "checkpoint-3"):
        for file in (folder / "checkpoints" / name).iterdir():
            file.unlink()
        (folder / "checkpoints" / name).rmdir()
    fit(mom(), teacher, data, block, Place(folder, "test", Console(quiet=True), resume=True), [0, 1, 2, 3])
    again = load_file(folder / "checkpoints" / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_without_a_source_there_is_nothing_to_keep(tmp_path, data):
    with pytest.raises(MomifyError, match=r"train\.freeze_embeddings is of phase 2"):
        trained(tmp_path / "run", mom(), None, data, freeze_embeddings=True, distill=0.0, cross_entropy=1.0)
