"""train/tokens.py: tokens are counted as they come, also where batches are not full and across restarts."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.utils.data import BatchSampler
from transformers import GPT2LMHeadModel, set_seed

from momify.data.blocks import TokenData
from momify.recipe_blocks import TrainBlock
from momify.train import callbacks, tokens
from momify.train.callbacks import StopOnSignal
from momify.train.checkpoints import read_seal, seal
from momify.train.fit import Place, Stopped, fit
from momify.train.tokens import fewest_steps, reckoned_tokens, tokens_seen

LENGTH, BLOCKS, BATCH = 16, 10, 4  # a pass: 4, 4 and 2 blocks
SEEN = [LENGTH * blocks for blocks in (4, 8, 10, 14, 18, 20, 24)]


def data_of(blocks: int) -> TokenData:
    drawn = np.random.default_rng(0).integers(0, 61, LENGTH * (blocks + 4)).astype(np.uint16)
    return TokenData(drawn[: LENGTH * blocks], drawn[LENGTH * blocks :], LENGTH, "0" * 32)


def block(**changes: object) -> TrainBlock:
    values = {"steps": 7, "batch_size": BATCH, "precision": "fp32", "log_every": 1, "save_every": 100}
    return TrainBlock(**{**values, **changes})


def train(folder: Path, model: GPT2LMHeadModel, resume: bool = False, **changes: object) -> Stopped | None:
    folder.mkdir(exist_ok=True)
    set_seed(0)
    place = Place(folder, "test", Console(quiet=True), 0, resume)
    return fit(model, None, data_of(BLOCKS), block(**changes), place)


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "loss" in row]


@pytest.mark.parametrize("micro", [None, 2, 1])
def test_rows_tell_the_tokens_seen_and_their_speed(
    tmp_path: Path, make_gpt2, micro: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(100))
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)), monotonic=lambda: 0.0)
    monkeypatch.setattr(callbacks, "time", clock)
    train(tmp_path, make_gpt2(n_layer=1), micro_batch=micro)
    assert [row["tokens"] for row in rows(tmp_path)] == SEEN
    assert [row["tokens_per_second"] for row in rows(tmp_path)] == [64, 64, 32, 64, 64, 32, 64]  # a second each
    assert not any("num_input_tokens_seen" in row or "train_runtime" in row for row in rows(tmp_path))
    assert tokens_seen(tmp_path / "checkpoints", data_of(BLOCKS), block()) == SEEN[-1]


def test_fewer_blocks_than_a_batch_takes(tmp_path: Path, make_gpt2) -> None:
    train(tmp_path, make_gpt2(n_layer=1), batch_size=32, steps=2)
    assert [row["tokens"] for row in rows(tmp_path)] == [LENGTH * BLOCKS, 2 * LENGTH * BLOCKS]


@pytest.mark.parametrize("counted", [True, False])
def test_a_resumed_run_counts_on(tmp_path: Path, make_gpt2, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a checkpoint of a version that did not count."""
    with monkeypatch.context() as patched:
        ended = StopOnSignal.on_step_end

        def stop(self: StopOnSignal, args, state, control, **kw) -> None:
            if state.global_step == 5:
                self._note(signal.SIGTERM, None)
            ended(self, args, state, control, **kw)

        patched.setattr(StopOnSignal, "on_step_end", stop)
        assert train(tmp_path, make_gpt2(n_layer=1)) == Stopped("SIGTERM", 5)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-5"
    if not counted:
        forget(checkpoint)
    assert train(tmp_path, make_gpt2(n_layer=1), resume=True) is None
    assert [row["tokens"] for row in rows(tmp_path)] == SEEN
    forget(tmp_path / "checkpoints" / "checkpoint-7")  # finished by that version, but for the model
    assert train(tmp_path, make_gpt2(n_layer=1), resume=True) is None
    assert tokens_seen(tmp_path / "checkpoints", data_of(BLOCKS), block()) == SEEN[-1]


def forget(checkpoint: Path) -> None:
    """Make a checkpoint one of a version that did not count tokens."""
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_input_tokens_seen": 0}))
    seal(checkpoint, read_seal(checkpoint))


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 30), batch=st.integers(1, 8), processes=st.integers(1, 3), steps=st.integers(0, 30)
)  # fmt: skip
def test_reckoned_tokens_are_those_that_the_sampler_gives(blocks: int, batch: int, processes: int, steps: int) -> None:
    given_out = []  # per step, over the processes
    while len(given_out) < steps:
        sampler = BatchSampler(range(blocks), batch, drop_last=False)
        shards = [BatchSamplerShard(sampler, processes, rank) for rank in range(processes)]
        ways = zip(*(shards if processes > 1 else [sampler]), strict=True)
        given_out += [sum(len(indices) for indices in way) for way in ways]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokens, "count", lambda: processes)
        found = reckoned_tokens(steps, data_of(blocks), block(batch_size=batch))
    assert found == LENGTH * sum(given_out[:steps])


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 30), batch=st.integers(1, 8), processes=st.integers(1, 3), wanted=st.integers(1, 2000)
)  # fmt: skip
def test_fewest_steps_see_the_tokens_and_one_fewer_does_not(
    blocks: int, batch: int, processes: int, wanted: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokens, "count", lambda: processes)
        data, how = data_of(blocks), block(batch_size=batch)
        steps = fewest_steps(wanted, data, how)
        assert reckoned_tokens(steps, data, how) >= wanted > reckoned_tokens(steps - 1, data, how)


def test_the_model_says_what_it_was_trained_on(momify, there: Path) -> None:
    keys = ("data.train_tokens=1000", "train.steps=2", "train.batch_size=64", "train.log_every=1")
    done = momify("train", "tiny.yaml", *keys)
    assert done.code == 0
    assert "phase 2: 2 steps, 1,984 tokens by normuon" in done.out
    run = there / "runs" / "tiny"
    assert [row["tokens"] for row in rows(run)] == [992, 2 * 992]  # all 31 blocks a step
    assert json.loads((run / "model" / "momify.json").read_text())["trained"]["tokens"] == 2 * 992
