"""One training from a recipe's train block: build the Trainer, resume or start, give the trained model back."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from momify.errors import MomifyError
from momify.evaluate.perplexity import Protocol
from momify.recipe import TrainBlock
from momify.train.blocks import TokenData
from momify.train.callbacks import MetricsFile, ProgressBar, StopOnSignal
from momify.train.trainer import HeldOut, LossWeights, MomTrainer

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

    Raises MomifyError when the loss stops being finite, or --resume finds checkpoints of another number of steps.
    """
    settings_ok(model, data)
    arguments = training_arguments(settings, place)
    per_step = settings.batch_size * data.block_length * arguments.world_size
    stop = StopOnSignal()
    callbacks = [MetricsFile(place.folder / "metrics.jsonl", per_step), ProgressBar(place.title, place.console), stop]
    weights = LossWeights(settings.distill, settings.cross_entropy, settings.balance) if teacher else LossWeights()
    held_out = HeldOut(data.valid_tensor(_EVAL_TOKENS), Protocol(data.block_length, data.block_length))
    trainer = MomTrainer(
        model, arguments, train_dataset=data.train_blocks, eval_dataset=[], callbacks=[*callbacks, *_tensorboard(place)],
        weights=weights, held_out=held_out, teacher=teacher,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl has these lines
    checkpoint = last_checkpoint(place.folder, settings.steps) if place.resume else None
    use_cache = model.config.use_cache
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = use_cache  # the Trainer switches it off in the config, which would be saved
    return Stopped(stop.stopped, trainer.state.global_step) if stop.stopped else None


def settings_ok(model: PreTrainedModel, data: TokenData) -> None:
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


def _tensorboard(place: Place) -> list[TrainerCallback]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(place.folder / "tensorboard")))]


def last_checkpoint(folder: Path, steps: int) -> Path | None:
    """The newest checkpoint of a run, None where there is none yet."""
    root = folder / "checkpoints"
    found = get_last_checkpoint(str(root)) if root.is_dir() else None
    return Path(found) if found else None
