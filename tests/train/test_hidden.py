"""train/hidden.py against transformers' own hidden states and a plain loop, in every way of training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import GPT2LMHeadModel, set_seed

from momify.convert.assemble import assemble, network_of
from momify.convert.homes import HomePlan, Request, choose_homes
from momify.convert.importance import Importance
from momify.convert.refit import goal_behind
from momify.convert.refit import half_steps as planned_half_steps
from momify.convert.source import open_source
from momify.data.blocks import TokenData
from momify.errors import MomifyError
from momify.model import MomConfig, MomForCausalLM
from momify.model.half import run_half
from momify.models import step_layers
from momify.recipe_blocks import HIDDEN, TrainBlock
from momify.train.fit import Place, fit
from momify.train.hidden import HiddenGap, HiddenGoal, matching_depths, residuals, source_variances

Convert = Callable[[HomePlan], MomForCausalLM]
PARTS = ("loss", "distill", "hidden")
WAYS = {
    "removed, patched": {"mha": 2, "ffn": 3, "patch_rank": 2},
    "removed, bare": {"mha": 2, "ffn": 3},
    "shared": {"mha": 2, "ffn": 3, "mha_steps": 4, "step_rank": 2},
    "routed": {"mha": 2, "ffn": 3, "reach": "all"},
    "shallower": {"mha": 2, "ffn": 2, "depth": 3},
    "deeper": {"mha": 3, "ffn": 3, "depth": 6},
    "two picks": {"mha": 3, "ffn": 3, "modules_per_token": 2},
}


def plan_of(**request: object) -> HomePlan:
    """A plan that removes, as far as it must, attention 0 and 2 and feed-forward 3 and 1 first."""
    importance = Importance("leave_one_out", 4, 1, 1.0, (0.0, 9.0, 1.0, 8.0), (7.0, 1.0, 9.0, 0.0))
    return choose_homes(importance, Request(**request))


@pytest.fixture
def teacher(make_gpt2: Callable[..., GPT2LMHeadModel]) -> GPT2LMHeadModel:
    return make_gpt2()


@pytest.fixture
def convert(teacher: GPT2LMHeadModel, tmp_path: Path) -> Convert:
    """Makes the MoM of a plan from the teacher."""
    teacher.save_pretrained(tmp_path / "source")

    def make(plan: HomePlan) -> MomForCausalLM:
        source = open_source(tmp_path / "source")
        return assemble(source, network_of(source), plan)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (6, 20), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def data() -> TokenData:
    tokens = np.random.default_rng(0).integers(0, 61, 16 * 60).astype(np.uint16)
    return TokenData(tokens[: 16 * 50], tokens[16 * 50 :], 16, "0" * 32)


@torch.no_grad()
def by_hand(teacher: GPT2LMHeadModel, ids: torch.Tensor) -> list[np.ndarray]:
    """The source's residuals (n, D) behind 0, 1, .. 2L half-layers, by a plain loop over its sublayers."""
    body = teacher.transformer
    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    found = [x]
    for block in body.h:
        x = x + block.attn(block.ln_1(x))[0]
        found.append(x)
        x = x + block.mlp(block.ln_2(x))
        found.append(x)
    return [each.flatten(0, 1).double().numpy() for each in found]


@torch.no_grad()
def ours_by_hand(model: MomForCausalLM, ids: torch.Tensor) -> tuple[dict, np.ndarray]:
    """The MoM's residual in front of each half-step that runs, and at the end."""
    x, shared = model.model.begin(ids)
    before = {}
    for half in (half for step in model.model.steps for half in step):
        before[half.kind, half.step] = x.double().numpy()
        y, _ = run_half(x, half, shared)
        x = x if y is None else x + y
    return before, x.double().numpy()


def hidden_loss(model: MomForCausalLM, teacher: GPT2LMHeadModel, ids: torch.Tensor, layers: list) -> torch.Tensor:
    depths = matching_depths(model.config, layers, teacher.config.n_layer)
    goal = HiddenGoal(depths, source_variances(teacher, depths.values(), ids))
    with torch.no_grad(), residuals(teacher, depths.values()) as seen:
        teacher(input_ids=ids, use_cache=False)
    gap = HiddenGap(goal, seen)
    model(input_ids=ids, use_cache=False, observe=gap)
    return gap.loss()


