"""Run folders: where a run keeps its parts, which one is the latest, and who may write into it."""

import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momify.errors import MomifyError
from momify.files import disk_errors, put_back_folders, temporaries, write_text
from momify.processes import is_first, wait_for_all
from momify.recipe import Recipe, dump_recipe, load_recipe
from momify.recipe_blocks import LATEST, SAME_RESULT, WITHOUT, Block
from momify.replaced import ASIDE, clear_away, forget, put_back, remove, set_aside, waits

RUNS = Path("runs")
STEPS = "train.steps"
ONE_OF_TWO = "--resume goes on with an earlier run and --overwrite replaces it; give one of them"
_WRITTEN = ("source", "pretrain", "model", "eval", "export", "checkpoints", "tensorboard", "metrics.jsonl", "log.txt",
            "report.json", "report.md", "report.html", "routes.html", "recipe.yaml")  # fmt: skip
"""What momify writes into a run folder; the recipe last, as `set_aside` wants it."""
_BEGINNING = ("recipe.yaml", "log.txt")  # what a run has that has made nothing yet


@dataclass(frozen=True)
class Run:
    """One run folder and the places in it."""

    folder: Path

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def source(self) -> Path:
        """The dense model of phase 1."""
        return self.folder / "source"

    @property
    def pretraining(self) -> Path:
        """Metrics and checkpoints of phase 1."""
        return self.folder / "pretrain"

    @property
    def model(self) -> Path:
        """The MoM: at first as converted, then as trained."""
        return self.folder / "model"

    @property
    def metrics(self) -> Path:
        """What phase 2 logged."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.folder / "eval"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def started(self) -> bool:
        """Whether a training has begun here: a checkpoint may come before the first row."""
        traces = ("metrics.jsonl", "checkpoints/checkpoint-*")
        return any(any(folder.glob(trace)) for folder in (self.folder, self.pretraining) for trace in traces)

    @property
    def empty(self) -> bool:
        """Whether nothing that a recipe decides has been made here yet."""
        return not (self.started or any(part.exists() for part in (self.source, self.pretraining, self.model)))

    @property
    def swept(self) -> tuple[Path, ...]:
        """Where a process that was killed may have left half-written files."""
        return self.folder, self.pretraining, self.evaluation

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was started with. Raises MomifyError where there is none."""
        return load_recipe(self.recipe_file)

    def resume_line(self, command: str) -> str:
        """What to type to go on with it."""
        return shlex.join(["momify", command, str(self.recipe_file), "--resume"])


def open_run(recipe: Recipe, resume: bool, overwrite: bool = False) -> Run:
    """The folder for a run, with its recipe written and `runs/latest` naming it.

    Raises MomifyError when the folder holds an earlier run (unless it is resumed with the same recipe, or overwritten),
    or something that is not a run at all. What is overwritten waits for `settle`.
    """
    run = Run(recipe.folder)
    _check_folder(run.folder, resume, overwrite)
    if _occupied(run.folder):
        _check_earlier(run, recipe, resume, overwrite)
    with disk_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.recipe_file, dump_recipe(recipe))
    _point_latest(run.folder)
    return run


@contextmanager
def opened_run(recipe: Recipe, resume: bool, overwrite: bool = False) -> Iterator[Run]:
    """As `open_run`, held against other processes; a run that fails before it has made anything leaves nothing behind.

    One that was to replace another and fails before `settle`, or is killed, leaves that other one. Of the processes of
    one run (torchrun) the first opens it and the others wait. Raises MomifyError when a process of another run works in
    the folder.
    """
    if not is_first():
        wait_for_all()
        yield Run(recipe.folder)
        return
    before = os.readlink(RUNS / LATEST) if (RUNS / LATEST).is_symlink() else None
    with ExitStack() as held:
        if not recipe.folder.exists():
            _check_folder(recipe.folder, resume, overwrite)
            with disk_errors(recipe.folder):
                recipe.folder.mkdir(parents=True, exist_ok=True)
            held.callback(_remove_empty, recipe.folder, RUNS)
        held.enter_context(_alone_in(recipe.folder))
        earlier = Run(recipe.folder)
        for folder in earlier.swept:  # what a process was killed over: whether a run is started depends on it
            put_back_folders(folder)
        if waits(recipe.folder):  # killed before its first training step
            put_back(recipe.folder, _WRITTEN)
        beginning = {name: path.read_bytes() for name in _BEGINNING if (path := recipe.folder / name).is_file()}
        run = open_run(recipe, resume, overwrite)
        _sweep(run)
        wait_for_all()
        yield from _leaving_nothing(run, before, beginning)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes of this machine; the system lets go of it however this one ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise MomifyError(f"another momify works in {folder} now; wait for it, or set another run.name") from None
    finally:
        os.close(handle)


