"""Scores of tasks in words: a table in which no task loses its name, whatever came out."""

from typing import Any

from momify.report.tasks import comparison_table


def test_a_main_metric_that_is_not_finite_is_shown_and_named(rte: dict[str, Any]) -> None:
    ppl = rte | {"task": "ppl", "main": "perplexity", "shown": ["perplexity", "loss"], "baselines": []}
    ppl["differences"] = {}
    for found in ppl["models"].values():
        found["metrics"] = {"perplexity": None, "loss": {"mean": 800.0, "deviation": None}}
    _, rows = comparison_table([ppl])
    assert rows[0][:4] == ["ppl (limited)", "perplexity", "not finite", "not finite"]
    assert rows[1][:2] == ["", "loss"]


def test_a_table_without_its_main_metric_is_named_all_the_same(rte: dict[str, Any]) -> None:
    assert comparison_table([rte | {"main": "f1"}])[1][0][:2] == ["rte (limited)", "accuracy"]
