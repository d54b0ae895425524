"""Routers that may skip, on the demo model: training must not end with a step that every token skips."""

import pytest
import torch
from rich.console import Console

from momify.data.blocks import load_tokens
from momify.data.tokenizer import load_tokenizer
from momify.demo.recipe import demo_recipe
from momify.models import load_mom
from momify.pipeline import train
from momify.runs import opened_run
from momify.screen import Screen

BUDGET = ["mom.budget=0.7", "mom.patch_rank=8", "train.supervise=0.1"]


@pytest.mark.slow  # 60 steps of the demo model three times, a minute each on a free core
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("routing", "least"),
    [(["mom.reach=all"], 0.2), (["mom.reach=skip"], 0.2), (BUDGET, 0.02)],
    ids=["all", "skip", "budget"],
)
def test_no_step_that_calibration_found_useful_ends_all_skip(tmp_path, monkeypatch, routing, least):
    """`least`: the share of the tokens that runs at each half-step; a budget asks for skipping, down to its floor."""
    monkeypatch.chdir(tmp_path)
    overrides = [*routing, "mom.refit_tokens=16384", "train.steps=60", "train.batch_size=4",
                 "train.learning_rate=2e-3", "train.explore=0.2", "train.save_every=60", "eval.limit=2048"]  # fmt: skip
    recipe = demo_recipe(overrides)
    with opened_run(recipe, resume=False) as run:
        train(recipe, run, Screen(Console(quiet=True), quiet=True))
    model = load_mom(run.model)
    blocks = load_tokens(recipe.data, load_tokenizer(run.model)).valid_tensor(2048).view(-1, 256)
    with torch.inference_mode():
        records = [one for one in model(input_ids=blocks, output_router_logits=True).routing if one.routed]
    assert len(records) == 6 + 9  # every running half-step had a choice
    shares = {(one.kind, one.step): float((one.modules != one.skip).float().mean()) for one in records}
    assert min(shares.values()) > least, shares
