"""One training from a recipe's train block: build the Trainer, resume or start, give the trained model back."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from momify.data.blocks import TokenData
from momify.errors import MomifyError
from momify.evaluate.perplexity import Protocol
from momify.recipe import TrainBlock
from momify.train.callbacks import MetricsFile, ProgressBar, StopOnSignal
from momify.train.trainer import HeldOut, LossWeights, MomTrainer

_PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
_EVAL_TOKENS = 65_536  # held-out tokens scored while training; the report scores them all


@dataclass(frozen=True)
class Place:
    """Where a training writes (metrics.jsonl, checkpoints/, tensorboard/) and how it is called on the screen."""

    folder: Path
    title: str
    console: Console
    seed: int = 0
    resume: bool = False


@dataclass(frozen=True)
class Stopped:
    """A training that a signal ended early; its last checkpoint is in `folder`."""

    signal: str
    step: int


def fit(
    model: PreTrainedModel, teacher: PreTrainedModel | None, data: TokenData, settings: TrainBlock, place: Place
) -> Stopped | None:
    """Train `model` in place: phase 2 from `teacher`, or phase 1 (next-token loss alone) where that is None.

    Raises MomifyError when blocks are longer than the model's positions, or the loss stops being finite.
    """
    check_length(model, data)
    arguments = training_arguments(settings, place)
    per_step = settings.batch_size * data.block_length * arguments.world_size
    stop, bar = StopOnSignal(), ProgressBar(place.title, place.console)
    callbacks = [MetricsFile(place.folder / "metrics.jsonl", per_step), bar, stop, tensorboard(place)]
    use_cache = model.config.use_cache
    weights = LossWeights(settings.distill, settings.cross_entropy, settings.balance) if teacher else LossWeights()
    held_out = HeldOut(data.valid_tensor(_EVAL_TOKENS), Protocol(data.block_length, data.block_length))
    trainer = MomTrainer(
        model,
        arguments,
        train_dataset=data.train_blocks,
        eval_dataset=[],
        callbacks=callbacks,
        weights=weights,
        held_out=held_out,
        teacher=teacher,
    )
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl has these lines
    checkpoint = last_checkpoint(place.folder) if place.resume else None
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        stop.restore()
        bar.close()
        model.config.use_cache = use_cache  # the Trainer switches it off in the config, which would be saved
    step = trainer.state.global_step
    return Stopped(stop.stopped, step) if stop.stopped and step < settings.steps else None


def check_length(model: PreTrainedModel, data: TokenData) -> None:
    """Raise MomifyError when blocks are longer than the model's positions."""
    positions = model.config.max_position_embeddings
    if data.block_length > positions:
        raise MomifyError(f"data.block_length {data.block_length} exceeds the model's {positions} positions; lower it")


def training_arguments(settings: TrainBlock, place: Place) -> TrainingArguments:
    """The Trainer's arguments for a train block."""
    micro = settings.micro_batch or settings.batch_size
    every = settings.eval_every or settings.save_every
    return TrainingArguments(
        output_dir=str(place.folder / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=int(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=settings.clip,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused on a machine without one
        bf16=settings.precision == "bf16",
        activation_checkpointing=settings.gradient_checkpointing,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=settings.save_every,
        save_total_limit=settings.keep,
        seed=place.seed,
        data_seed=place.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def tensorboard(place: Place) -> TensorBoardCallback:
    """The same numbers as metrics.jsonl, for TensorBoard."""
    return TensorBoardCallback(SummaryWriter(str(place.folder / "tensorboard")))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none yet.

    One that lacks a part is passed over: the Trainer would go on from it with a fresh optimizer, without a word.
    """
    found = {int(p.name.split("-")[1]): p for p in (folder / "checkpoints").glob("checkpoint-*") if _is_whole(p)}
    return found[max(found)] if found else None


def _is_whole(checkpoint: Path) -> bool:
    return checkpoint.name.split("-")[1].isdigit() and all((checkpoint / part).is_file() for part in _PARTS)