def _sweep(run: Run) -> None:
    """Remove the half-written files and folders of a process that was killed here; what they were to replace stays."""
    for folder in run.swept:
        for path in temporaries(folder):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _leaving_nothing(run: Run, before: str | None, beginning: dict[str, bytes]) -> Iterator[Run]:
    """`before`: what runs/latest named; `beginning`: the recipe and the log that lay there, which stay as they were."""
    try:
        yield run
    except BaseException:
        if waits(run.folder):
            put_back(run.folder, _WRITTEN)
            _restore_latest(before)
        elif run.empty:
            remove(run.folder, _BEGINNING)
            for name, content in beginning.items():
                (run.folder / name).write_bytes(content)
            _restore_latest(before)
            _remove_empty(RUNS)
        raise
    settle(run)


def remove_runs(folder: Path, beside: Sequence[str]) -> None:
    """Remove a folder of runs and the files `beside` them, in one step for whoever looks; nothing where there is none.

    Raises MomifyError for what momify did not write there, and where another process works in one of the runs.
    """
    if not folder.exists():
        return
    with ExitStack() as held:
        for path in set(folder.iterdir()) - set(temporaries(folder)) - {folder / name for name in beside}:
            strange = {path}
            if path.is_dir():
                held.enter_context(_alone_in(path))
                known = {path / name for name in (ASIDE, *_WRITTEN)}
                strange = set(path.iterdir()) - set(temporaries(path)) - known
            if strange:
                raise MomifyError(f"{min(strange)} is not of momify, and would go with {folder}; move it away first")
        clear_away(folder)


def settle(run: Run) -> None:
    """The run is ready to train: what it replaces (--overwrite) goes for good."""
    if is_first():
        forget(run.folder)


def _remove_empty(*folders: Path) -> None:
    """Remove those of `folders` that hold nothing, one after the other."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _restore_latest(latest: str | None) -> None:
    (RUNS / LATEST).unlink(missing_ok=True)
    if latest is not None:
        (RUNS / LATEST).symlink_to(latest)


def _check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise MomifyError for what can be no run's folder, and where there is nothing to resume."""
    if resume and overwrite:
        raise MomifyError(ONE_OF_TWO)
    _check_link(folder)
    if folder.exists() and not folder.is_dir():
        raise MomifyError(f"{folder} is a file, not a folder for a run; set run.name or run.dir to another")
    if resume and not _occupied(folder):
        raise MomifyError(f"{folder} holds no run to resume; start it without --resume")


def _occupied(folder: Path) -> bool:
    return folder.exists() and bool(set(folder.iterdir()) - set(temporaries(folder)))


def _check_link(folder: Path) -> None:
    """Raise MomifyError for a run in the place of runs/latest, and for something else that lies there."""
    link = RUNS / LATEST
    if folder.parent.resolve() == RUNS.resolve() and folder.name.lower() == LATEST:
        raise MomifyError(f"{folder} is the link to the newest run; set run.name or run.dir to another folder")
    if link.exists() and not link.is_symlink():
        raise MomifyError(f"{link} is not the link to the newest run that momify makes there; rename it")


