"""evaluate/compare.py: means, deviations, the rule, and GLUE's average, against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest

from momify.evaluate.compare import average, compare, spread, summary
from momify.evaluate.results import Score
from momify.evaluate.task import Baseline, Incomparable, Outcome
from momify.report.tasks import comparison_table, protocol_lines


def outcome(name: str, seeded: bool = True, **values: list[float | None]) -> Outcome:
    seeds = tuple(range(len(next(iter(values.values()))))) if seeded else (None,)
    task = SimpleNamespace(name=name, main="accuracy", shown=("accuracy",), seeded=seeded, higher_is_better=True,
                           limited=name == "rte")  # fmt: skip
    scores = {
        role: [Score({"accuracy": v}, f"how {name}", seconds=1.5) for v in found] for role, found in values.items()
    }
    baselines = [
        Baseline("majority", "always it", {"accuracy": 50.0}),
        Baseline("random", "guesses", {"accuracy": 40.0}),
    ]
    return Outcome(task, seeds, scores, baselines, {role: f"hash of {role}" for role in scores})


def test_mean_and_sample_deviation() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert spread([4.0]).deviation is None
    assert spread([1.0, None]) is None
    assert spread([1.0, math.inf]) is None


def test_the_rule_is_two_pooled_standard_errors() -> None:
    a, b = spread([10.0, 12.0, 14.0]), spread([13.0, 15.0, 17.0])  # deviation 2 each: error sqrt(8/3)
    found = compare(a, b)
    assert found["difference"] == 3.0
    assert found["standard_error"] == pytest.approx(math.sqrt(8 / 3))
    assert found["verdict"] == "within the spread"  # 3 < 3.27
    assert compare(a, spread([13.5, 15.5, 17.5]))["verdict"] == "exceeds the spread"  # 3.5
    assert compare(spread([16.0, 15.5, 15.0]), spread([1.0, 1.5, 0.5]))["verdict"] == "exceeds the spread"
    assert compare(spread([52.0, 52.0]), spread([53.0, 53.0]))["verdict"] == "seeds agree, spread unknown"


def test_one_seed_tells_no_spread_and_no_seed_needs_none() -> None:
    assert compare(spread([1.0]), spread([9.0]))["verdict"] == "one seed, spread unknown"
    assert compare(spread([1.0], random=False), spread([2.0], random=False))["verdict"] == "no seeds in it: exact"


def test_summary_and_table() -> None:
    found = summary(outcome("rte", source=[60.0, 62.0], mom=[50.0, 51.0]))
    assert found["models"]["source"]["metrics"]["accuracy"] == {
        "mean": 61.0, "deviation": pytest.approx(math.sqrt(2)), "values": [60.0, 62.0]}  # fmt: skip
    assert found["differences"]["mom"]["accuracy"]["difference"] == pytest.approx(-10.5)
    columns, rows = comparison_table([found])
    assert columns == ["task", "metric", "source", "mom", "difference", "spread", "majority", "random"]
    assert rows == [["rte (limited)", "accuracy", "61.00 ± 1.41", "50.50 ± 0.71", "-10.50", "exceeds",
                     "50.00", "40.00"]]  # fmt: skip
    lines = protocol_lines([found])
    assert lines[0] == "rte: how rte; seeds 0, 1"
    assert lines[1:3] == ["majority: always it (rte)", "random: guesses (rte)"]
    assert "2 standard errors" in lines[3]


def test_three_models_are_each_compared_with_the_first() -> None:
    found = summary(outcome("sst2", source=[60.0], mom=[50.0], other=[61.0]))
    columns, rows = comparison_table([found])
    assert columns[2:9] == ["source", "mom", "other", "mom - source", "spread", "other - source", "spread"]
    assert rows[0][5::2][:2] == ["-10.00", "+1.00"]


def test_small_numbers_that_are_no_percents_have_three_decimals() -> None:
    found = summary(outcome("bits", seeded=False, source=[1.1834], mom=[1.2]))
    assert comparison_table([found])[1][0][2:5] == ["1.183", "1.200", "+0.017"]
    found = summary(outcome("cola", source=[-0.934], mom=[0.0]))
    assert comparison_table([found])[1][0][2:5] == ["-0.93", "0.00", "+0.93"]


def test_a_score_that_is_not_finite_is_said() -> None:
    found = summary(outcome("sst2", source=[60.0], mom=[None]))
    _, rows = comparison_table([found])
    assert rows[0][2:6] == ["60.00", "not finite", "", ""]


def test_a_metric_that_one_model_cannot_have_is_blank_there_and_not_compared() -> None:
    found = outcome("sst2", seeded=False, source=[60.0], mom=[50.0])
    found.task.shown = ("accuracy", "apart")
    found.scores["mom"][0].metrics["apart"] = 0.2024
    columns, rows = comparison_table([summary(found)])
    assert rows[1] == ["", "apart", "", "0.202", *[""] * (len(columns) - 4)]


def test_the_average_is_taken_seed_by_seed_and_leaves_wnli_out() -> None:
    outcomes = [
        outcome("rte", source=[60.0, 64.0], mom=[1.0, 2.0]),
        outcome("cola", source=[20.0, 10.0], mom=[3.0, 4.0]),
        outcome("wnli", source=[99.0, 99.0], mom=[0.0, 0.0]),
    ]
    summaries = [summary(one) for one in outcomes]
    found = average(summaries)
    assert found["covers"] == ["rte", "cola"]
    assert found["models"]["source"]["metrics"]["average"]["values"] == [40.0, 37.0]
    assert found["models"]["mom"]["metrics"]["average"]["mean"] == 2.5
    assert {b["name"]: b["metrics"]["average"] for b in found["baselines"]} == {"majority": 50.0, "random": 40.0}
    assert found["limited"]
    assert average(summaries[:1]) is None
    assert average([summaries[0], summaries[2]]) is None
    lines = protocol_lines([found])
    assert "glue average: the mean of the main metrics of rte, cola" in lines


def test_an_average_is_of_the_same_seeds_and_weights_and_of_finite_scores() -> None:
    rte, cola = (summary(outcome(name, source=[60.0, 64.0], mom=[1.0, 2.0])) for name in ("rte", "cola"))
    assert average([rte, {**cola, "seeds": [0, 7]}]) is None
    other = {role: {**found, "sha256": "of another"} for role, found in cola["models"].items()}
    assert average([rte, {**cola, "models": other}]) is None
    broken = average([rte, summary(outcome("cola", source=[60.0, 64.0], mom=[1.0, None]))])
    assert broken["models"]["mom"]["metrics"]["average"] is None
    assert broken["differences"] == {"mom": {}}


def test_what_is_not_comparable_has_no_difference_and_a_note() -> None:
    found = outcome("ppl", seeded=False, source=[60.0], mom=[50.0], other=[61.0])
    found.incomparable["other"] = Incomparable(("accuracy",), "other tokens")
    made = summary(found)
    assert list(made["differences"]["mom"]) == ["accuracy"]
    assert made["differences"]["other"] == {}
    assert made["models"]["other"]["notes"] == ["accuracy: not compared with source, other tokens"]
    assert made["models"]["mom"]["notes"] == []
