"""GLUE's metrics against values worked out by hand, and the baselines against the same."""

import math

import pytest

from momify.evaluate.glue_baselines import glue_baselines
from momify.evaluate.glue_data import Example, GlueData
from momify.evaluate.glue_metrics import glue_metrics, is_undefined
from momify.evaluate.glue_tasks import GLUE
from momify.evaluate.split import Split

# 3 true and 1 false positives, 2 true and 2 false negatives
LABELS = [1, 1, 1, 1, 1, 0, 0, 0]
PREDICTED = [1, 1, 1, 0, 0, 1, 0, 0]


def test_accuracy_f1_matthews() -> None:
    assert glue_metrics(GLUE["rte"], {"": (LABELS, PREDICTED)}) == {"accuracy": pytest.approx(100 * 5 / 8)}
    f1 = 100 * 2 * 3 / (2 * 3 + 1 + 2)
    found = glue_metrics(GLUE["mrpc"], {"": (LABELS, PREDICTED)})
    assert tuple(found) == GLUE["mrpc"].metrics
    assert list(found.values()) == pytest.approx([(f1 + 62.5) / 2, f1, 62.5])
    matthews = (3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4)
    assert glue_metrics(GLUE["cola"], {"": (LABELS, PREDICTED)}) == {"matthews": pytest.approx(100 * matthews)}


def test_f1_is_that_of_class_1() -> None:
    found = glue_metrics(GLUE["qqp"], {"": ([0, 0, 1], [0, 0, 0])})
    assert found["f1"] == 0.0
    assert found["accuracy"] == pytest.approx(200 / 3)


def test_correlations() -> None:
    labels, predicted = [0.0, 1.0, 2.0, 5.0], [1.0, 3.0, 2.0, 9.0]
    # Pearson: means 2, 3.75; products 2*2.75 + 1*0.75 + 0 + 3*5.25 = 22; squares 14 and 38.75
    pearson = 22 / math.sqrt(14 * 38.75)
    spearman = 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    found = glue_metrics(GLUE["stsb"], {"": (labels, predicted)})
    assert list(found.values()) == pytest.approx([50 * (pearson + spearman), 100 * pearson, 100 * spearman])
    assert tuple(found) == GLUE["stsb"].metrics


def test_constant_predictions_count_as_no_correlation() -> None:
    assert is_undefined([2.0, 2.0])
    found = glue_metrics(GLUE["stsb"], {"": ([1.0, 2.0], [2.0, 2.0])})
    assert set(found.values()) == {0.0}
    assert glue_metrics(GLUE["stsb"], {"": ([2.0, 2.0], [1.0, 2.0])})["pearson"] == 0.0


def test_mnli_is_the_mean_of_both_sets() -> None:
    found = glue_metrics(GLUE["mnli"], {"_m": ([0, 1], [0, 2]), "_mm": ([2, 2, 1, 0], [2, 2, 1, 1])})
    assert found == {"accuracy": 62.5, "accuracy_m": 50.0, "accuracy_mm": 75.0}


def data(train: list[float], dev: list[float]) -> GlueData:
    split = lambda labels: Split(tuple(Example(("a", "b"), label) for label in labels), len(labels))  # noqa: E731
    return GlueData(split(train), {"": split(dev)})


def test_baselines_of_classes() -> None:
    majority, guess = glue_baselines(GLUE["mrpc"], data([1, 1, 0], [1, 1, 1, 0]))
    assert majority.metrics["accuracy"] == 75.0
    assert majority.metrics["f1"] == pytest.approx(100 * 6 / 7)
    assert guess.metrics["accuracy"] == 50.0
    # expected counts: half of the 3 positives found, half of the 1 negative wrong
    assert guess.metrics["f1"] == pytest.approx(100 * 2 * 1.5 / (2 * 1.5 + 0.5 + 1.5))
    majority, guess = glue_baselines(GLUE["cola"], data([1, 1, 0], [1, 0]))
    assert majority.metrics == guess.metrics == {"matthews": 0.0}


def test_the_majority_is_that_of_the_training_set() -> None:
    majority, _ = glue_baselines(GLUE["wnli"], data([0, 0, 1], [1, 1, 1, 0]))
    assert majority.metrics == {"accuracy": 25.0}


def test_baselines_of_a_regression() -> None:
    for baseline in glue_baselines(GLUE["stsb"], data([1.0, 4.0], [0.5, 3.0, 4.4])):
        assert baseline.metrics["pearson+spearman"] == pytest.approx(0.0, abs=1e-9)
    assert "mean" in glue_baselines(GLUE["stsb"], data([1.0], [1.0, 2.0]))[0].how