def _check_earlier(run: Run, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    if not run.recipe_file.exists():
        raise MomifyError(f"{run.folder} exists and is not a run of momify; set run.name or run.dir to another folder")
    if overwrite:
        set_aside(run.folder, _WRITTEN)
        return
    if run.empty:
        return
    differing = changed_keys(run.recipe, recipe)
    if not run.started:  # converted only: it may be trained on any text, with any settings
        differing = [key for key in differing if key.split(".")[0] in ("source", "mom")]
    elif not resume:
        raise MomifyError(f"{run.folder} holds an earlier run; --resume of momify train, run or demo goes on with it, "
                          "--overwrite starts anew")  # fmt: skip
    if differing:
        why = ", and a run cannot be lengthened: its schedule ends with its steps" if STEPS in differing else ""
        raise MomifyError(
            f"{run.folder} was made with another {STEPS if why else differing[0]}{why}; use the same recipe, another "
            "run.name, or --overwrite"
        )
    if run.started and (unsaid := keys_unsaid(run.recipe)):
        names = ", ".join(f"{key} (now {now})" for key, (now, _) in unsaid.items())
        raise MomifyError(
            f"{run.recipe_file} is of a version of momify without {names}, which changes the training; to go on as it "
            f"began, write there {', '.join(f'{key}: {then}' for key, (_, then) in unsaid.items())}"
        )


def keys_unsaid(old: Recipe) -> dict[str, tuple[str, str]]:
    """Keys, as block.key, that came after a run's recipe was written and whose defaults change its training.

    With their defaults and what was done before there were any, as YAML. Of the mom block there is none: converted is
    converted.
    """
    scratch = old.source.scratch
    blocks = {"train": old.train, "data": old.data, "source.scratch": scratch,
              "source.scratch.train": scratch and scratch.train}  # fmt: skip
    return {
        f"{name}.{key}": (_shown(type(block).model_fields[key].default), _shown(WITHOUT.get(key, "what it was")))
        for name, block in blocks.items()
        if block
        for key in _keys_since(block, taught=name == "train" and old.mom is not None)
    }


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _keys_since(block: Block, taught: bool) -> list[str]:
    """Keys that a block does not say, and whose default is not what was done before there were such."""
    fields = type(block).model_fields
    unsaid = [key for key in fields if key not in block.model_fields_set and key not in SAME_RESULT]
    if not taught:  # then null is decided as it was before
        unsaid = [key for key in unsaid if fields[key].default is not None]
    return [key for key in unsaid if key not in WITHOUT or fields[key].default != WITHOUT[key]]


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Names of the keys, as block.key, in which two recipes differ.

    What is only measured (eval) may differ, what changes no result, and precision where it is left to the machine,
    which may be another.
    """
    nothing: Any = {"eval": True, "train": SAME_RESULT, "source": {"scratch": {"train": SAME_RESULT}}}
    before, after = (_flat(recipe.model_dump(exclude=nothing)) for recipe in (old, new))
    if new.train.precision is None:
        before["train.precision"] = None
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """{block: {key: value}} -> {block.key: value}; a block that is null stays one key."""
    blocks = {name: block if isinstance(block, dict) else {"": block} for name, block in recipe.items()}
    return {f"{name}.{key}".rstrip("."): value for name, block in blocks.items() for key, value in block.items()}


def _point_latest(folder: Path) -> None:
    """Make runs/latest a link to `folder`, in one step; a folder elsewhere is linked by its absolute path."""
    with disk_errors(RUNS / LATEST):
        RUNS.mkdir(exist_ok=True)
        inside = folder.resolve().parent == RUNS.resolve()
        target = Path(folder.name) if inside else folder.resolve()
        temporary = RUNS / f".{LATEST}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, RUNS / LATEST)


def plain_name(name: str) -> str:
    """A name for a run or a folder of results: what no run's name has in it becomes a hyphen."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:90]
    return plain if plain and plain.lower() != LATEST else f"model-{plain}".strip("-")


def find_run(name: str | None) -> Run | None:
    """The run of that name or folder, the latest for None; None where there is no such run.

    One that a killed process was replacing is put back first. Raises MomifyError where a living one is replacing it.
    """
    folder = RUNS / (name or LATEST)
    for candidate in (folder, Path(name)) if name else (folder,):
        if waits(candidate):
            with _alone_in(candidate):
                put_back(candidate, _WRITTEN)
        if (candidate / "recipe.yaml").is_file():
            return Run(_plain(candidate))
    return None


def _plain(folder: Path) -> Path:
    """The folder that a link like runs/latest names, relative to here where it lies below."""
    real = folder.resolve()
    return real.relative_to(Path.cwd()) if real.is_relative_to(Path.cwd()) else real


def latest_run(name: str | None) -> Run:
    """As `find_run`, but raises MomifyError where there is no such run."""
    run = find_run(name)
    if run is None:
        raise MomifyError(
            f"there is no run '{name}' under {RUNS}/; give its name or folder"
            if name
            else f"there is no run under {RUNS}/ yet; start one with momify run RECIPE, or name a MODEL"
        )
    return run
