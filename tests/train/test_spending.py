"""train/spending.py: the budget is held while a small model trains, floors hold, and a resumed run goes on the same."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import GPT2LMHeadModel, Trainer, TrainerControl, TrainerState, set_seed

from momify.data.blocks import TokenData
from momify.errors import MomifyError
from momify.measure.budget import budget_of
from momify.model import MomConfig, MomForCausalLM, RoutingRecord
from momify.recipe_blocks import TrainBlock
from momify.train import fit as fit_module
from momify.train.fit import Place, fit
from momify.train.spending import BudgetHold

STEPS = 60


@pytest.fixture
def data() -> TokenData:
    tokens = np.random.default_rng(0).integers(0, 61, 16 * 60).astype(np.uint16)
    return TokenData(tokens[: 16 * 50], tokens[16 * 50 :], 16, "0" * 32)


def block(**changes: object) -> TrainBlock:
    values = {"steps": STEPS, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32", "save_every": 25,
              "log_every": 1, "supervise": 1.0, "budget": 0.8}  # fmt: skip
    return TrainBlock(**{**values, **changes})


def mom(**changes: object) -> MomForCausalLM:
    set_seed(3)
    values = {"vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
              "num_mha_modules": 2, "num_ffn_modules": 2, "num_steps": 2, "mha_homes": [0, 1], "ffn_homes": [0, 1],
              "mha_reach": [[0, 2], [1]], "ffn_reach": [[0, 2], [1, 2]], "patch_rank": 2,
              "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    return MomForCausalLM(MomConfig(**{**values, **changes}))


def train(
    folder: Path, data: TokenData, settings: TrainBlock, make_gpt2: Callable[..., GPT2LMHeadModel], resume: bool = False
) -> tuple[MomForCausalLM, list[dict]]:
    folder.mkdir(exist_ok=True)
    model = mom()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = make_gpt2()
    set_seed(0)
    fit(model, teacher, data, settings, Place(folder, "test", Console(quiet=True), 0, resume))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return model, [row for row in map(json.loads, lines) if "loss" in row]


def test_the_budget_is_held_and_no_step_is_swallowed(tmp_path, data, make_gpt2):
    model, rows = train(tmp_path / "run", data, block(), make_gpt2)
    late = rows[-20:]
    assert rows[0]["spent"] > 0.99  # at the start every token is at home
    assert np.mean([row["spent"] for row in late]) == pytest.approx(0.8, abs=0.02)
    for place in ("mha/0", "ffn/0", "ffn/1"):
        assert np.mean([row.get(f"use/{place}/skip", 0.0) for row in late]) < 0.99
    assert model.config.router_threshold == rows[-1]["router_threshold"]
    assert late[-1]["supervise"] < rows[0]["supervise"]


def test_a_resumed_run_holds_on_as_it_would_have(tmp_path, data, make_gpt2):
    settings = block(steps=12, save_every=5)
    whole, rows = train(tmp_path / "whole", data, settings, make_gpt2)
    train(tmp_path / "cut", data, settings, make_gpt2)
    for late in ("checkpoint-12", "checkpoint-10"):
        for path in sorted((tmp_path / "cut" / "checkpoints" / late).rglob("*"), reverse=True):
            path.unlink()
        (tmp_path / "cut" / "checkpoints" / late).rmdir()
    again, rows_again = train(tmp_path / "cut", data, settings, make_gpt2, resume=True)
    assert again.config.router_threshold == whole.config.router_threshold
    assert [row["spent"] for row in rows_again] == [row["spent"] for row in rows]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.fixture
def unfit(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Steps whose gradient is broken, each at learning rates from that on."""
    steps: dict[int, float] = {}
    trained = Trainer.training_step

    def step(trainer: Trainer, model: MomForCausalLM, *rest: object) -> torch.Tensor:
        loss = trained(trainer, model, *rest)
        if trainer.lr_scheduler.base_lrs[0] >= steps.get(trainer.state.global_step + 1, float("inf")):
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", step)
    return steps


