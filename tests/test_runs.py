"""runs.py: who may write into which folder."""

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from momify.errors import MomifyError
from momify.files import whole_folder
from momify.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from momify.replaced import put_back, set_aside
from momify.runs import Run, find_run, latest_run, open_run, opened_run, remove_runs, settle

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
    open_run(recipe(), resume=False).model.mkdir()
    assert open_run(recipe("data.train=my.txt", "train.steps=9"), resume=False).recipe.train.steps == 9
    with pytest.raises(MomifyError, match=r"another mom\.mha"):
        open_run(recipe("mom.mha=3"), resume=False)


@pytest.mark.parametrize("phase", [".", "pretrain"])
def test_a_run_is_started_once_it_has_a_checkpoint(phase: str) -> None:
    """Stopped before its first row of metrics."""
    run = open_run(recipe(), resume=False)
    (run.folder / phase / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(MomifyError, match="--resume of momify train, run or demo goes on with it"):
        open_run(recipe(), resume=False)
    with pytest.raises(MomifyError, match=r"another train\.learning_rate"):
        open_run(recipe("train.learning_rate=0.5"), resume=True)
    open_run(recipe(), resume=True)


def test_run_killed_before_it_made_anything_may_be_started_with_another_recipe() -> None:
    open_run(recipe(), resume=False)
    assert open_run(recipe("mom.mha=3"), resume=False).recipe.mom.mha == 3
    assert open_run(recipe("mom.mha=4"), resume=True).recipe.mom.mha == 4


@pytest.mark.parametrize("left", [(), ("recipe.yaml",)])
def test_a_mistake_leaves_a_folder_as_it_was(left: tuple[str, ...]) -> None:
    """One's own, or that of a run that was killed before it made anything; runs/latest too is what it was."""
    open_run(recipe("run.name=other"), resume=False)
    Path("out").mkdir()
    if left:
        Path("out/recipe.yaml").write_text(dump_recipe(recipe("run.dir=out")))

    def begin_and_fail() -> None:
        with opened_run(recipe("run.dir=out"), resume=False) as run:
            run.log.write_text("began\n")
            raise MomifyError

    with pytest.raises(MomifyError):
        begin_and_fail()
    assert [path.name for path in Path("out").iterdir()] == list(left)
    assert latest_run(None).folder == Path("runs/other")


def test_a_second_start_in_a_new_folder_leaves_the_first_one_s_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find no folder, and the first is faster."""
    with opened_run(recipe("train.steps=1"), resume=False) as run:
        exists = Path.exists
        with monkeypatch.context() as patched:
            patched.setattr(Path, "exists", lambda path: path != run.folder and exists(path))
            with (
                pytest.raises(MomifyError, match="another momify works in runs/run now"),
                opened_run(recipe("train.steps=2"), resume=False),
            ):
                pass
        assert run.recipe.train.steps == 1
        run.model.mkdir()


def sweep_of(*runs: str) -> Path:
    for name in runs:
        open_run(recipe(f"run.dir=runs/s/{name}"), resume=False).model.mkdir()
    Path("runs/s/sweep.csv").write_text("a")
    return Path("runs/s")


def test_a_folder_of_runs_goes_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sweep_of("a", "b")
    with monkeypatch.context() as patched:  # killed while it is removed
        patched.setattr("momify.replaced.shutil.rmtree", lambda *_, **how: None)
        remove_runs(folder, ("sweep.csv",))
    assert not folder.exists()
    sweep_of("a")
    remove_runs(folder, ("sweep.csv",))
    assert [path.name for path in Path("runs").iterdir()] == ["latest"]
    remove_runs(folder, ("sweep.csv",))


def test_a_folder_of_runs_stays_where_something_else_would_go_with_it() -> None:
    folder = sweep_of("a", "b")
    for strange in (folder / "notes.md", folder / "b" / "notes.md"):
        strange.write_text("mine")
        with pytest.raises(MomifyError, match=f"{strange} is not of momify, and would go with runs/s"):
            remove_runs(folder, ("sweep.csv",))
        strange.unlink()
    with (
        opened_run(recipe("run.dir=runs/s/b"), resume=False),
        pytest.raises(MomifyError, match="another momify works in runs/s/b"),
    ):
        remove_runs(folder, ("sweep.csv",))
    assert (folder / "a" / "model").is_dir()


def test_a_home_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = open_run(recipe("run.dir='~/my run'"), resume=False)
    assert run.folder == tmp_path / "home" / "my run"
    assert run.recipe.folder == run.folder
    command = run.resume_line("train")
    assert shlex.split(command) == ["momify", "train", str(run.folder / "recipe.yaml"), "--resume"]
    with pytest.raises(MomifyError, match=r"run\.dir: '~nobody-of-that-name/x' names no home folder"):
        recipe("run.dir=~nobody-of-that-name/x")


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


def trained_run() -> dict[str, str]:
    """A run with a model, metrics and a user's own file; all its files with what is in them."""
    run = open_run(recipe(), resume=False)
    run.model.mkdir()
    (run.model / "config.json").write_text("trained for a week")
    (run.folder / "metrics.jsonl").write_text("{}\n")
    (run.folder / "notes.md").write_text("mine")
    return content(run.folder)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_removes_only_what_a_run_writes() -> None:
    trained_run()
    with opened_run(recipe("train.steps=3"), resume=False, overwrite=True) as run:
        assert not run.model.exists()
        assert not run.started
    assert sorted(content(run.folder)) == ["notes.md", "recipe.yaml"]
    assert run.recipe.train.steps == 3


@pytest.mark.parametrize("mistake", [MomifyError, KeyboardInterrupt])
def test_what_overwrite_replaces_is_back_when_the_new_run_fails_before_it_trains(mistake: type) -> None:
    open_run(recipe("run.name=other"), resume=False)
    before = trained_run()
    open_run(recipe("run.name=other"), resume=False)

    def convert_and_fail() -> None:
        with opened_run(recipe("data.train=typo.txt"), resume=False, overwrite=True) as run:
            run.model.mkdir()
            (run.model / "config.json").write_text("converted, and then the text is missing")
            raise mistake

    with pytest.raises(mistake):
        convert_and_fail()
    assert content(Path("runs/run")) == before
    assert latest_run(None).folder == Path("runs/other")


def test_what_overwrite_replaces_is_gone_once_the_new_run_trains() -> None:
    trained_run()

    def train_and_fail() -> None:
        with opened_run(recipe("train.steps=3"), resume=False, overwrite=True) as run:
            run.model.mkdir()
            settle(run)
            raise MomifyError

    with pytest.raises(MomifyError):
        train_and_fail()
    assert sorted(content(Path("runs/run"))) == ["notes.md", "recipe.yaml"]
    assert list(Path("runs/run").glob(".*")) == []


@pytest.mark.parametrize("moves", range(12))
def test_kill_while_a_run_is_replaced_leaves_it(moves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after so many moves of a replacement or of putting it back: the next start finds the earlier run."""
    before, left = trained_run(), moves
    names = ("model", "metrics.jsonl", "recipe.yaml")

    def dying(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise SystemError
        Path(source).rename(target)

    folder = Path("runs/run")
    with monkeypatch.context() as patched:
        patched.setattr("momify.replaced.os.replace", dying)
        with contextlib.suppress(SystemError):
            set_aside(folder, names)
            (folder / "recipe.yaml").write_text("of the new run")
            put_back(folder, names)
    if (folder / ".earlier-run").exists():
        put_back(folder, names)
    assert content(folder) == before


def test_next_start_brings_back_what_a_killed_one_had_moved() -> None:
    before = trained_run()
    set_aside(Path("runs/run"), ("model", "metrics.jsonl", "recipe.yaml"))
    with pytest.raises(MomifyError, match="holds an earlier run"), opened_run(recipe(), resume=False):
        pass
    assert content(Path("runs/run")) == before


def test_resume_and_overwrite_together_are_refused_and_change_nothing() -> None:
    before = trained_run()
    with pytest.raises(MomifyError, match="give one of them"), opened_run(recipe(), resume=True, overwrite=True):
        pass
    assert content(Path("runs/run")) == before


def test_latest_is_no_name_for_a_run() -> None:
    with pytest.raises(MomifyError, match="the link to the newest run; use another"):
        recipe("run.name=Latest")
    before = trained_run()
    with pytest.raises(MomifyError, match="the link to the newest run"):
        open_run(recipe("run.dir=runs/latest"), resume=False, overwrite=True)
    assert content(Path("runs/run")) == before


def test_folder_in_the_place_of_latest_is_named_before_anything_is_written() -> None:
    Path("runs/latest").mkdir(parents=True)
    with pytest.raises(MomifyError, match="runs/latest is not the link"), opened_run(recipe(), resume=False):
        pass
    assert [path.name for path in Path("runs").iterdir()] == ["latest"]


def test_resume_of_nothing_and_missing_runs() -> None:
    with pytest.raises(MomifyError, match="no run to resume"):
        open_run(recipe(), resume=True)
    with pytest.raises(MomifyError, match="there is no run under"):
        latest_run(None)
    assert find_run("nothing") is None


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


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_kill_while_a_model_is_replaced_loses_no_model(renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after so many renames: the next start finds the old model or the new one."""
    trained_run()
    run, left = Run(Path("runs/run")), [renames]

    def replace(old: Path, new: Path, rename: Callable = os.replace) -> None:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        rename(old, new)

    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "replace", replace)
        with whole_folder(run.model) as folder:
            (folder / "config.json").write_text("new")
        os._exit(0)
    os.waitpid(child, 0)
    with opened_run(recipe(), resume=True) as run:
        assert (run.model / "config.json").read_text() == ("trained for a week" if renames == 1 else "new")
        assert list(run.folder.glob(".momify-*")) == []


@pytest.mark.parametrize("error", [MomifyError("no such text"), KeyboardInterrupt()])
def test_a_recipe_that_lay_where_the_run_goes_stays(error: BaseException) -> None:
    """`momify train runs/mine/recipe.yaml`, written by hand, with a text that is not there."""
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/recipe.yaml").write_text("# mine\n" + dump_recipe(recipe()), encoding="utf-8")
    with pytest.raises(type(error)), opened_run(load_recipe(Path("runs/run/recipe.yaml")), resume=False):
        raise error
    assert Path("runs/run/recipe.yaml").read_text(encoding="utf-8").startswith("# mine\n")
    assert not Path("runs/run/log.txt").exists()


def test_a_start_that_is_refused_leaves_what_others_are_writing() -> None:
    """An export or a report works in the run without holding it."""
    trained_run()
    half = Path("runs/run/.momify-export.abc")
    half.mkdir()
    with pytest.raises(MomifyError, match="holds an earlier run"), opened_run(recipe(), resume=False):
        pass
    assert half.exists()
    with opened_run(recipe(), resume=True):
        assert not half.exists()
