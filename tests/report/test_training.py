"""Curves from metrics.jsonl: what is in them, what is passed over, how they are thinned."""

import json
from pathlib import Path

from momify.report.training import POINTS, read_training


def test_curves_by_name(tmp_path: Path) -> None:
    rows = [
        {
            "step": 5,
            "tokens": 50,
            "loss": 3.0,
            "distill": 0.5,
            "hidden": 0.1,
            "cross_entropy": 3.5,
            "tokens_per_second": 10.0,
        },
        {"step": 5, "tokens": 50, "eval_loss": 3.25, "eval_perplexity": 25.8},
        {"step": 10, "tokens": 100, "loss": 2.0, "router_entropy": 0.25, "tokens_per_second": 30.0},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_training(tmp_path / "m.jsonl")
    assert (found["steps"], found["tokens"], found["tokens_per_second"]) == (10, 100, 30.0)
    assert found["curves"] == {
        "loss": [[5, 3.0], [10, 2.0]],
        "next_token_loss": [[5, 3.5]],
        "distillation_loss": [[5, 0.5]],
        "hidden_loss": [[5, 0.1]],
        "held_out_loss": [[5, 3.25]],
        "router_entropy": [[10, 0.25]],
    }


def test_nothing_trained(tmp_path: Path) -> None:
    assert read_training(tmp_path / "none.jsonl") is None
    (tmp_path / "m.jsonl").write_text("")
    assert read_training(tmp_path / "m.jsonl") is None


def test_damaged_lines_and_numbers_are_passed_over(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2.0}', "{", "[1]", '{"loss": 3}', '{"step": 2, "loss": "nan"}', "\x00",
             '{"step": 3, "loss": NaN}', '{"step": 4, "loss": 1.0, "eval_loss": true}', '{"step": 5, "lo']  # fmt: skip
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    found = read_training(tmp_path / "m.jsonl")
    assert found["curves"]["loss"] == [[1, 2.0], [4, 1.0]]
    assert found["curves"]["held_out_loss"] == []
    assert found["tokens"] is None


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    rows = (json.dumps({"step": step, "loss": step / 10}) for step in range(1, 5001))
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    curve = read_training(tmp_path / "m.jsonl")["curves"]["loss"]
    assert len(curve) == POINTS
    assert (curve[0], curve[-1]) == ([1, 0.1], [5000, 500.0])
    assert [step for step, _ in curve] == sorted({step for step, _ in curve})