def test_an_unfit_step_moves_no_threshold(tmp_path, data, make_gpt2, unfit):
    unfit[3] = 0.0
    _, rows = train(tmp_path / "run", data, block(steps=4), make_gpt2)
    thresholds = [row["router_threshold"] for row in rows]
    assert thresholds[2] == thresholds[1]
    assert len(set(thresholds)) == 3


def test_after_going_back_routers_are_told_what_was_measured_before(tmp_path, data, make_gpt2, unfit, monkeypatch):
    """Not what the weights that went wrong would say."""
    told, measured, compared, goals = [], fit_module.loss_metrics, fit_module.hidden_goal, []
    monkeypatch.setattr(fit_module, "loss_metrics", lambda *given: told.append(1) or measured(*given))
    monkeypatch.setattr(fit_module, "hidden_goal", lambda *given: goals.append(1) or compared(*given))
    unfit |= dict.fromkeys((5, 6, 7), 3e-3)
    folder = tmp_path / "run"
    folder.mkdir()
    place = Place(folder, "test", Console(quiet=True))
    fit(mom(), make_gpt2(n_layer=2), data, block(steps=9, save_every=2, hidden=1.0), place, [0, 1])
    assert json.loads((folder / "checkpoints" / "rollback.json").read_text())["times"] == 1
    assert (len(told), len(goals)) == (1, 1)


def hold_of(model: MomForCausalLM, share: float) -> BudgetHold:
    places = [("mha", 0), ("ffn", 0), ("ffn", 1)]
    return BudgetHold(model, budget_of(model.config, 16), places, share)


def records(skipping: dict[tuple[str, int], int], tokens: int = 100) -> list[RoutingRecord]:
    found = []
    for (kind, step), skips in skipping.items():
        modules = torch.full((tokens, 1), step)
        modules[:skips] = 2
        found.append(RoutingRecord(step, kind, modules, torch.ones(tokens, 1), True, 2, True, True))
    return found


def test_a_swallowed_step_is_made_dearer_to_skip_and_only_that():
    model = mom()
    hold, before = hold_of(model, 0.8), model.model.ffn_router.bias.detach().clone()
    hold.note(records({("mha", 0): 40, ("ffn", 0): 100, ("ffn", 1): 90}))
    hold.on_step_end(None, TrainerState(), TrainerControl())
    change = (model.model.ffn_router.bias.detach() - before).tolist()
    assert change == [[pytest.approx(0.1, abs=1e-6), 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_what_was_counted_of_a_step_that_is_not_taken_is_forgotten():
    model = mom()
    hold = hold_of(model, 0.8)
    for leave in (hold.forget, lambda: hold.on_train_begin(None, TrainerState(), TrainerControl())):
        before = [value.clone() for value in model.state_dict().values()]
        hold.note(records({("mha", 0): 100, ("ffn", 0): 100, ("ffn", 1): 100}))
        leave()
        hold.on_step_end(None, TrainerState(), TrainerControl())
        assert (model.config.router_threshold, hold.spent) == (0.0, None)
        assert all(map(torch.equal, before, model.state_dict().values()))


def test_the_threshold_goes_against_what_is_spent_and_micro_batches_add_up():
    model = mom()
    hold = hold_of(model, 0.8)
    hold.note(records({("mha", 0): 0, ("ffn", 0): 0, ("ffn", 1): 20}))
    hold.note(records({("mha", 0): 0, ("ffn", 0): 0, ("ffn", 1): 40}))
    hold.on_step_end(None, TrainerState(), TrainerControl())
    assert hold.spent == pytest.approx(hold.budget.full - 0.3 * hold.budget.savings["ffn"])
    assert model.config.router_threshold > 0
    below = hold_of(model, 0.99)
    before = model.config.router_threshold
    below.note(records({("mha", 0): 50, ("ffn", 0): 50, ("ffn", 1): 50}))
    below.on_step_end(None, TrainerState(), TrainerControl())
    assert model.config.router_threshold < before


def test_refused_where_there_is_nothing_to_choose(tmp_path, data, make_gpt2):
    model = mom(mha_reach=[[0], [1]], ffn_reach=[[0], [1]], patch_rank=0)
    with pytest.raises(MomifyError, match=r"mom\.reach=skip"):
        fit(model, make_gpt2(), data, block(), Place(tmp_path, "test", Console(quiet=True)))
