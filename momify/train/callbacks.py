"""What is written and shown while a model trains: metrics.jsonl, the progress bar and lines, a stop on a signal."""

import json
import math
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from momify import processes
from momify.files import disk_errors, write_text

COUNTED = "num_input_tokens_seen"  # metrics.jsonl has it as `tokens`
A_SIGNAL = "a signal"  # of another process
_A_LINE = 60.0  # seconds between lines where no bar shows
_AT_ONCE = 1.0  # seconds within which a launcher may pass the same Ctrl-C on once more
_HIDDEN = ("epoch", "total_flos", "train_", COUNTED)


class MetricsFile(TrainerCallback):
    """Appends a line of JSON a log to metrics.jsonl, with tokens and tokens/s; a resumed run drops what it redoes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._since: tuple[float, int] | None = None  # time and tokens

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.is_world_process_zero:
            keep_rows_up_to(self.path, state.global_step)
        self._since = (time.perf_counter(), state.num_input_tokens_seen)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kw: Any
    ) -> None:
        if "loss" in logs and self._since:
            now, (before, tokens) = time.perf_counter(), self._since
            logs["tokens_per_second"] = (state.num_input_tokens_seen - tokens) / (now - before)
            self._since = (now, state.num_input_tokens_seen)
        row = {name: value for name, value in logs.items() if not name.startswith(_HIDDEN)}
        if not row or not state.is_world_process_zero:
            return
        row = {key: value if math.isfinite(value) else str(value) for key, value in row.items()}
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as stream:
            counts = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
            stream.write(json.dumps({**counts, **row}) + "\n")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._since = (time.perf_counter(), state.num_input_tokens_seen)  # measuring is not training time


def keep_rows_up_to(path: Path, step: int) -> None:
    """Drop the rows of metrics.jsonl after `step`, and a last line that was cut."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            written_at = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # cut by a kill
            continue
        if written_at <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class ProgressBar(TrainerCallback):
    """A live bar with loss, learning rate, speed and time left; nothing where the console is no terminal."""

    def __init__(self, title: str, console: Console, shown: bool = True) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[seen]}"), console=console)
        self.shown = shown and console.is_terminal
        self._progress.disable = not self.shown
        self._title, self._task, self._held_out = title, None, ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.is_world_process_zero:
            self._progress.start()
            self._task = self._progress.add_task(
                self._title, total=state.max_steps, completed=state.global_step, seen=""
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kw: Any
    ) -> None:
        if "eval_loss" in logs:
            self._held_out = f" held-out {logs['eval_loss']:.3f}"
        if self._task is not None and "loss" in logs:
            speed = f" {logs['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in logs else ""
            entropy = f" entropy {logs['router_entropy']:.2f}" if "router_entropy" in logs else ""
            seen = f"loss {logs['loss']:.3f} lr {logs['learning_rate']:.1e}{speed}{entropy}{self._held_out}"
            self._progress.update(self._task, seen=seen)

    def close(self) -> None:
        """Take the bar down, also after an error."""
        self._progress.stop()


class SaidSteps(TrainerCallback):
    """Says how far a training is: at each held-out loss, without a bar once a minute, and first where it goes on."""

    def __init__(self, say: Callable[[str], None], bar: bool) -> None:
        self._say, self._often = say, not bar
        self._begun, self._first, self._last = 0.0, 0, 0.0  # time and step of the beginning, time of the last line
        self._loss = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._begun = self._last = time.monotonic()
        self._first = state.global_step
        if self._first:
            self._say(f"goes on from step {self._first:,} of {state.max_steps:,}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kw: Any
    ) -> None:
        if "loss" in logs:
            self._loss = f", loss {logs['loss']:.3f}"
        held_out = f", held-out loss {logs['eval_loss']:.3f}" if "eval_loss" in logs else ""
        if not held_out and not (self._often and time.monotonic() - self._last > _A_LINE):
            return
        self._last = time.monotonic()
        self._say(f"step {state.global_step:,} of {state.max_steps:,}{self._loss}{held_out}{self._left(state)}")

    def _left(self, state: TrainerState) -> str:
        done, rest = state.global_step - self._first, state.max_steps - state.global_step
        if not done or not rest:
            return ""
        seconds = (time.monotonic() - self._begun) / done * rest
        return f", {timedelta(seconds=round(seconds))} left"


class StopOnSignal(TrainerCallback):
    """SIGTERM or Ctrl-C: finish the step, save a checkpoint, stop; `stopped` names the signal.

    Raises KeyboardInterrupt at a later Ctrl-C.
    """

    def __init__(self) -> None:
        self.stopped: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stopped is None:
            self._stop(signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._since > _AT_ONCE:
            raise KeyboardInterrupt

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if processes.any_of_all(self.stopped is not None):  # several must save the same step
            self._stop(self.stopped or A_SIGNAL)
            control.should_save = control.should_training_stop = True

    def _stop(self, why: str) -> None:
        self.stopped, self._since = why, time.monotonic()

    def restore(self) -> None:
        """Give the signals back to whoever had them before, also after an error."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
