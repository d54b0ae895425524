"""train/fit.py: seeded runs repeat, a stopped run resumes to the same bits, accumulation changes nothing, NaN stops."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedModel, TrainerCallback, set_seed

from momify.data.blocks import TokenData
from momify.errors import MomifyError
from momify.model import MomConfig, MomForCausalLM
from momify.recipe_blocks import TrainBlock
from momify.train import callbacks, trainer
from momify.train.callbacks import StopOnSignal
from momify.train.checkpoints import newest_whole
from momify.train.fit import Place, Stopped, fit
from momify.train.frozen import is_embedding
from momify.train.optimizer import Rates

STEPS = 8
Teach = Callable[[], GPT2LMHeadModel]


@pytest.fixture
def data() -> TokenData:
    tokens = np.random.default_rng(0).integers(0, 61, 16 * 60).astype(np.uint16)
    return TokenData(tokens[: 16 * 50], tokens[16 * 50 :], 16, "0" * 32)


def block(**changes: object) -> TrainBlock:
    values = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "save_every": 3}
    values["log_every"] = 1
    return TrainBlock(**{**values, **changes})


def place(folder: Path, resume: bool = False) -> Place:
    folder.mkdir(exist_ok=True)
    return Place(folder, "test", Console(quiet=True), 0, resume)


def mom(**changes: object) -> MomForCausalLM:
    set_seed(3)
    values = {"vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
              "num_mha_modules": 2, "num_ffn_modules": 3, "num_steps": 3, "router_explore": 0.3,
              "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    return MomForCausalLM(MomConfig(**{**values, **changes}))


def run(folder: Path, data: TokenData, settings: TrainBlock, make: Callable[[], PreTrainedModel], **how: object) -> str:
    """Train a fresh model, from a teacher where one is given (`teach`); the hash of its weights."""
    model, teach = make(), how.pop("teach", None)
    set_seed(0)
    fit(model, teach and teach(), data, settings, place(folder, **how))
    return digest(model)


@pytest.fixture
def teach(make_gpt2: Callable[..., GPT2LMHeadModel]) -> Teach:
    """Makes the same teacher at each call, without touching the seed of the run."""

    def make() -> GPT2LMHeadModel:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return make_gpt2()

    return make


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def last_checkpoint(folder: Path) -> Path | None:
    return newest_whole(folder / "checkpoints", lambda line: None)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_seeded_runs_are_bitwise_equal(tmp_path: Path, data: TokenData, teach: Teach) -> None:
    assert run(tmp_path / "a", data, block(), mom, teach=teach) == run(tmp_path / "b", data, block(), mom, teach=teach)


class StopAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kw) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def stop_at(patched: pytest.MonkeyPatch, step: int, number: int) -> None:
    """From now on every training gets signal `number` in the step after `step`."""
    started = StopOnSignal.on_train_begin

    def begin(self: StopOnSignal, args, state, control, **kw) -> None:
        started(self, args, state, control, **kw)
        self.on_step_begin = StopAt(step, number).on_step_begin

    patched.setattr(StopOnSignal, "on_train_begin", begin)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_resumes_to_the_same_bits(
    tmp_path: Path, data: TokenData, teach: Teach, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = block(distill=1.0, cross_entropy=0.5, balance=0.1)
    whole = run(tmp_path / "whole", data, settings, mom, teach=teach)
    with monkeypatch.context() as patched:
        stop_at(patched, 4, number)
        model = mom()
        set_seed(0)
        outcome = fit(model, teach(), data, settings, place(tmp_path / "cut"))
    assert outcome == Stopped(signal.Signals(number).name, 5)
    assert last_checkpoint(tmp_path / "cut").name == "checkpoint-5"
    assert run(tmp_path / "cut", data, settings, mom, teach=teach, resume=True) == whole
    cut, full = (
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows(tmp_path / name)]
        for name in ("cut", "whole")
    )
    assert [row["step"] for row in cut] == [row["step"] for row in full]
    assert cut == full


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_step_is_heard(
    tmp_path: Path, data: TokenData, teach: Teach, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after the training may take hours."""
    whole = run(tmp_path / "whole", data, block(), mom, teach=teach)
    with monkeypatch.context() as patched:
        stop_at(patched, STEPS - 1, number)
        model = mom()
        set_seed(0)
        outcome = fit(model, teach(), data, block(), place(tmp_path / "cut"))
    assert outcome == Stopped(signal.Signals(number).name, STEPS)
    assert run(tmp_path / "cut", data, block(), mom, teach=teach, resume=True) == whole


