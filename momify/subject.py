"""What a command works on: a model folder, the source beside it, its text, and where results go."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from momify.convert.source import read_config
from momify.convert.stored_mom import read_mom_config
from momify.errors import MomifyError
from momify.models import BUILTIN, locate, model_type, read_provenance
from momify.recipe import Recipe, make_recipe
from momify.recipe_blocks import DataBlock
from momify.runs import RUNS, Run, find_run, plain_name
from momify.screen import Screen

ALL = 2**62  # tokens: more than any text has


@dataclass(frozen=True)
class Subject:
    """A model with all that is known about it; `run` is None for a model outside the runs."""

    name: str
    folder: Path
    kind: str
    """gpt2 or mom."""
    run: Run | None
    recipe: Recipe | None
    """The recipe it was made by, None for a model that momify did not make."""

    @property
    def results(self) -> Path:
        """The folder for eval/, report.* and export/."""
        return self.run.folder if self.run else results_folder(self.name, self.folder)

    def data(self, paths: list[str] | None, column: str = "text") -> DataBlock:
        """The text to measure on: all of `paths` if given, else what is held out of what the model was trained with.

        Raises MomifyError where neither is known.
        """
        known = self.recipe.data if self.recipe else None
        if paths and known and paths == known.train:
            return known
        if paths:
            length = known.block_length if known else self.block_length
            if paths == [BUILTIN]:  # which has held-out text of its own
                return DataBlock(train=paths, block_length=length)
            whole = {"valid_tokens": ALL} if all(Path(path).exists() for path in paths) else {}
            return DataBlock(train=paths, train_tokens=1, valid=paths, column=column, block_length=length, **whole)
        if known:
            return known
        if self.name == BUILTIN:
            return DataBlock(train=[BUILTIN], block_length=self.block_length)
        raise MomifyError(f"there is no held-out text known for {self.name}; name some with --data FILE")

    @property
    def block_length(self) -> int:
        """The model's positions, at most 1024."""
        config = read_config(self.folder) if self.kind == "gpt2" else read_mom_config(self.folder)
        return min(1024, config.max_position_embeddings)

    def source(self, screen: Screen) -> Path:
        """The folder of the dense model that this one was made from. Raises MomifyError where it is not known."""
        if self.run and (self.run.source / "config.json").is_file():
            return self.run.source
        if self.recipe is None or self.recipe.source.model is None:
            raise MomifyError(f"{self.name} does not say which source it was made from; only momify's own models do")
        return locate(self.recipe.source.model, self.recipe.source.revision, screen.say)


def model_name(name: str) -> str:
    """MODEL as the name of a run: a folder's own name, of a hub name what stands behind the /."""
    return plain_name(Path(name).resolve().name if name != BUILTIN and Path(name).exists() else name.rpartition("/")[2])


def results_folder(name: str, folder: Path) -> Path:
    """Where results on a model outside the runs go: under its name, and its place, as other folders share the name."""
    local = name != BUILTIN and Path(name).exists()
    plain, place = (folder.resolve().name, str(folder.resolve())) if local else (name, name)
    short = RUNS / plain_name(plain)
    if not local and not (short / "recipe.yaml").exists():
        return short
    return RUNS / f"{plain_name(plain)}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def find_subject(name: str | None, screen: Screen) -> Subject:
    """The subject that MODEL (or, for None, the latest run) means. Raises MomifyError with the remedy."""
    run = find_run(name) if name != BUILTIN else None
    folder = locate(name, say=screen.say)
    recipe = run.recipe if run else _recorded_recipe(folder)
    return Subject(name or str(run.folder if run else folder), folder, model_type(folder), run, recipe)


def _recorded_recipe(folder: Path) -> Recipe | None:
    recorded = read_provenance(folder).get("recipe")
    return make_recipe(recorded, f"recipe in {folder}/momify.json") if recorded else None


def context_length(name: str, revision: str | None, screen: Screen) -> int:
    """Positions of a source, at most 1024: the block length for a conversion that names none."""
    return min(1024, read_config(locate(name, revision, screen.say)).max_position_embeddings)
