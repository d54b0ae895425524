"""train/micro_batches.py: a step is the whole batch's, however it is cut and however many blocks are left."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import GPT2LMHeadModel, PreTrainedModel, set_seed

from momify.data.blocks import TokenData
from momify.model import MomConfig, MomForCausalLM
from momify.recipe_blocks import TrainBlock
from momify.train.fit import Place, fit
from momify.train.losses import distillation_loss, next_token_loss
from momify.train.micro_batches import micro_batches
from momify.train.trainer import MomTrainer

BATCH, LENGTH = 8, 16
Gradients = dict[str, torch.Tensor]


@settings(max_examples=30, deadline=None)
@given(blocks=st.integers(1, 12), size=st.one_of(st.none(), st.integers(1, 12)))
def test_parts_are_the_batch_in_its_order_and_weigh_what_they_hold(blocks: int, size: int | None) -> None:
    batch = {"input_ids": torch.arange(blocks * 3).view(blocks, 3), "block": torch.arange(blocks)[:, None]}
    parts = micro_batches(batch, size)
    for name, value in batch.items():
        assert torch.equal(torch.cat([part[name] for _, part in parts]), value)
    for share, part in parts:
        assert len(part["block"]) <= (size or blocks)
        assert share == pytest.approx(len(part["block"]) / blocks)


def data_of(blocks: int) -> TokenData:
    tokens = np.random.default_rng(0).integers(0, 61, LENGTH * (blocks + 4)).astype(np.uint16)
    return TokenData(tokens[: LENGTH * blocks], tokens[LENGTH * blocks :], LENGTH, "0" * 32)


def mom() -> MomForCausalLM:
    set_seed(3)
    config = MomConfig(
        vocab_size=61, n_positions=48, hidden_size=32, num_attention_heads=4, intermediate_size=64,
        num_mha_modules=2, num_ffn_modules=3, num_steps=3, router_explore=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return MomForCausalLM(config)


def train(folder: Path, model: PreTrainedModel, teacher: PreTrainedModel | None, data: TokenData, **changes: object):
    """The rows of metrics.jsonl that have a loss."""
    values = {"steps": 1, "batch_size": BATCH, "precision": "fp32", "optimizer": "adamw", "log_every": 1, "clip": 0.0}
    folder.mkdir()
    set_seed(0)
    fit(model, teacher, data, TrainBlock(**{**values, **changes}), Place(folder, "test", Console(quiet=True)))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture
def teacher(make_gpt2: Callable[..., GPT2LMHeadModel]) -> GPT2LMHeadModel:
    return make_gpt2()


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Gradients]:
    """Those of each step that is trained, as the optimizer gets them."""
    found: list[Gradients] = []

    def note(trainer: MomTrainer, model: torch.nn.Module) -> None:
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(MomTrainer, "_judge_step", note)
    return found


@pytest.mark.parametrize("blocks", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("taught", [True, False])
def test_the_gradient_is_that_of_the_whole_batch(
    tmp_path: Path, teacher: GPT2LMHeadModel, gradients: list[Gradients], blocks: int, taught: bool
) -> None:
    """And of a plain loop over the losses, on spliced blocks where there is a source: some labels are not scored."""
    data, sizes = data_of(blocks), (1, 2, 4, None)
    weights = {"cross_entropy": 0.5, "distill": 1.0, "splice": 4} if taught else {}
    for size in sizes:
        train(tmp_path / str(size), mom(), teacher if taught else None, data, micro_batch=size, **weights)
    model = mom().train()
    every = [data.spliced_blocks(4 if taught else 1)[index] for index in range(blocks)]
    ids, labels = (torch.stack([block[name] for block in every]) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids, use_cache=False).logits
    loss = next_token_loss(logits, labels)
    if taught:
        loss = 0.5 * loss + distillation_loss(logits, teacher(input_ids=ids).logits.detach())
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(sizes)
    for found in gradients:
        assert found.keys() >= expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_what_is_logged_is_the_same_however_batches_are_cut(tmp_path: Path, teacher: GPT2LMHeadModel) -> None:
    """Over passes of 8 and 6 blocks, each line a mean over several steps."""
    runs = [
        train(tmp_path / str(size), mom(), teacher, data_of(14), micro_batch=size, steps=6, log_every=3)
        for size in (None, 4, 1)
    ]
    assert [row["tokens"] for row in runs[0]] == [LENGTH * 22, LENGTH * 42]
    for rows in runs[1:]:
        for ours, theirs in zip(rows, runs[0], strict=True):
            del ours["tokens_per_second"]
            assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-4, abs=1e-6)