def test_a_second_ctrl_c_ends_a_training_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for first in (lambda stop: stop._note(signal.SIGINT, None), lambda stop: stop._note(signal.SIGTERM, None)):
        stop = StopOnSignal()
        first(stop)
        stop._note(signal.SIGINT, None)  # passed on by a launcher too
        now[0] += 2
        stop._note(signal.SIGTERM, None)  # asks for what is done already
        with pytest.raises(KeyboardInterrupt):
            stop._note(signal.SIGINT, None)


def test_a_signal_of_another_process_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One's own Ctrl-C comes a moment after the vote on that of another process."""
    monkeypatch.setattr(callbacks.processes, "any_of_all", lambda flag: True)
    stop, control = StopOnSignal(), SimpleNamespace()
    stop.on_step_end(None, None, control)
    stop._note(signal.SIGINT, None)
    assert (stop.stopped, control.should_save) == ("a signal", True)


def test_checkpoints_do_not_hold_what_was_logged(tmp_path: Path, data: TokenData, teach: Teach) -> None:
    run(tmp_path, data, block(), mom, teach=teach)
    state = json.loads((last_checkpoint(tmp_path) / "trainer_state.json").read_text())
    assert (state["global_step"], state["log_history"]) == (STEPS, [])
    assert len(rows(tmp_path)) > STEPS


