"""runs.py: who may write into which folder."""

from pathlib import Path

import pytest

from momify.errors import MomifyError
from momify.recipe import Recipe, parse_recipe
from momify.runs import changed_keys, find_run, latest_run, open_run, opened_run

TEXT = "source: {model: gpt2}\nmom: {mha: 8, ffn: 12}\ndata: {train: builtin:demo}\n"


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "x", list(overrides))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_latest_names_the_newest_and_survives_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run(recipe("run.name=a"), resume=False)
    open_run(recipe("run.name=b"), resume=False)
    assert latest_run(None).recipe.run.name == "b"
    assert find_run("a").folder == Path("runs/a")
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "runs").rename(moved / "runs")
    monkeypatch.chdir(moved)
    assert latest_run(None).recipe.run.name == "b"


def test_run_elsewhere_is_found_by_latest(tmp_path: Path) -> None:
    open_run(recipe(f"run.dir={tmp_path / 'else' / 'where'}"), resume=False)
    assert latest_run(None).folder.resolve() == tmp_path / "else" / "where"


def test_started_run_needs_a_word(tmp_path: Path) -> None:
    run = open_run(recipe(), resume=False)
    (run.folder / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(MomifyError, match="--resume"):
        open_run(recipe(), resume=False)
    open_run(recipe(), resume=True)
    with pytest.raises(MomifyError, match=r"another train\.steps"):
        open_run(recipe("train.steps=3"), resume=True)
    open_run(recipe("eval.limit=100"), resume=True)  # what is only measured may change
    open_run(recipe("train.steps=3"), resume=False, overwrite=True)
    assert not (run.folder / "metrics.jsonl").exists()


def test_converted_run_may_be_trained_on_other_text() -> None:
    open_run(recipe(), resume=False)
    assert open_run(recipe("data.train=my.txt", "train.steps=9"), resume=False).recipe.train.steps == 9
    with pytest.raises(MomifyError, match=r"another mom\.mha"):
        open_run(recipe("mom.mha=3"), resume=False)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(MomifyError, match="not a run of momify"):
            open_run(recipe(), resume=False, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_file_in_the_place_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").write_text("mine")
    with pytest.raises(MomifyError, match="is a file, not a folder for a run"):
        open_run(recipe(), resume=False)
    assert (tmp_path / "runs" / "run").read_text() == "mine"


def test_overwrite_removes_only_what_a_run_writes() -> None:
    run = open_run(recipe(), resume=False)
    (run.folder / "notes.md").write_text("mine")
    run.model.mkdir()
    open_run(recipe(), resume=False, overwrite=True)
    assert (run.folder / "notes.md").exists()
    assert not run.model.exists()


def test_resume_of_nothing_and_missing_runs() -> None:
    with pytest.raises(MomifyError, match="no run to resume"):
        open_run(recipe(), resume=True)
    with pytest.raises(MomifyError, match="there is no run under"):
        latest_run(None)
    assert find_run("nothing") is None


def test_changed_keys_names_each() -> None:
    assert changed_keys(recipe(), recipe("mom.mha=3", "train.steps=1", "eval.limit=5")) == ["mom.mha", "train.steps"]
    assert changed_keys(recipe(), recipe()) == []


def test_second_start_in_a_folder_is_refused_while_the_first_works() -> None:
    with (
        opened_run(recipe(), resume=False) as run,
        pytest.raises(MomifyError, match=r"another momify works in runs/run now"),
        opened_run(recipe(), resume=False, overwrite=True),
    ):
        pass
    (run.folder / "metrics.jsonl").write_text("{}\n")
    with opened_run(recipe(), resume=True):  # the first let go of it
        pass


def test_what_a_killed_process_left_is_removed_and_nothing_else() -> None:
    run = open_run(recipe(), resume=False)
    (run.folder / ".momify-model.abc").mkdir()
    (run.folder / ".momify-metrics.jsonl.xyz").write_text("half")
    (run.folder / ".notes.md").write_text("mine")
    with opened_run(recipe(), resume=False):
        pass
    assert sorted(path.name for path in run.folder.glob(".*")) == [".notes.md"]


def test_run_that_was_killed_before_its_recipe_was_written_can_be_started_again() -> None:
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/.momify-recipe.yaml.x1").write_text("run: {na")
    with opened_run(recipe(), resume=False) as run:
        assert sorted(path.name for path in run.folder.iterdir()) == ["recipe.yaml"]
        run.model.mkdir()
