"""`momify sweep`, really run on a tiny source: killed and gone on with, each number held to what its run says."""

import csv
import io
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from momify.cli import app
from momify.data.tokenizer import train_tokenizer
from momify.demo.corpus import documents
from momify.models import load_mom
from momify.recipe import load_recipe
from momify.screen import Screen
from momify.sweep.cells import BarsAlone
from momify.train.fit import Stopped

SWEEP = ("sweep", "src", "--mha", "1", "--ffn", "2", "--tokens", "128", "--data", "text.txt", "--batch-size", "2",
         "--learning-rate", "0.01", "--name", "s", "data.block_length=32", "train.precision=fp32",
         "train.save_every=1", "train.log_every=1", "mom.calibration_blocks=2", "mom.refit_tokens=256")  # fmt: skip
MAIN = "import os\nos.environ['MOMIFY_CACHE'] = 'cache'\nfrom momify.cli import main\nmain()"
CELLS = ("3x3-seed0", "3x2-seed0", "1x3-seed0")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the process that is killed: with another number of threads sums end in other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny source and a text."""
    folder = tmp_path_factory.mktemp("ground")
    texts = [document.text for document in documents()[:30]]
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "src")
    train_tokenizer(texts, 300).save_pretrained(folder / "src")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(text[:1000] for text in texts))
    return folder


def momify(folder: Path, *arguments: str) -> Result:
    """`momify ARGUMENTS` in this process, standing in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MOMIFY_CACHE", str(folder / "cache"))
        patch.setenv("COLUMNS", "200")
        return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def swept(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where the sweep was run in one go; out.json is what it printed."""
    folder = tmp_path_factory.mktemp("swept") / "w"
    shutil.copytree(ground, folder)
    done = momify(folder, *SWEEP, "--json")
    assert done.exit_code == 0, done.output
    (folder / "out.json").write_text(done.stdout)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "runs/s/sweep.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def kept_losses(run: Path) -> dict[str, float]:
    """Loss by role, from the run's own eval file."""
    entries = json.loads((run / "eval/ppl.json").read_text())["entries"]
    return {entry["role"]: entry["score"]["metrics"]["loss"] for entry in entries}


def test_every_number_is_the_one_of_its_run(swept: Path) -> None:
    rows = rows_of(swept)
    assert [Path(row["run"]).name for row in rows] == list(CELLS)
    for row in rows:
        run = swept / row["run"]
        losses = kept_losses(run)
        columns = ("source_loss", "loss_before", "loss_after")
        assert [float(row[name]) for name in columns] == [losses[role] for role in ("source", "start", "mom")]
        model = load_mom(run / "model")
        assert int(row["parameters"]) == model.num_parameters()
        assert (int(row["mha"]), int(row["ffn"])) == (model.config.num_mha_modules, model.config.num_ffn_modules)
        assert int(row["tokens"]) == 128 == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["tokens"]
        assert load_recipe(run / "recipe.yaml").train.learning_rate == 0.01
    assert float(rows[0]["loss_before"]) == pytest.approx(float(rows[0]["source_loss"]))  # the whole pool loses nothing
    assert len({row["loss_after"] for row in rows}) == 3


def test_json_and_files_agree(swept: Path) -> None:
    printed = json.loads((swept / "out.json").read_text())
    assert [{key: str(value) for key, value in cell.items()} for cell in printed["cells"]] == rows_of(swept)
    assert [finding["measure"] for finding in printed["findings"]] == ["modules", "parameters", "MACs"]
    whole, ffn, mha = (cell["loss_after"] for cell in printed["cells"])
    # two attention modules went and one feed-forward module: at one, attention's loss is half-way
    assert printed["findings"][0]["added"] == pytest.approx({"mha": (mha - whole) / 2, "ffn": ffn - whole})
    assert (swept / "runs/s/sweep.svg").read_text().count("<polyline") == 4


def test_killed_sweep_goes_on_where_it_was(ground: Path, swept: Path, tmp_path: Path, forking: Callable) -> None:
    there = tmp_path / "w"
    shutil.copytree(ground, there)
    process = forking().start(MAIN, there, *SWEEP)
    second = there / "runs/s" / CELLS[1] / "checkpoints"
    while process.poll() is None and not any(second.glob("checkpoint-*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(rows_of(there)) == 1  # the first cell is on disk before the second begins
    first = there / "runs/s" / CELLS[0] / "model/model.safetensors"
    before = first.stat()
    assert "holds an earlier sweep; --resume" in str(momify(there, *SWEEP).exception)
    done = momify(there, *SWEEP, "--resume")
    assert done.exit_code == 0, done.output
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)  # not made again
    assert (there / "runs/s/sweep.csv").read_bytes() == (swept / "runs/s/sweep.csv").read_bytes()
    for cell in CELLS:
        models = [place / "runs/s" / cell / "model/model.safetensors" for place in (there, swept)]
        assert models[0].read_bytes() == models[1].read_bytes()


def test_a_sweep_that_replaces_another_and_is_stopped_goes_on(
    ground: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its earlier cells are gone, not taken for cells of its own."""
    there = tmp_path / "w"
    shutil.copytree(swept, there, symlinks=True)
    other = (*SWEEP, "--learning-rate", "0.02")
    assert "another train.learning_rate" in str(momify(there, *other, "--resume").exception)
    assert "give one of them" in str(momify(there, *other, "--resume", "--overwrite").exception)
    assert "mha is 4; the source has 3" in str(momify(there, *other, "--mha", "4", "--overwrite").exception)
    assert (there / "runs/s/sweep.csv").read_bytes() == (swept / "runs/s/sweep.csv").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("momify.sweep.cells.train", lambda *_: Stopped("SIGTERM", 3))
        assert momify(there, *other, "--overwrite").exit_code == 1
    done = momify(there, *other, "--resume")
    assert done.exit_code == 0, done.output
    for cell, old in zip(rows_of(there), rows_of(swept), strict=True):
        assert cell["loss_after"] != old["loss_after"]
        assert load_recipe(there / cell["run"] / "recipe.yaml").train.learning_rate == 0.02


def test_cells_are_trained_on_the_tokens_asked_for(ground: Path, tmp_path: Path) -> None:
    """Where a batch takes more than all of the text."""
    shutil.copytree(ground, tmp_path / "w")
    keys = ("--ffn", "3", "--mha", "3", "--tokens", "500", "--batch-size", "64", "data.train_tokens=200")
    done = momify(tmp_path / "w", *SWEEP, *keys)
    assert done.exit_code == 0, done.output
    assert "1 cells of 3 steps each" in done.output  # 6 blocks of 32 a step
    assert [row["tokens"] for row in rows_of(tmp_path / "w")] == ["576"]


def test_cells_show_bars_and_keep_their_lines_in_their_logs(tmp_path: Path) -> None:
    for quiet, terminal in ((False, True), (True, True), (False, False)):
        out, log = io.StringIO(), tmp_path / f"{quiet}-{terminal}.txt"
        outer = Screen(Console(file=out, force_terminal=terminal, width=100), quiet)
        inner = BarsAlone(outer)
        inner.to_log(log)
        inner.say("a line of the run")
        inner.table("a table", ("a",), (("b",),))
        assert (out.getvalue(), log.read_text()[20:]) == ("", "a line of the run\n")
        with inner.progress("a bar"):
            pass
        assert ("a bar" in out.getvalue()) == (terminal and not quiet)
        assert inner.quiet == quiet


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mha", "4"), "mha is 4; the source has 3"),
        (("--mha", "two"), "--mha is 'two'"),
        (("--grid", "cube"), "--grid is 'cube'"),
        (("--name", "../up"), "run.name"),
        (("--data", "gone.txt"), "gone.txt does not exist"),
        (("--resume",), "no sweep to resume"),
        (("train.stesp=3",), "did you mean 'steps'"),
        (("data.block_length=128",), "exceeds the source's 64 positions"),
    ],
)
def test_mistakes_leave_nothing_behind(ground: Path, arguments: tuple[str, ...], words: str) -> None:
    done = momify(ground, *SWEEP, *arguments)
    assert words in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (ground / "runs").exists()


def test_text_must_be_named_for_a_model_of_ones_own(ground: Path) -> None:
    done = momify(ground, "sweep", "src", "--mha", "2", "--ffn", "2", "--tokens", "10")
    assert "no text known to train src on; name some with --data" in str(done.exception)


def test_sweep_of_a_recipe_takes_its_settings(ground: Path, tmp_path: Path) -> None:
    shutil.copytree(ground, tmp_path / "w")
    (tmp_path / "w/r.yaml").write_text(
        "source: {model: src}\nmom: {mha: 2, ffn: 2, mha_steps: 3, refit_tokens: 0, calibration_blocks: 2}\n"
        "data: {train: text.txt, block_length: 16}\ntrain: {steps: 900, batch_size: 3, precision: fp32, distill: 0.5}\n"
    )
    done = momify(tmp_path / "w", "sweep", "r.yaml", "--mha", "2", "--ffn", "3", "--tokens", "50", "--seeds", "5")
    assert done.exit_code == 0, done.output
    recipe = load_recipe(tmp_path / "w/runs/r-sweep/2x3-seed5/recipe.yaml")
    assert (recipe.train.steps, recipe.train.distill, recipe.mom.mha_steps, recipe.run.seed) == (2, 0.5, None, 5)
    assert (tmp_path / "w/runs/r-sweep/3x3-seed5/model").is_dir()


def test_stopped_sweep_says_how_to_go_on(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ground, tmp_path / "w")
    monkeypatch.setattr("momify.sweep.cells.train", lambda *_: Stopped("SIGTERM", 3))
    monkeypatch.setattr(sys, "argv", ["momify", *SWEEP, "--overwrite"])
    done = momify(tmp_path / "w", *SWEEP, "--overwrite")
    assert done.exit_code == 1
    assert f"stopped by SIGTERM at step 3, saved; go on with: momify {' '.join(SWEEP)} --resume" in done.stderr