@pytest.mark.parametrize(
    ("changes", "needed"),
    [({}, True), ({"distill": 0.0, "cross_entropy": 1.0}, False),
     ({"distill": 0.0, "cross_entropy": 1.0, "hidden": 1.0}, True)],
)  # fmt: skip
def test_a_source_that_is_asked_nothing_stays_where_it_is(
    tmp_path: Path, data: TokenData, teach: Teach, changes: dict, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, moved = teach(), []
    monkeypatch.setattr(teacher, "to", lambda device: moved.append(device) or teacher)
    tmp_path.mkdir(exist_ok=True)
    fit(mom(num_steps=4), teacher, data, block(steps=1, **changes), place(tmp_path), [0, 1, 2, 3])
    assert bool(moved) == needed


def test_a_taught_run_learns_from_spliced_blocks(tmp_path: Path, data: TokenData, teach: Teach) -> None:
    """As it would from text that was cut into pieces of 4 and put together by hand; who learns from labels does not."""
    pieces = data.train.reshape(50, 4, 4)  # (blocks, pieces, T)
    far = np.stack([np.roll(pieces[:, at], -(at * 50 // 4), axis=0) for at in range(4)], axis=1)
    by_hand = replace(data, train=far.reshape(-1))
    found = run(tmp_path / "a", data, block(), mom, teach=teach)
    assert found == run(tmp_path / "b", by_hand, block(splice=1), mom, teach=teach)
    assert found != run(tmp_path / "c", data, block(splice=1), mom, teach=teach)
    labelled = [block(cross_entropy=0.5), block(cross_entropy=0.5, splice=1)]
    one, other = (run(tmp_path / f"d{at}", data, settings, mom, teach=teach) for at, settings in enumerate(labelled))
    assert one == other


def test_accumulation_changes_memory_not_results(tmp_path: Path, data: TokenData, teach: Teach) -> None:
    losses = []
    for micro in (4, 2, 1):
        run(tmp_path / str(micro), data, block(micro_batch=micro), lambda: mom(router_explore=0.0), teach=teach)
        losses.append([row["loss"] for row in rows(tmp_path / str(micro)) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_checkpointing_gives_the_same_losses(tmp_path: Path, data: TokenData, teach: Teach) -> None:
    losses = []
    for on in (False, True):
        run(tmp_path / str(on), data, block(gradient_checkpointing=on), mom, teach=teach)
        losses.append([row["loss"] for row in rows(tmp_path / str(on)) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_every_part_of_the_loss_is_logged_and_adds_up(tmp_path: Path, data: TokenData, teach: Teach) -> None:
    run(tmp_path, data, block(distill=2.0, cross_entropy=0.5, balance=0.1), mom, teach=teach)
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    for row in logged:
        parts = 2.0 * row["distill"] + 0.5 * row["cross_entropy"] + 0.1 * row["balance"]
        assert row["loss"] == pytest.approx(parts, rel=1e-4)
        assert row["tokens"] == row["step"] * 4 * 16
        assert 0 <= row["router_entropy"] < 2
        for step in range(3):
            assert sum(v for k, v in row.items() if k.startswith(f"use/mha/{step}/")) == pytest.approx(1)
    assert [row["step"] for row in rows(tmp_path) if "eval_loss" in row] == [3, 6, 8]


def test_training_learns_and_leaves_the_teacher_alone(tmp_path: Path, data: TokenData, teach: Teach) -> None:
    teacher = teach()
    before = digest(teacher)
    model = mom()
    set_seed(0)
    fit(model, teacher, data, block(steps=40, save_every=100), place(tmp_path))
    losses = [row["distill"] for row in rows(tmp_path) if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert digest(teacher) == before
    assert model.config.use_cache  # the Trainer switches it off


def test_phase_one_trains_a_dense_model(tmp_path: Path, data: TokenData, teach: Teach) -> None:
    model = teach()
    set_seed(0)
    fit(model, None, data, block(steps=30, save_every=100), place(tmp_path))
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert logged[0]["loss"] == pytest.approx(logged[0]["cross_entropy"])
    assert "distill" not in logged[0]
    assert sum(row["loss"] for row in logged[-5:]) < sum(row["loss"] for row in logged[:5]) - 0.1


def test_failed_save_leaves_the_older_checkpoint(tmp_path: Path, data: TokenData, teach: Teach, monkeypatch) -> None:
    save = torch.save

    def full(what: object, path: object, *rest: object, **more: object) -> None:
        if "checkpoint-6" in str(path):
            raise OSError(28, "No space left on device")
        save(what, path, *rest, **more)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Exception, match=r"space|writ"):
        run(tmp_path, data, block(), mom, teach=teach)
    assert last_checkpoint(tmp_path).name == "checkpoint-3"


def test_incomplete_checkpoint_is_passed_over(tmp_path: Path, data: TokenData, teach: Teach) -> None:
    run(tmp_path, data, block(), mom, teach=teach)
    assert last_checkpoint(tmp_path).name == "checkpoint-8"
    (tmp_path / "checkpoints" / "checkpoint-8" / "optimizer.pt").unlink()
    (tmp_path / "checkpoints" / "checkpoint-junk").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_blocks_longer_than_the_positions_are_refused(tmp_path: Path, data: TokenData) -> None:
    with pytest.raises(MomifyError, match="exceeds the model's 8 positions"):
        fit(mom(n_positions=8), None, data, block(), place(tmp_path))


@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
def test_muon_learns_and_resumes_to_the_same_bits(
    tmp_path: Path, data: TokenData, teach: Teach, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    settings = block(optimizer=optimizer)
    whole = run(tmp_path / "whole", data, settings, mom, teach=teach)
    with monkeypatch.context() as patched:
        stop_at(patched, 4, signal.SIGTERM)
        run(tmp_path / "cut", data, settings, mom, teach=teach)
    assert run(tmp_path / "cut", data, settings, mom, teach=teach, resume=True) == whole
    for other in {"adamw", "muon", "normuon"} - {optimizer}:
        assert whole != run(tmp_path / other, data, block(optimizer=other), mom, teach=teach)


def test_a_checkpoint_of_other_optimizer_groups_is_refused_in_a_line(
    tmp_path: Path, data: TokenData, teach: Teach, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = block(optimizer="normuon")
    with monkeypatch.context() as patched:
        stop_at(patched, 4, signal.SIGTERM)
        run(tmp_path / "cut", data, settings, mom, teach=teach)
    grouped = trainer.parameter_groups
    for other in (lambda groups: groups[1:], lambda groups: groups[::-1]):  # another number, other sizes
        monkeypatch.setattr(trainer, "parameter_groups", lambda *given, other=other: other(grouped(*given)))
        with pytest.raises(MomifyError, match="start the run anew"):
            run(tmp_path / "cut", data, settings, mom, teach=teach, resume=True)


def test_a_taught_model_learns_by_normuon_where_nothing_is_said_and_a_dense_one_by_adamw(
    tmp_path: Path, data: TokenData, teach: Teach
) -> None:
    for teacher, chosen in ((teach, "normuon"), (None, "adamw")):
        runs = [
            run(tmp_path / f"{chosen}-{optimizer}", data, block(optimizer=optimizer), mom, teach=teacher)
            for optimizer in (None, "adamw", "normuon")
        ]
        assert runs[0] == runs[1 if chosen == "adamw" else 2] != runs[2 if chosen == "adamw" else 1]


@pytest.mark.parametrize("taught", [True, False])
def test_adamw_slows_embeddings_where_that_is_asked_for(
    tmp_path: Path, data: TokenData, teach: Teach, taught: bool
) -> None:
    """And else not; one step moves them by half, from the same start, and the rest of the weights as before."""
    moved, start = {}, mom().state_dict()
    for rate in (None, 1.0, 0.5):
        model = mom()
        set_seed(0)
        settings = block(steps=1, optimizer="adamw", embedding_rate=rate, warmup=0.0)
        fit(model, teach() if taught else None, data, settings, place(tmp_path / str(rate)))
        moved[rate] = {name: value - start[name] for name, value in model.state_dict().items()}
    for name, value in moved[None].items():
        assert torch.equal(moved[1.0][name], value)
        share = 0.5 if is_embedding(name) else 1.0
        torch.testing.assert_close(moved[0.5][name], share * value, rtol=1e-3, atol=1e-6)
    assert any(is_embedding(name) and value.any() for name, value in moved[None].items())


@pytest.mark.parametrize(
    ("taught", "changes", "rates"),
    [
        (True, {}, Rates(0.01, 2.0, 0.5)),
        (False, {"optimizer": "muon"}, Rates(0.01, 2.0, 1.0)),  # random weights: embeddings have all to learn
        (True, {"distill": 0.0, "cross_entropy": 1.0, "optimizer": "normuon"}, Rates(0.01, 2.0, 1.0)),
        (False, {"optimizer": "muon", "matrix_rate": 3.0, "embedding_rate": 0.7}, Rates(0.01, 3.0, 0.7)),
    ],
)
def test_rates_are_handed_on(
    tmp_path: Path, data: TokenData, teach: Teach, monkeypatch: pytest.MonkeyPatch, taught: bool, changes: dict,
    rates: Rates,
) -> None:  # fmt: skip
    asked, grouped = [], trainer.parameter_groups
    monkeypatch.setattr(trainer, "parameter_groups", lambda *given: asked.append(given[-1]) or grouped(*given))
    settings = block(steps=1, learning_rate=0.01, **changes)
    run(tmp_path / "run", data, settings, mom, teach=teach if taught else None)
    assert asked == [rates]