def test_residuals_are_those_of_transformers_and_leave_no_hooks(teacher, ids):
    with torch.no_grad(), residuals(teacher, range(9)) as seen:
        out = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
    expected = by_hand(teacher, ids)
    for depth in range(9):
        np.testing.assert_allclose(seen[depth].flatten(0, 1).numpy(), expected[depth], rtol=1e-4, atol=1e-5)
    for layer in range(4):
        assert torch.equal(seen[2 * layer], out.hidden_states[layer])
    assert torch.equal(teacher.transformer.ln_f(seen[8]), out.hidden_states[4])
    seen.clear()
    teacher(input_ids=ids, use_cache=False)
    assert not seen


@pytest.mark.parametrize("way", WAYS)
def test_depths_are_the_goals_of_the_refit(convert, way):
    plan = plan_of(**WAYS[way])
    halves = planned_half_steps(plan)
    goals = {goal for index in range(len(halves)) if (goal := goal_behind(halves, index, 8)) is not None}
    depths = matching_depths(convert(plan).config, list(plan.step_layers), 4)
    assert set(depths.values()) == goals
    assert len(depths) == len(goals)
    for place, depth in depths.items():
        assert depth == (8 if place is None else 2 * plan.step_layers[place[1]] + (place[0] == "ffn"))


@pytest.mark.parametrize("way", WAYS)
def test_loss_is_the_mean_over_depths_of_a_plain_loop(convert, teacher, ids, way):
    plan = plan_of(**WAYS[way])
    model, source = convert(plan), by_hand(teacher, ids)
    before, end = ours_by_hand(model, ids)
    gaps = []
    for place, depth in matching_depths(model.config, list(plan.step_layers), 4).items():
        variance = source[depth].var(axis=0).mean()
        gaps.append(np.square((end if place is None else before[place]) - source[depth]).mean() / variance)
    found = hidden_loss(model, teacher, ids, list(plan.step_layers)).detach()
    assert float(found) == pytest.approx(np.mean(gaps), rel=1e-4)
    assert float(found) > 0.01


