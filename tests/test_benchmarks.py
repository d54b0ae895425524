"""benchmarks/: what they count, and what they do with mistakes and signals."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from momify.recipe import load_recipe
from momify.screen import Screen
from momify.train.fit import Stopped

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


def test_recovery_refuses_a_row_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    recovery = script("recovery", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["recovery.py", "--rows", "static,nosuch"])
    with pytest.raises(SystemExit) as stop:
        recovery.main()
    assert stop.value.code == 2
    assert "'nosuch' is no row" in capsys.readouterr().err


def test_recovery_counts_tokens_where_a_batch_takes_all_of_the_text(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = script("recovery", monkeypatch)
    monkeypatch.setitem(recovery.ROWS, "tiny", ("a row", {"mom": {"mha": 2, "ffn": 3, "importance": "cosine"}}))
    data = {"train": ["text.txt"], "train_tokens": 200, "valid": None, "block_length": 32}
    study = recovery.Study("src", 5_000, data, {"batch_size": 64, "precision": "fp32"}, 4, there / "out")
    found = recovery.run_cell(study, "tiny", 0.1, 0, Screen(Console(quiet=True), quiet=True))
    folder = study.folder("tiny", 0.1, 0)
    assert load_recipe(folder / "recipe.yaml").train.steps == 3  # of 192 tokens
    assert found["tokens"] == 576 == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["tokens"]


@pytest.mark.parametrize("row", ["static", "mixed"])
def test_routed_training_tells_nothing_of_a_training_that_was_stopped(
    row: str, there: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    routed = script("routed_training", monkeypatch)
    monkeypatch.setattr(routed, "train", lambda *_, **how: Stopped("SIGINT", 1))
    monkeypatch.setattr(routed, "convert", lambda recipe, run, screen: None)
    monkeypatch.setattr(routed, "read_provenance", lambda folder: {"trained": {"steps": 0}})
    monkeypatch.setattr(routed, "set_choosing", lambda folder, **fields: None)
    given = argparse.Namespace(source="src", rows=row, seed=0, out=there / "out", train=3, data=["text.txt"],
                               valid=None, block=32, windows=4)  # fmt: skip
    with pytest.raises(SystemExit, match=r"stopped at .*; start again to go on"):
        routed.train_table(given)
    assert row not in capsys.readouterr().out


def test_the_demo_s_card_tells_the_tokens_that_were_seen(there: Path, momify, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_demo = script("pack_demo", monkeypatch)
    (there / "dense.yaml").write_text(
        "run: {name: dense}\nsource: {scratch: {layers: 1, width: 32, heads: 2, context: 32, vocabulary: 400}}\n"
        "data: {train: text.txt, train_tokens: 200, block_length: 32, valid_tokens: 256}\n"
        "train: {steps: 3, batch_size: 64, precision: fp32}\n"
    )
    done = momify("train", "dense.yaml")
    assert done.code == 0, done.err
    assert "3 steps, 576 tokens" in done.out
    (there / "card").mkdir()
    for path in (there / "runs/dense/source").iterdir():
        (there / "card" / path.name).write_bytes(path.read_bytes())
    pack_demo.card_for(there / "card", pack_demo.Run(there / "runs/dense"))
    assert "3 steps, 576 tokens in all" in (there / "card" / "README.md").read_text()
