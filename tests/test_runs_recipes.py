"""runs.py: with which recipe a run may go on, its own or that of an older version."""

from pathlib import Path

import pytest
import yaml

from momify.errors import MomifyError
from momify.recipe import Recipe, parse_recipe
from momify.recipe_blocks import SAME_RESULT, WITHOUT, DataBlock, Scratch, TrainBlock
from momify.runs import Run, changed_keys, keys_unsaid, open_run

TEXT = "source: {model: gpt2}\nmom: {mha: 8, ffn: 12}\ndata: {train: builtin:demo}\n"


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "x", list(overrides))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_changes_no_result_may_change_when_a_run_goes_on() -> None:
    run = open_run(recipe("train.micro_batch=64"), resume=False)
    (run.folder / "metrics.jsonl").write_text("{}\n")
    found = open_run(recipe("train.micro_batch=8", "train.log_every=7", "train.keep=9"), resume=True)
    assert (found.recipe.train.micro_batch, found.recipe.train.log_every, found.recipe.train.keep) == (8, 7, 9)
    scratch = "source.scratch={layers: 2, train: {micro_batch: %s, steps: %s}}"
    dense = [recipe("source.model=null", scratch % numbers) for numbers in ((8, 5), (1, 5), (8, 6))]
    assert changed_keys(dense[0], dense[1]) == []
    assert changed_keys(dense[0], dense[2]) == ["source.scratch"]


def leave_out(run: Run, *keys: str, block: str = "train") -> None:
    """Make a run's recipe one of a version that had no such keys."""
    told = yaml.safe_load(run.recipe_file.read_text())
    place = told
    for name in block.split("."):
        place = place[name]
    for key in keys:
        del place[key]
    run.recipe_file.write_text(yaml.safe_dump(told))


def test_a_run_of_a_version_without_a_key_goes_on_as_that_version_meant_it() -> None:
    def begun(*overrides: str) -> Run:
        return open_run(recipe("train.hidden=0", "train.splice=1", "train.matrix_rate=1", *overrides), resume=False)

    run = begun()
    run.model.mkdir()
    leave_out(run, "hidden", "splice", "matrix_rate", "keep", "micro_batch", "fsdp")
    leave_out(run, "train_tokens", block="data")
    open_run(run.recipe, resume=False)  # converted only: it takes today's defaults
    run = begun()
    leave_out(run, "hidden", "splice", "matrix_rate", "keep", "micro_batch", "fsdp")
    leave_out(run, "train_tokens", block="data")
    (run.folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(MomifyError) as caught:
        open_run(run.recipe, resume=True)
    line = str(caught.value)
    assert "without train.matrix_rate (now 2.0), train.hidden (now null), train.splice (now null), which" in line
    assert line.endswith("write there train.matrix_rate: 1.0, train.hidden: 0.0, train.splice: 1")
    told = yaml.safe_load(run.recipe_file.read_text())
    told["train"] |= {"matrix_rate": 1.0, "hidden": 0.0, "splice": 1}
    run.recipe_file.write_text(yaml.safe_dump(told))
    assert open_run(run.recipe, resume=True).recipe.train.splice == 1


def test_a_dense_training_goes_on_without_what_only_a_source_gives_a_meaning() -> None:
    dense = parse_recipe("source: {scratch: {layers: 2}}\ndata: {train: builtin:demo}\n", "x")
    run = open_run(dense, resume=False)
    assert keys_unsaid(run.recipe) == {}
    run.pretraining.mkdir()
    (run.pretraining / "metrics.jsonl").write_text("{}\n")
    leave_out(run, "hidden", "splice", "optimizer", "embedding_rate")
    open_run(run.recipe, resume=True)
    leave_out(run, "matrix_rate")
    with pytest.raises(MomifyError, match=r"write there train\.matrix_rate: 1\.0$"):
        open_run(run.recipe, resume=True)


def test_what_was_before_a_key_is_told_of_keys_that_there_are() -> None:
    known = TrainBlock.model_fields.keys() | DataBlock.model_fields.keys() | Scratch.model_fields.keys()
    assert WITHOUT.keys() <= known
    assert TrainBlock.model_fields.keys() >= SAME_RESULT


def test_changed_keys_names_each() -> None:
    assert changed_keys(recipe(), recipe("mom.mha=3", "train.steps=1", "eval.limit=5")) == ["mom.mha", "train.steps"]
    assert changed_keys(recipe(), recipe()) == []
    assert changed_keys(recipe("train.precision=bf16"), recipe()) == []  # left to the machine, as it is by default
    assert changed_keys(recipe(), recipe("train.precision=bf16")) == ["train.precision"]
