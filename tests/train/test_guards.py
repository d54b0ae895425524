"""Steps whose loss or gradient is not finite: skipped, then back with a lower learning rate, then stopped by name."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import GPT2LMHeadModel, Trainer, set_seed

from momify.data.blocks import TokenData
from momify.errors import MomifyError
from momify.recipe_blocks import TrainBlock
from momify.train.checkpoints import read_seal
from momify.train.fit import Place, fit
from momify.train.guards import StepGuard, UnfitStepsError

RATE = 1e-2


@pytest.fixture
def data() -> TokenData:
    tokens = np.random.default_rng(0).integers(0, 61, 16 * 60).astype(np.uint16)
    return TokenData(tokens[: 16 * 50], tokens[16 * 50 :], 16, "0" * 32)


@pytest.fixture
def dense(make_gpt2: Callable[..., GPT2LMHeadModel]) -> GPT2LMHeadModel:
    return make_gpt2(n_layer=1)


def settings(**changes: object) -> TrainBlock:
    values = {"steps": 12, "batch_size": 4, "learning_rate": RATE, "precision": "fp32", "save_every": 3, "log_every": 1,
              "schedule": "constant_with_warmup", "warmup": 0.0}  # fmt: skip
    return TrainBlock(**{**values, **changes})


class Course:
    """Trains `model` in `folder` with faults put in: at a step, what `break_it` does to the model or its gradients."""

    def __init__(self, folder: Path, data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.data, self.said, self.faults = folder, data, [], {}
        self.rates: list[list[float]] = []  # of each group, in each step
        trained = Trainer.training_step

        def step(trainer: Trainer, model: nn.Module, inputs: dict, *rest: object) -> torch.Tensor:
            loss = trained(trainer, model, inputs, *rest)
            self.rates.append([group["lr"] for group in trainer.optimizer.param_groups])
            fault = self.faults.get(trainer.state.global_step + 1)
            rate = trainer.lr_scheduler.get_last_lr()[0]
            return fault(model, loss, rate) if fault else loss

        monkeypatch.setattr(Trainer, "training_step", step)

    def train(self, model: nn.Module, resume: bool = False, **changes: object) -> None:
        set_seed(0)
        self.folder.mkdir(exist_ok=True)
        place = Place(self.folder, "test", Console(quiet=True), 0, resume, self.said.append)
        fit(model, None, self.data, settings(**changes), place)

    def rows(self) -> list[dict]:
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "loss" in row]


@pytest.fixture
def course(tmp_path: Path, data: TokenData, monkeypatch: pytest.MonkeyPatch) -> Course:
    return Course(tmp_path / "run", data, monkeypatch)


def break_gradient(value: float, name: str = "c_fc.weight") -> Callable:
    """Puts `value` into one entry of the gradient of the first parameter of that name."""

    def fault(model: nn.Module, loss: torch.Tensor, rate: float) -> torch.Tensor:
        next(p for n, p in model.named_parameters() if name in n).grad.view(-1)[3] = value
        return loss

    return fault


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_unfit_step_changes_nothing(course: Course, dense: GPT2LMHeadModel, value: float, clip: float) -> None:
    """With every gradient but those of one step broken, that step alone moves the weights."""
    course.faults = {2: break_gradient(value), 3: break_gradient(value), 5: break_gradient(value)}
    start = copy.deepcopy(dense.state_dict())
    course.train(dense, steps=3, clip=clip)
    after_one = copy.deepcopy(dense.state_dict())
    assert [line for line in course.said if "skipped" in line] == [
        f"warning: step {step} skipped: its loss or gradient is not finite" for step in (2, 3)
    ]
    dense.load_state_dict(start)
    course.faults = {}
    (course.folder / "metrics.jsonl").unlink()
    course.train(dense, steps=1, clip=clip)
    assert all(torch.equal(after_one[name], value) for name, value in dense.state_dict().items())


def test_skipped_step_leaves_no_trace_in_the_logged_means(course: Course, dense: GPT2LMHeadModel) -> None:
    course.faults = {4: break_gradient(float("nan"))}
    course.train(dense, log_every=6)
    assert all(np.isfinite(row["loss"]) for row in course.rows())
    assert len(course.rows()) == 2


def diverge(model: nn.Module, loss: torch.Tensor, rate: float) -> torch.Tensor:
    """A loss that is not finite while the learning rate is the full one."""
    return loss * float("inf") if rate > 0.9 * RATE else loss


@pytest.mark.parametrize("optimizer", ["adamw", "normuon"])
def test_three_in_a_row_go_back_with_a_lower_rate(course: Course, dense: GPT2LMHeadModel, optimizer: str) -> None:
    course.faults = dict.fromkeys((8, 9, 10), diverge)
    course.train(dense, optimizer=optimizer, embedding_rate=0.5)
    assert any("going back to the checkpoint before step 8, now with 0.3 times" in line for line in course.said)
    rows = course.rows()
    assert [row["step"] for row in rows] == list(range(1, 13))  # no gaps, no doubles
    assert [row["learning_rate"] for row in rows[:6]] == [RATE] * 6
    assert [row["learning_rate"] for row in rows[6:]] == pytest.approx([0.3 * RATE] * 6)
    assert read_seal(course.folder / "checkpoints" / "checkpoint-12").lr_factor == pytest.approx(0.3)
    # vectors, embeddings, matrices; matrices, vectors, embeddings
    rates = [1.0, 0.5, 2.0] if optimizer == "normuon" else [1.0, 1.0, 0.5]
    expected = [[factor * RATE * rate for rate in rates] for factor in (1.0,) * 10 + (0.3,) * 6]
    np.testing.assert_allclose(course.rates, expected, rtol=1e-6)
    assert json.loads((course.folder / "checkpoints" / "rollback.json").read_text())["times"] == 1


@pytest.mark.parametrize("optimizer", ["adamw", "normuon"])
def test_resumed_run_keeps_the_lower_rate(course: Course, dense: GPT2LMHeadModel, optimizer: str) -> None:
    start = copy.deepcopy(dense.state_dict())
    course.faults = dict.fromkeys((5, 6, 7), diverge)
    course.train(dense, optimizer=optimizer)
    whole = copy.deepcopy(dense.state_dict())
    for name in ("checkpoint-12", "checkpoint-9"):  # as if killed before they were saved
        (course.folder / "checkpoints" / name / "model.safetensors").unlink()
    dense.load_state_dict(start)
    course.train(dense, resume=True, optimizer=optimizer)
    assert all(torch.equal(whole[name], value) for name, value in dense.state_dict().items())
    assert sum("is damaged (model.safetensors is missing)" in line for line in course.said) == 2


def test_spliced_blocks_are_named_piece_by_piece() -> None:
    guard = StepGuard()
    for step in (1, 2, 3):
        guard.note(torch.tensor(float("nan")), torch.tensor([[3, 15], [4, 16]]))  # (B, pieces)
        if step < 3:
            assert guard.unfit(step, [])
    with pytest.raises(UnfitStepsError) as caught:
        guard.unfit(3, [])
    assert caught.value.describe().endswith("in the batch of training blocks 3, 15, 4, 16")


def test_what_stays_broken_is_named(course: Course, dense: GPT2LMHeadModel) -> None:
    course.faults = {step: break_gradient(float("nan")) for step in (8, 9, 10)}
    with pytest.raises(MomifyError) as caught:
        course.train(dense)
    line = str(caught.value)
    assert "the gradient of transformer.h.0.mlp.c_fc.weight is not" in line
    assert "at step 10 (the third in a row), in the batch of training blocks " in line
    assert "also at 0.09 times the learning rate" in line
    assert "\n" not in line
    blocks = [int(number) for number in line.split("training blocks ")[1].split(", also")[0].split(", ")]
    assert len(blocks) == 4
    assert all(0 <= block < 50 for block in blocks)
    assert (course.folder / "checkpoints" / "checkpoint-6" / "manifest.json").exists()


def overflow(model: nn.Module, loss: torch.Tensor, rate: float) -> torch.Tensor:
    """At the full learning rate, weights that are finite and whose predictions are no number any more."""
    if rate > 0.9 * RATE:
        with torch.no_grad():
            next(model.parameters()).fill_(1e30)
    return loss


def test_a_checkpoint_that_is_broken_already_is_no_way_back(course: Course, dense: GPT2LMHeadModel) -> None:
    """Broken in step 6 and saved: with a held-out loss, which is no number, or without one (eval_every)."""
    for name, every in (("measured", 3), ("unmeasured", 100)):
        course.folder, course.said = course.folder.with_name(name), []
        model = copy.deepcopy(dense)
        course.faults = {6: overflow}
        course.train(model, eval_every=every)
        assert all(bool(value.isfinite().all()) and value.abs().max() < 1e3 for value in model.state_dict().values())
        factor = read_seal(course.folder / "checkpoints" / "checkpoint-12").lr_factor
        assert factor == pytest.approx(0.3 if every == 3 else 0.09)
        assert read_seal(course.folder / "checkpoints" / "checkpoint-12").sound


def test_the_lower_rate_holds_without_a_checkpoint(course: Course, dense: GPT2LMHeadModel) -> None:
    """What rollbacks had made of the rate is in a file of its own, which may be all that is left."""
    (course.folder / "checkpoints").mkdir(parents=True)
    (course.folder / "checkpoints" / "rollback.json").write_text('{"times": 1, "lr_factor": 0.3}')
    course.train(dense, resume=True, steps=3)
    assert [row["learning_rate"] for row in course.rows()] == pytest.approx([0.3 * RATE] * 3)


def test_text_with_unknown_tokens_is_refused(
    tmp_path: Path, data: TokenData, make_gpt2: Callable[..., GPT2LMHeadModel]
) -> None:
    wider = TokenData(np.where(data.train == 7, 61, data.train), data.valid, 16, "0" * 32)
    with pytest.raises(MomifyError, match="the text has token 61 and the model 61 tokens"):
        fit(make_gpt2(n_layer=1), None, wider, settings(), Place(tmp_path, "test", Console(quiet=True)))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_loss_alone_is_named(course: Course, dense: GPT2LMHeadModel) -> None:
    course.faults = dict.fromkeys(range(1, 13), lambda model, loss, rate: loss * float("nan"))
    with pytest.raises(MomifyError, match=r"the loss is nan at step 3 .*there is no checkpoint before it to go back"):
        course.train(dense)


def test_broken_weight_is_named(course: Course, dense: GPT2LMHeadModel) -> None:
    with torch.no_grad():
        dense.transformer.ln_f.weight[2] = float("nan")
    with pytest.raises(MomifyError, match=r"weight transformer\.ln_f\.weight is not finite at step 3"):
        course.train(dense)


def test_one_third_of_the_steps_may_fail(course: Course, dense: GPT2LMHeadModel) -> None:
    course.faults = {step: break_gradient(float("inf")) for step in (1, 2, 4, 5, 7, 8, 10, 11)}  # never three in a row
    course.train(dense)
    assert sum("skipped" in line for line in course.said) == 8
    assert not any("going back" in line for line in course.said)


def test_teacher_with_other_tokens_is_refused(
    tmp_path: Path, data: TokenData, make_gpt2: Callable[..., GPT2LMHeadModel]
) -> None:
    student, teacher = make_gpt2(n_layer=1), make_gpt2(n_layer=1, vocab_size=64)
    with pytest.raises(MomifyError, match="the model has 61 tokens and its source 64"):
        fit(student, teacher, data, settings(), Place(tmp_path, "test", Console(quiet=True)))
    assert not (tmp_path / "metrics.jsonl").exists()
