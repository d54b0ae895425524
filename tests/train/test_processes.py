"""Several processes (torchrun, gloo on the CPU) are one run: same losses, one writer, one end."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from momify.models import load_mom

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
HERE = Path(__file__).parent
# Draws differ between processes and the balance loss is no mean over tokens: without them the sums must agree.
PLAIN = ("train.steps=12", "train.dropout=0", "train.explore=0", "train.balance=0", "train.log_every=1",
         "train.micro_batch=null", "train.save_every=6", "train.optimizer=adamw")  # fmt: skip


def script(name: str) -> tuple[str, ...]:
    return (*TORCHRUN, str(HERE / name))


def losses(place) -> list[tuple[int, float]]:
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in place.rows()]


def assert_close(place, other) -> None:
    """Two runs logged the same steps, losses and shares, and ended at the same weights, within float tolerance."""
    assert [step for step, _ in losses(place)] == [step for step, _ in losses(other)]
    for ours, theirs in zip(place.rows(), other.rows(), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    ours, theirs = place.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one(ground: Path, tmp_path_factory: pytest.TempPathFactory, undisturbed):
    """One process with a batch of 8."""
    place = replace(undisturbed, folder=tmp_path_factory.mktemp("one") / "w")
    shutil.copytree(ground, place.folder)
    assert place.finish("train", "tiny.yaml", *PLAIN, "train.batch_size=8") == 0, place.err
    return place


def test_two_processes_equal_one_of_twice_the_batch(new_place: Callable, one) -> None:
    place = new_place()
    assert place.finish("train", "tiny.yaml", *PLAIN, launcher=TORCHRUN) == 0, place.err
    assert_close(place, one)
    assert place.out.count("phase 2: 12 steps") == 1  # only the first prints
    assert (place.run / "log.txt").read_text().count("phase 2: 12 steps") == 1
    assert len(list((place.run / "tensorboard").iterdir())) == 1
    tokens = [row["tokens"] for row in place.rows()]
    assert tokens == [row["tokens"] for row in one.rows()]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_cut_their_batches_and_learn_the_same(new_place: Callable, sharded: bool) -> None:
    """Of 26 blocks in steps of 8 the last step of a pass repeats six, whichever way batches are cut."""
    how = {"launcher": script("fsdp_on_cpu.py"), "module": False} if sharded else {"launcher": TORCHRUN}
    keys = (*PLAIN, "data.train_tokens=832", "train.embedding_rate=0.5", f"train.fsdp={str(sharded).lower()}")
    whole, cut = new_place("whole"), new_place("cut")
    assert whole.finish("train", "tiny.yaml", *keys, **how) == 0, whole.err
    assert cut.finish("train", "tiny.yaml", *keys, "train.micro_batch=1", **how) == 0, cut.err
    assert_close(cut, whole)
    assert [row["tokens"] for row in cut.rows() if "loss" in row] == [8 * 32 * step for step in range(1, 13)]


@pytest.mark.slow
def test_residuals_and_what_learns_first_are_the_same_for_two_processes(new_place: Callable) -> None:
    two, one = new_place("two"), new_place("alone")
    keys = (*PLAIN, "train.balance=0.01", "mom.reach=home", "mom.mha_steps=4", "mom.patch_rank=2", "mom.step_rank=2",
            "train.hidden=0.5", "train.stand_ins_first=0.5", "data.valid_tokens=4000000", "mom.refit_tokens=131072",
            "mom.importance=null")  # fmt: skip
    assert one.finish("train", "tiny.yaml", *keys, "train.batch_size=8") == 0, one.err
    assert two.finish("train", "tiny.yaml", *keys, launcher=TORCHRUN) == 0, two.err
    assert_close(two, one)
    assert all("hidden" in row for row in two.rows() if "loss" in row)
    assert "the first 6 steps teach only what stands in" in two.out
    untouched = load_file(two.checkpoints / "checkpoint-6" / "model.safetensors")
    moved = {name for name, value in two.weights().items() if not torch.equal(value, untouched[name])}
    assert moved == untouched.keys()


@pytest.mark.slow
def test_sharded_processes_equal_one_of_twice_the_batch(new_place: Callable, one) -> None:
    place = new_place()
    arguments = ("train", "tiny.yaml", *PLAIN, "train.fsdp=true")
    assert place.finish(*arguments, launcher=script("fsdp_on_cpu.py"), module=False) == 0, place.err
    assert_close(place, one)
    for step in (6, 12):
        folder = place.checkpoints / f"checkpoint-{step}"
        assert (folder / "pytorch_model_fsdp.bin").exists()  # it was sharded indeed
        loaded = load_mom(folder).state_dict()
        for name, value in load_file(folder / "model.safetensors").items():
            assert torch.equal(loaded[name], value)
    assert place.finish("train", "tiny.yaml", *PLAIN, "train.fsdp=true", "--resume") == 0, place.err  # trained already


@pytest.mark.slow
@pytest.mark.parametrize(("sharded", "frozen"), [(False, False), (True, False), (True, True)])
def test_killed_group_goes_on_to_the_same_bits(new_place: Callable, sharded: bool, frozen: bool) -> None:
    steps = ("train.steps=90", "train.save_every=9", f"train.fsdp={str(sharded).lower()}",
             f"train.freeze_embeddings={str(frozen).lower()}")  # fmt: skip
    how = {"launcher": script("fsdp_on_cpu.py"), "module": False} if sharded else {"launcher": TORCHRUN}
    whole, cut = new_place("whole"), new_place("cut")
    assert whole.finish("train", "tiny.yaml", *steps, **how) == 0, whole.err
    process = cut.start("train", "tiny.yaml", *steps, **how)
    while process.poll() is None and not (cut.checkpoints / "checkpoint-18").exists():
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    for victim in (process, *workers):  # torchrun gives its workers sessions of their own
        os.kill(victim.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    psutil.wait_procs(workers, timeout=10)
    single = cut.finish("train", "tiny.yaml", *steps, "--resume")
    assert single == 2
    assert "was written by 2 process(es) and this run has 1; go on with torchrun --nproc-per-node 2" in cut.err
    assert cut.finish("train", "tiny.yaml", *steps, "--resume", **how) == 0, cut.err
    assert cut.rows() == whole.rows()
    models = [place.run / "model" / "model.safetensors" for place in (cut, whole)]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.mark.slow
def test_signal_to_the_group_saves_one_checkpoint_and_exits(new_place: Callable) -> None:
    place = new_place()
    process = place.start("train", "tiny.yaml", "train.steps=3000", launcher=TORCHRUN)
    while process.poll() is None and not (place.checkpoints / "checkpoint-7").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    said = [line for line in place.err.splitlines() if line.startswith("momify: ")]
    assert len(said) == 1, place.err
    assert "saved; go on with: " in said[0]
    step = int(said[0].split("at step ")[1].split(",")[0])
    assert (place.checkpoints / f"checkpoint-{step}" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["raise", "kill"])
def test_process_that_dies_ends_the_run_at_once(new_place: Callable, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIE", way)
    place, since = new_place(), time.monotonic()
    code = place.finish("train", "tiny.yaml", launcher=script("die_in_a_step.py"), module=False)
    assert code != 0
    assert time.monotonic() - since < 90
    assert ("ArithmeticError: the second process is unwell" if way == "raise" else "Signal 9") in place.err
    assert place.finish("train", "tiny.yaml", "--resume") in (0, 2)


@pytest.mark.slow
def test_mistake_ends_every_process(new_place: Callable) -> None:
    place = new_place()
    assert place.finish("train", "tiny.yaml", "data.train=gone.txt", launcher=TORCHRUN) != 0
    assert "momify: data file gone.txt does not exist" in place.err
    assert place.finish("train", "tiny.yaml", "train.stesp=3", launcher=TORCHRUN) != 0
    assert place.err.count("momify: recipe tiny.yaml: unknown key 'train.stesp'") == 1
    assert not (place.run / "model").exists()
