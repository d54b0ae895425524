"""What the Trainer logs for TensorBoard: metrics.jsonl and its own sums. Written at once, by no thread that could fail
unseen."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from momify.files import disk_errors
from momify.train.callbacks import COUNTED


class TensorBoardFile(TrainerCallback):
    """One event file a start of the training; a resumed one makes TensorBoard forget the steps that are redone.

    Raises MomifyError, naming the file, when it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if not state.is_world_process_zero:
            return
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._path: Path | None = self._folder / name
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=state.global_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kw: Any
    ) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in logs.items() if name != COUNTED]
        if self._path:
            self._write(Event(step=state.global_step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with disk_errors(self._path), open(self._path, "ab") as stream:
            RecordWriter(stream).write(event.SerializeToString())
