"""What GLUE's metrics are without a model: always the commonest label, and guesses."""

from collections import Counter
from statistics import mean

from momify.evaluate.glue_data import GlueData
from momify.evaluate.glue_metrics import glue_metrics
from momify.evaluate.glue_tasks import GlueTask
from momify.evaluate.task import Baseline

SIMILARITIES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)


def glue_baselines(task: GlueTask, data: GlueData) -> list[Baseline]:
    """The majority class of the training set (STS-B: its mean), and uniform guesses in expectation.

    Expected counts of guesses are exact: every example is met by every label once.
    """
    labels = [example.label for example in data.train.examples]
    constant = mean(labels) if task.regression else Counter(labels).most_common(1)[0][0]
    guesses = SIMILARITIES if task.regression else range(task.outputs)
    always, guessed = {}, {}
    for suffix, split in data.dev.items():
        truth = [example.label for example in split.examples]
        always[suffix] = (truth, [constant] * len(truth))
        guessed[suffix] = ([t for t in truth for _ in guesses], [float(g) for _ in truth for g in guesses])
    kind = "the training set's mean score" if task.regression else "the training set's commonest label"
    return [
        Baseline("majority", f"always {kind}", glue_metrics(task, always)),
        Baseline("random", "uniform guesses, from expected counts", glue_metrics(task, guessed)),
    ]
