"""GLUE's sentences and labels, from a folder in its own layout or from the hub."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from momify.errors import MomifyError
from momify.evaluate.glue_tasks import GlueTask
from momify.evaluate.hub import hub_rows
from momify.evaluate.split import Split
from momify.evaluate.tsv import decode, read_bytes, read_rows, shown

HUB = "nyu-mll/glue"
HIGHEST_SIMILARITY = 5.0  # STS-B's scale, from 0


@dataclass(frozen=True)
class Example:
    """One or two sentences and their label: a class number, or STS-B's similarity."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class GlueData:
    """A task's training examples and its sets to score on, by suffix of the metric ("" where there is one set)."""

    train: Split[Example]
    dev: dict[str, Split[Example]]

    @property
    def sha256(self) -> str:
        """Hash of every sentence and label, in order."""
        digest = hashlib.sha256()
        for split in (self.train, *self.dev.values()):
            for example in split.examples:
                digest.update(repr((example.texts, example.label)).encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
        return digest.hexdigest()

    @property
    def limited(self) -> bool:
        """Whether a part of the data was left out."""
        return self.train.limited or any(split.limited for split in self.dev.values())


def read_glue(
    task: GlueTask, folder: Path | None, limit: int | None = None, train_limit: int | None = None
) -> GlueData:
    """The data of a task: from `folder` (FOLDER/glue/TASK or FOLDER/TASK, as GLUE names them); None: from the hub.

    `limit`: at most so many examples a split; `train_limit`: of the training split. Raises MomifyError, naming the
    file (and the line), for a missing file or column, a label that is none, and a split without examples or labels.
    """

    def read(name: str, most: int | None) -> Split:
        split = _from_hub(task, name) if folder is None else _from_files(task, folder, name)
        return split.limit(most)

    return GlueData(read("train", train_limit or limit), {suffix: read(name, limit) for suffix, name in task.dev})


def missing_file(task: GlueTask, folder: Path) -> Path | None:
    """The first file of a task that is not in `folder`, None where all are there."""
    files = [_file(task, folder, name) for name in ("train", *(name for _, name in task.dev))]
    return next((path for path in files if not path.is_file()), None)


def _file(task: GlueTask, folder: Path, split: str) -> Path:
    places = [base / name for base in (folder / "glue", folder) for name in (task.folder, task.name)]
    place = next((place for place in places if place.is_dir()), places[0])
    return place / f"{split}.tsv"


def _from_files(task: GlueTask, folder: Path, split: str) -> Split:
    path = _file(task, folder, split)
    if not path.is_file():
        raise MomifyError(
            f"{task.name}: {path} does not exist; --data-dir must hold {task.folder}/{split}.tsv as GLUE publishes it"
        )
    text = decode(read_bytes(path), path)
    rows = read_rows(path, text, (*task.texts, task.label), task.header, task.broken_rows)
    return _split([_example(task, f"{path} line {number}", cells) for number, cells in rows], str(path))


def _from_hub(task: GlueTask, split: str) -> Split:
    name = split.replace("dev", "validation")
    columns = (*(task.hub_texts or task.texts), "label")
    examples = []
    for number, cells in enumerate(hub_rows(HUB, task.name, name, columns), 1):
        where = f"{HUB}, {task.name} {name}, row {number}"
        label = cells[-1]
        if task.classes and isinstance(label, int) and 0 <= label < len(task.classes):
            label = task.classes[label]
        examples.append(_example(task, where, [*map(str, cells[:-1]), str(label)]))
    return _split(examples, f"{HUB} {task.name} {name}")


def _split(examples: list[Example], origin: str) -> Split:
    if not examples:
        raise MomifyError(f"{origin} holds no examples; take the file as GLUE publishes it")
    return Split(tuple(examples), len(examples))


def _example(task: GlueTask, where: str, cells: list[str]) -> Example:
    """An example from its cells, the label last. Raises MomifyError for a label that is none."""
    *texts, label = cells
    if task.classes is None:
        return Example(tuple(texts), _similarity(label, where, task.label))
    if label not in task.classes:
        known = ", ".join(task.classes)
        raise MomifyError(
            f"{where}: {task.label} is {shown(label)!r}, which is no label of {task.name}; known: {known}"
        )
    return Example(tuple(texts), task.classes.index(label))


def _similarity(text: str, where: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= HIGHEST_SIMILARITY:
        raise MomifyError(f"{where}: {column} is {shown(text)!r}, not a number from 0 to 5")
    return value
