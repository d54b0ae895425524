"""Names of tasks -> tasks with their data, read and checked before any model is loaded."""

from collections.abc import Callable
from pathlib import Path

from momify.errors import MomifyError
from momify.evaluate.fine_tune import FineTuning
from momify.evaluate.glue import MAX_LENGTH, Glue
from momify.evaluate.glue_data import missing_file, read_glue
from momify.evaluate.glue_tasks import GLUE
from momify.evaluate.lm_eval import LmEval
from momify.evaluate.task import Task
from momify.evaluate.xsum import Decoding, Xsum
from momify.evaluate.xsum_data import read_xsum
from momify.recipe_blocks import EvalBlock
from momify.task_names import LM_EVAL

Say = Callable[[str], None]


def make_tasks(settings: EvalBlock, ppl: Callable[[], Task], say: Say) -> list[Task]:
    """The tasks that an eval block names, each once; `glue` stands for those of its tasks whose data is there.

    `ppl` makes the task of that name. Raises MomifyError, naming the file, where the data of a named task is missing or
    wrong; what the group `glue` lacks is said in one line.
    """
    makers: dict[str, Callable[[], Task]] = {}
    for name in settings.tasks:
        for single in _members(name, settings, say):
            makers.setdefault(single, _maker(single, settings, ppl))
    return [make() for make in makers.values()]


def _members(name: str, settings: EvalBlock, say: Say) -> list[str]:
    """The tasks that a name stands for."""
    if name != "glue":
        return [name]
    if settings.data_dir is None:
        return list(GLUE)
    folder = Path(settings.data_dir)
    absent = {task.name: path for task in GLUE.values() if (path := missing_file(task, folder))}
    if len(absent) == len(GLUE):
        first = next(iter(absent.values()))
        raise MomifyError(f"glue: none of its tasks is in {folder}; {first}, for one, does not exist")
    if absent:
        files = ", ".join(map(str, absent.values()))
        say(f"glue without {', '.join(absent)} ({files} missing); its average covers the others only")
    return [name for name in GLUE if name not in absent]


def _maker(name: str, settings: EvalBlock, ppl: Callable[[], Task]) -> Callable[[], Task]:
    if name == "ppl":
        return ppl
    if name == "xsum":
        return lambda: _xsum(settings)
    if name.startswith(LM_EVAL):
        return lambda: LmEval(name.removeprefix(LM_EVAL), settings.limit, data_folder(settings))
    return lambda: _glue(name, settings)


def _glue(name: str, settings: EvalBlock) -> Task:
    data = read_glue(GLUE[name], data_folder(settings), settings.limit, settings.train_limit)
    return Glue(GLUE[name], data, fine_tuning(settings), settings.max_length or MAX_LENGTH)


def _xsum(settings: EvalBlock) -> Task:
    data = read_xsum(data_folder(settings), settings.limit, settings.train_limit)
    return Xsum(data, fine_tuning(settings), Decoding(settings.beams), settings.max_length)


def data_folder(settings: EvalBlock) -> Path | None:
    """The folder of the tasks' data, None for the hub. Raises MomifyError where it does not exist."""
    if settings.data_dir is None:
        return None
    folder = Path(settings.data_dir)
    if not folder.is_dir():
        raise MomifyError(f"data folder {folder} does not exist; --data-dir takes one with glue/TASK/ and xsum/ in it")
    return folder


def fine_tuning(settings: EvalBlock) -> FineTuning:
    """How the tasks are learned."""
    names = ("learning_rate", "epochs", "batch_size", "dropout", "precision")
    return FineTuning(**{name: getattr(settings, name) for name in names})
