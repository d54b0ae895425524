"""What a training writes and shows of itself: bar, lines, rows of metrics.jsonl."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from momify.train.callbacks import ProgressBar, SaidSteps, keep_rows_up_to


@pytest.mark.parametrize(
    ("terminal", "bars", "shown"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bars_are_shown_on_a_terminal_to_whoever_wants_them(terminal: bool, bars: bool, shown: bool) -> None:
    out = io.StringIO()
    bar = ProgressBar("phase 2", Console(file=out, force_terminal=terminal, width=100), bars)
    bar.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, max_steps=9, global_step=3), None)
    bar.close()
    assert ("phase 2" in out.getvalue()) == shown


@pytest.mark.parametrize(("bar", "lines"), [(True, ["30"]), (False, ["20", "30", "50"])])
def test_how_far_it_is_is_said_at_held_out_losses_and_without_a_bar_once_a_minute(
    bar: bool, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said = [0.0], []
    monkeypatch.setattr("momify.train.callbacks.time.monotonic", lambda: now[0])
    told = SaidSteps(said.append, bar)
    told.on_train_begin(None, SimpleNamespace(max_steps=100, global_step=0), None)
    for step, logs in [(10, {"loss": 3.0}), (20, {"loss": 2.5}), (30, {"eval_loss": 2.25}), (50, {"loss": 2.0})]:
        now[0] = step * 5.0
        told.on_log(None, SimpleNamespace(max_steps=100, global_step=step), None, logs)
    assert [line.split()[1] for line in said] == lines
    held_out = next(line for line in said if "held-out" in line)
    assert held_out == "step 30 of 100, loss 2.500, held-out loss 2.250, 0:05:50 left"  # 70 steps of 5 s


def test_a_run_that_goes_on_says_from_where() -> None:
    said: list[str] = []
    told = SaidSteps(said.append, bar=True)
    told.on_train_begin(None, SimpleNamespace(max_steps=5000, global_step=1200), None)
    assert said == ["goes on from step 1,200 of 5,000"]
    told.on_log(None, SimpleNamespace(max_steps=5000, global_step=5000), None, {"eval_loss": 2.0})
    assert said[1:] == ["step 5,000 of 5,000, held-out loss 2.000"]


def test_rows_after_a_step_and_cut_rows_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_rows_up_to(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
