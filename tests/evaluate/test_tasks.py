"""evaluate/tasks.py: names to tasks, what the group `glue` lacks, and what a named task may not lack."""

from dataclasses import asdict
from pathlib import Path

import pytest

from momify.errors import MomifyError
from momify.evaluate.glue_tasks import GLUE
from momify.evaluate.tasks import make_tasks
from momify.recipe import change_eval
from momify.recipe_blocks import EvalBlock
from momify.task_names import GLUE_TASKS

from .conftest import Write
from .test_run import Counting


def names(said: list[str], **settings: object) -> list[str]:
    block = change_eval(EvalBlock(), {"data_dir": None, **settings})
    return [task.name for task in make_tasks(block, lambda: Counting(name="ppl"), said.append)]


def test_the_recipe_knows_the_tasks_that_there_are() -> None:
    assert tuple(GLUE) == GLUE_TASKS


def test_the_group_is_what_is_there_and_says_what_is_not(write_glue: Write) -> None:
    folder, said = write_glue("cola", "rte", "mnli"), []
    assert names(said, tasks=["rte", "glue", "ppl"], data_dir=str(folder)) == ["rte", "cola", "mnli", "ppl"]
    (line,) = said
    assert line.startswith("glue without sst2, mrpc, stsb, qqp, qnli, wnli (")
    assert "SST-2/train.tsv" in line
    assert "its average covers the others only" in line


def test_a_named_task_may_not_be_missing(write_glue: Write, tmp_path: Path) -> None:
    folder = str(write_glue("cola"))
    with pytest.raises(MomifyError, match=r"rte: .*RTE/train\.tsv does not exist"):
        names([], tasks=["rte", "glue"], data_dir=folder)
    with pytest.raises(MomifyError, match=r"glue: none of its tasks is in .*CoLA/train\.tsv, for one, does not exist"):
        names([], tasks=["glue"], data_dir=str(tmp_path))
    with pytest.raises(MomifyError, match=r"data folder nowhere does not exist"):
        names([], tasks=["rte"], data_dir="nowhere")
    with pytest.raises(MomifyError, match=r"xsum: .*train\.jsonl does not exist"):
        names([], tasks=["xsum"], data_dir=folder)


def test_a_broken_file_is_an_error_in_the_group_too(write_glue: Write) -> None:
    folder = write_glue("cola", "rte")
    (folder / "glue" / "RTE" / "dev.tsv").write_text("nothing\n")
    with pytest.raises(MomifyError, match=r"RTE/dev\.tsv has no column"):
        names([], tasks=["glue"], data_dir=str(folder))


def test_settings_arrive(write_glue: Write) -> None:
    learning = {"learning_rate": 5e-4, "epochs": 7, "batch_size": 4, "dropout": 0.2, "precision": "bf16"}
    sizes = {"max_length": 33, "limit": 5, "train_limit": 9}
    changes = {"tasks": ["rte"], "data_dir": str(write_glue("rte")), **learning, **sizes}
    (task,) = make_tasks(change_eval(EvalBlock(), changes), lambda: Counting(), lambda line: None)
    assert (task.max_length, len(task.data.train.examples), len(task.data.dev[""].examples)) == (33, 9, 5)
    assert asdict(task.settings) == learning
