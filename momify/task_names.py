"""What `eval.tasks` may name. No torch here, as in the recipe that they stand in."""

import difflib

from momify.mistakes import short

GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
KNOWN_TASKS = ("ppl", "glue", *GLUE_TASKS, "xsum")
LM_EVAL = "lm_eval:"
"""Opens the name of a task of EleutherAI's lm-eval."""


def check_tasks(tasks: list[str]) -> None:
    """Raise ValueError for a task that does not exist, naming the nearest that does, and for none at all."""
    if not tasks:
        raise ValueError(f"no task is named; known: {', '.join(KNOWN_TASKS)}, {LM_EVAL}NAME")
    for task in tasks:
        if task not in KNOWN_TASKS and not (task.startswith(LM_EVAL) and task != LM_EVAL):
            near = difflib.get_close_matches(task, KNOWN_TASKS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(KNOWN_TASKS)}, {LM_EVAL}NAME"
            raise ValueError(f"unknown task '{short(task)[1:-1]}'; {hint}")