def test_full_pool_at_home_has_nothing_to_learn(convert, teacher, ids):
    plan = plan_of(mha=4, ffn=4, reach="all")
    assert float(hidden_loss(convert(plan), teacher, ids, list(plan.step_layers)).detach()) < 1e-9


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_is_that_of_the_residuals_themselves(convert, teacher, ids, checkpointed):
    plan = plan_of(**WAYS["removed, patched"])
    model, source = convert(plan), by_hand(teacher, ids)
    if checkpointed:
        model.train()
        model.gradient_checkpointing_enable()
    hidden_loss(model, teacher, ids, list(plan.step_layers)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (x, shared), total = model.model.begin(ids), 0.0
    depths = matching_depths(model.config, list(plan.step_layers), 4)
    places = [half for step in model.model.steps for half in step]
    for half in places:
        if (depth := depths.get((half.kind, half.step))) is not None:
            total = total + (x - torch.tensor(source[depth])).square().mean() / source[depth].var(axis=0).mean()
        y, _ = run_half(x, half, shared)
        x = x + y
    total = total + (x - torch.tensor(source[8])).square().mean() / source[8].var(axis=0).mean()
    (total / len(depths)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert {"model.wte.weight", "model.mha.qkv.weight", "model.mha_patch.weight_out"} <= found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def train(folder: Path, pair: tuple, data: TokenData, **changes: object) -> list[dict]:
    """Train a fresh MoM of (plan, convert, teacher); the rows of metrics.jsonl with a loss."""
    plan, convert, teacher = pair
    model = convert(plan)
    folder.mkdir()
    values = {"steps": 6, "batch_size": 4, "learning_rate": 3e-3, "precision": "fp32", "save_every": 10, "log_every": 1,
              "hidden": 0.5}  # fmt: skip
    set_seed(0)
    place = Place(folder, "test", Console(quiet=True))
    fit(model, teacher, data, TrainBlock(**{**values, **changes}), place, list(plan.step_layers))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_it_is_a_part_of_the_loss_and_falls(tmp_path, convert, teacher, data):
    pair = plan_of(**WAYS["removed, patched"]), convert, teacher
    rows = train(tmp_path / "run", pair, data, steps=40, distill=2.0, learning_rate=1e-2)
    for row in rows:
        weight = 0.5 * (41 - row["step"]) / 40  # falls to 0
        assert row["loss"] == pytest.approx(2.0 * row["distill"] + weight * row["hidden"], rel=1e-4)
    assert sum(row["hidden"] for row in rows[-5:]) < 0.8 * sum(row["hidden"] for row in rows[:5])
    assert not any("hidden" in row for row in train(tmp_path / "without", pair, data, hidden=0.0))


def test_it_is_on_by_default_where_steps_stand_for_layers(tmp_path, convert, teacher, data):
    pair = plan_of(**WAYS["removed, patched"]), convert, teacher
    for row in train(tmp_path / "home", pair, data, hidden=None):
        weight = HIDDEN * (7 - row["step"]) / 6
        assert row["loss"] == pytest.approx(row["distill"] + weight * row["hidden"], rel=1e-4)
    labels_alone = train(tmp_path / "labels", pair, data, hidden=None, distill=0.0, cross_entropy=1.0)
    assert not any("hidden" in row for row in labels_alone)
    place, settings = Place(tmp_path / "drawn", "test", Console(quiet=True)), TrainBlock(steps=1, batch_size=4)
    fit(convert(plan_of(mha=2, ffn=3)), teacher, data, settings, place, None)
    assert '"hidden"' not in (tmp_path / "drawn" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("way", ["removed, patched", "routed", "two picks"])
def test_cutting_batches_and_checkpointing_change_memory_not_results(tmp_path, convert, teacher, data, way):
    pair = plan_of(**WAYS[way]), convert, teacher
    whole = train(tmp_path / "whole", pair, data)
    for name, changes in {"cut": {"micro_batch": 1}, "checkpointed": {"gradient_checkpointing": True}}.items():
        for ours, theirs in zip(train(tmp_path / name, pair, data, **changes), whole, strict=True):
            assert [ours[part] for part in PARTS] == pytest.approx([theirs[part] for part in PARTS], rel=1e-4)


def test_bf16_is_close_to_float32(tmp_path, convert, teacher, data):
    pair = plan_of(**WAYS["routed"]), convert, teacher
    exact, rough = (train(tmp_path / kind, pair, data, precision=kind) for kind in ("fp32", "bf16"))
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours["hidden"] == pytest.approx(theirs["hidden"], rel=0.03)


def test_refused_where_it_cannot_be(tmp_path, convert, teacher, data, make_gpt2):
    place, settings = Place(tmp_path / "run", "test", Console(quiet=True)), TrainBlock(hidden=1.0, steps=1)
    model = convert(plan_of(mha=2, ffn=3))
    with pytest.raises(MomifyError, match="phase 2"):
        fit(teacher, None, data, settings, place)
    for nothing in (None, [], [None] * 4):
        with pytest.raises(MomifyError, match="convert with init home"):
            fit(model, teacher, data, settings, place, nothing)
    for wrong in ([0, 1, 2], [0, 1, 2, 4], [0, 2, 1, 3], [0, 0, 1, 2]):
        with pytest.raises(MomifyError, match="not that of its steps"):
            fit(model, teacher, data, settings, place, wrong)
    with pytest.raises(MomifyError, match="32 wide and its source's 48"):
        fit(model, make_gpt2(n_embd=48), data, settings, place, [0, 1, 2, 3])


def test_step_layers_come_from_the_plan_that_made_the_model():
    plan = plan_of(mha=3, ffn=3, depth=6)
    stored = json.loads(json.dumps({"plan": plan.to_dict()}))
    assert step_layers(stored) == list(plan.step_layers)
    assert step_layers({}) is None
    assert step_layers({"plan": {**stored["plan"], "init": "random"}}) is None
    for broken in ("0123", [0, "1"], [0, True], [], [None], [[0]]):
        with pytest.raises(MomifyError, match="convert the source again"):
            step_layers({"plan": {"step_layers": broken}})


def test_observers_see_every_half_step_and_the_end():
    config = MomConfig(vocab_size=61, n_positions=16, hidden_size=16, num_attention_heads=2, intermediate_size=32,
                       num_mha_modules=2, num_ffn_modules=2, num_steps=2, mha_reach=[[0], [1]],
                       ffn_reach=[[0, 2], [1]])  # fmt: skip
    seen = []
    MomForCausalLM(config)(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False, observe=seen.append)
    assert [None if s.half is None else (s.half.kind, s.half.step) for s in seen] == [
        ("mha", 0), ("ffn", 0), ("mha", 1), ("ffn", 1), None,
    ]  # fmt: skip
    assert [s.router is not None for s in seen] == [False, True, False, False, False]
