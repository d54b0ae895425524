"""Run folders: where a run keeps its parts, which one is the latest, and who may write into it."""

import os
from dataclasses import dataclass
from pathlib import Path

from momify.errors import MomifyError
from momify.files import disk_errors, write_text
from momify.recipe import Recipe, dump_recipe, load_recipe

RUNS = Path("runs")
LATEST = "latest"


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
    def evaluation(self) -> Path:
        return self.folder / "eval"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was started with. Raises MomifyError where there is none."""
        return load_recipe(self.recipe_file)


def open_run(recipe: Recipe, resume: bool, overwrite: bool = False) -> Run:
    """The folder for a run, with its recipe written and `runs/latest` naming it.

    Raises MomifyError when the folder holds an earlier run (unless it is resumed with the same recipe, or overwritten),
    or something that is not a run at all.
    """
    run = Run(recipe.folder)
    if run.folder.exists() and any(run.folder.iterdir()):
        _check_earlier(run, recipe, resume, overwrite)
    elif resume:
        raise MomifyError(f"{run.folder} holds no run to resume; start it without --resume")
    with disk_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.recipe_file, dump_recipe(recipe))
    _point_latest(run.folder)
    return run


def _check_earlier(run: Run, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    if not run.recipe_file.exists():
        raise MomifyError(f"{run.folder} exists and is not a run of momify; set run.name or run.dir to another folder")
    if resume:
        differing = changed_keys(run.recipe, recipe)
        if differing:
            raise MomifyError(f"{run.folder} was started with another {differing[0]}; resume it with the same recipe")
    elif overwrite:
        _clear(run)
    else:
        raise MomifyError(f"{run.folder} holds an earlier run; --resume goes on with it, --overwrite starts anew")


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Names of the keys, as block.key, in which two recipes differ; what is only measured (eval) may differ."""
    before, after = old.model_dump(exclude={"eval"}), new.model_dump(exclude={"eval"})
    return [
        f"{block}.{key}" if isinstance(after[block], dict) and isinstance(before[block], dict) else block
        for block in after
        for key in (after[block] if isinstance(after[block], dict) else [block])
        if (before[block] or {}).get(key) != (after[block] or {}).get(key)
    ] if before != after else []  # fmt: skip


def _clear(run: Run) -> None:
    """Remove what momify wrote in an earlier run, and nothing else."""
    import shutil

    for name in ("source", "pretrain", "model", "eval", "export", "checkpoints", "tensorboard"):
        shutil.rmtree(run.folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "log.txt", "report.json", "report.md", "recipe.yaml"):
        (run.folder / name).unlink(missing_ok=True)


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


def find_run(name: str | None) -> Run | None:
    """The run of that name or folder, the latest for None; None where there is no such run."""
    folder = RUNS / (name or LATEST)
    for candidate in (folder, Path(name)) if name else (folder,):
        if (candidate / "recipe.yaml").is_file():
            return Run(candidate)
    return None


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
