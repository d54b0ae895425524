"""GLUE's metrics, by scikit-learn and scipy, times 100 as GLUE's own tables are."""

import math
import warnings
from collections.abc import Sequence
from statistics import mean

from momify.evaluate.glue_tasks import GlueTask

UNDEFINED = "all predictions are equal: a correlation is not defined and counted as 0"


def glue_metrics(task: GlueTask, pairs: dict[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """The metrics of a task from (labels, predictions) of each set that it is scored on, the main one first.

    Where there are several, the main one is their mean. F1 is that of class 1.
    """
    main, *parts = task.metrics
    if not parts:
        return {main: _metric(main, *pairs[""])}
    found = {name: _metric(*_which(name, pairs)) for name in parts}
    return {main: mean(found.values()), **found}


def is_undefined(predictions: Sequence[float]) -> bool:
    """Whether a correlation with these predictions means nothing."""
    return len(set(predictions)) < 2


def _which(name: str, pairs: dict[str, tuple[Sequence[float], Sequence[float]]]) -> tuple[str, Sequence, Sequence]:
    """The metric and the set that a name such as accuracy_mm or f1 stands for."""
    metric, _, suffix = name.partition("_")
    return (metric, *pairs[f"_{suffix}" if suffix else ""])


def _metric(name: str, labels: Sequence[float], predictions: Sequence[float]) -> float:
    return 100 * {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman}[
        name
    ](labels, predictions)


def _accuracy(labels: Sequence[float], predictions: Sequence[float]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(labels: Sequence[float], predictions: Sequence[float]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(labels: Sequence[float], predictions: Sequence[float]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(labels: Sequence[float], predictions: Sequence[float]) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, labels, predictions)


def _spearman(labels: Sequence[float], predictions: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, labels, predictions)


def _correlation(measure: object, labels: Sequence[float], predictions: Sequence[float]) -> float:
    """A correlation of scipy's; 0 where it is not defined."""
    if is_undefined(predictions) or len(labels) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant input: nan, told by UNDEFINED
        found = float(measure(labels, predictions).statistic)
    return found if math.isfinite(found) else 0.0
