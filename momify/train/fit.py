"""One training from a recipe's train block: build the Trainer, resume or start, give the trained model back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_model as load_weights
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from momify.data.blocks import TokenData
from momify.devices import best_device, device_for
from momify.errors import MomifyError
from momify.evaluate.perplexity import Protocol
from momify.measure.budget import budget_of, check_savings, check_share
from momify.measure.mode import evaluating
from momify.measure.stakes import METRIC_TOKENS, loss_metrics
from momify.model import MomConfig
from momify.processes import any_of_all, count, first_then_others, is_first, rank, wait_for_all
from momify.recipe_blocks import TrainBlock
from momify.train.callbacks import A_SIGNAL, MetricsFile, ProgressBar, SaidSteps, StopOnSignal
from momify.train.checkpoints import drop_after, newest_whole, read_seal, sweep
from momify.train.frozen import freeze
from momify.train.guards import Rollback, UnfitStepsError, read_rollback, write_rollback
from momify.train.hidden import VARIANCE_TOKENS, HiddenGoal, matching_depths, source_variances
from momify.train.optimizer import Rates
from momify.train.precision import precision_here
from momify.train.spending import BudgetHold, take_threshold
from momify.train.stand_ins import count_added, steps_alone
from momify.train.supervise import Supervision
from momify.train.tensorboard import TensorBoardFile
from momify.train.tokens import UncountedSteps
from momify.train.trainer import HeldOut, LossWeights, MomTrainer, RoutingAids
from momify.train.watch import OverfitWatch, RouterWatch

_CHECKPOINTING = (  # as the installed transformers calls it
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
# Sharded over the processes, saved whole: such a checkpoint's model.safetensors loads in one process.
_FSDP = {"version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "FULL_STATE_DICT"}
_EVAL_TOKENS = 65_536  # held-out tokens scored while training; the report scores them all


@dataclass(frozen=True)
class Place:
    """Where a training writes (metrics.jsonl, checkpoints/, tensorboard/), how it is called, who hears its warnings.

    ready: called by the first process when all are about to take their first step. bars: whether a terminal shows one.
    """

    folder: Path
    title: str
    console: Console
    seed: int = 0
    resume: bool = False
    say: Callable[[str], None] = lambda line: None
    ready: Callable[[], None] = lambda: None
    bars: bool = True

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"


@dataclass(frozen=True)
class Stopped:
    """A training that a signal ended early; its last checkpoint is in `folder`."""

    signal: str
    step: int


def fit(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    data: TokenData,
    settings: TrainBlock,
    place: Place,
    step_layers: Sequence[int | None] | None = None,
) -> Stopped | None:
    """Train `model` in place: phase 2 from `teacher`, or phase 1 (next-token loss alone) where that is None.

    step_layers: the teacher's layer that each step of a MoM stands for, None for an added one; train.hidden needs it,
    and is off by default where there are none.
    After three steps in a row whose loss or gradient is not finite it goes back to the checkpoint before them, with a
    lower learning rate. Raises MomifyError when that does not help, when blocks are longer than the model's positions,
    or when the vocabularies differ. With train.fsdp the model comes out sharded; its last checkpoint is whole.
    """
    check_length(model, data)
    check_tokens(model, data)
    check_vocabularies(model, teacher)
    if teacher is None and (keys := settings.of_phase_two()):
        raise MomifyError(f"train.{keys[0]} is of phase 2, with a source; leave it out")
    stand = any(layer is not None for layer in step_layers or ())
    settings = settings.with_hidden(comparable=teacher is not None and stand)
    with first_then_others():
        if is_first():
            sweep(place.checkpoints)
    rollback = read_rollback(place.checkpoints) if place.resume else Rollback()
    course, below = Course(model, teacher, data, settings, place, step_layers), None
    # once: after a rollback the weights are at first those that went wrong
    course = replace(course, measured=cache(partial(measure, course)))
    while True:
        start = newest_whole(place.checkpoints, place.say, below) if place.resume or rollback.times else None
        wait_for_all()  # before the first process changes what the others read
        if is_first():
            drop_after(place.checkpoints, read_seal(start).step if start else 0)
            write_rollback(place.checkpoints, rollback)
        try:
            return fit_from(start, replace(course, lr_factor=rollback.lr_factor))
        except UnfitStepsError as error:
            rollback, below = rollback.again(error), error.first
            if start and read_seal(start).step == below - 1:  # unfit from its first step on: that is no way back
                below -= 1
            _say_back(error, rollback, settings, place, below)


@dataclass(frozen=True)
class Course:
    """What one attempt at training works with. measured: gives what `measure` found before the first of them."""

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    data: TokenData
    settings: TrainBlock
    place: Place
    step_layers: Sequence[int | None] | None = None
    lr_factor: float = 1.0
    measured: Callable[[], "Measured"] = lambda: (RoutingAids(), None)


Measured = tuple[RoutingAids, HiddenGoal | None]


def measure(course: Course) -> Measured:
    """What train.supervise, train.budget and train.hidden ask for, by the model and the source as they are now."""
    return routing_aids(course), hidden_goal(course, best_device()) if course.settings.hidden else None


def _say_back(error: UnfitStepsError, rollback: Rollback, settings: TrainBlock, place: Place, below: int) -> None:
    """Tell of a rollback. Raises MomifyError where there is no checkpoint of a step under `below` to go back to."""
    if newest_whole(place.checkpoints, lambda line: None, below) is None:
        raise MomifyError(
            f"{error.describe()}, and there is no checkpoint before it to go back to; lower train.learning_rate "
            f"({settings.learning_rate:g}), or set train.precision=fp32, and start anew"
        ) from error
    if settings.fsdp and count() > 1:  # a model that is sharded already cannot be wrapped again in the same process
        if is_first():
            drop_after(place.checkpoints, below - 1)
            write_rollback(place.checkpoints, rollback)
        raise MomifyError(f"{error.describe()}; --resume goes on with {rollback.lr_factor:g} times the learning rate")
    place.say(
        f"warning: {error.describe()}; going back to the checkpoint before step {below}, "
        f"now with {rollback.lr_factor:g} times the learning rate"
    )


def fit_from(start: Path | None, course: Course) -> Stopped | None:
    """Train from a checkpoint, or from the beginning for None. Raises UnfitStepsError as StepGuard does."""
    settings, model = course.settings, course.model
    if start:
        check_processes(start)
        tell_other_circumstances(start, course)
        if isinstance(model.config, MomConfig):
            take_threshold(model, start)
    if start and read_seal(start).step >= settings.steps:  # killed between the last checkpoint and the model
        load_weights(model, start / "model.safetensors", strict=False)
        return None
    use_cache = model.config.use_cache
    trainer, stop, bar = make_trainer(course)
    wait_for_all()
    if is_first():
        course.place.ready()
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    finally:
        stop.restore()
        bar.close()
        model.config.use_cache = use_cache  # the Trainer switches it off in the config, which would be saved
    stopped = any_of_all(stop.stopped is not None)  # also in the last step, after which much is to come
    return Stopped(stop.stopped or A_SIGNAL, trainer.state.global_step) if stopped else None


def make_trainer(course: Course) -> tuple[MomTrainer, StopOnSignal, ProgressBar]:
    """The Trainer of a course with its callbacks; the two that must be put away afterwards beside it."""
    settings, place, data, model = course.settings, course.place, course.data, course.model
    arguments = training_arguments(settings, place)
    stop, bar = StopOnSignal(), ProgressBar(place.title, place.console, place.bars)
    files = [MetricsFile(place.metrics), TensorBoardFile(place.folder / "tensorboard")]
    shown = [bar, SaidSteps(place.say, bar.shown)]
    callbacks = [UncountedSteps(data, settings), *files, *shown, stop, OverfitWatch(place.metrics, place.say)]
    if isinstance(model.config, MomConfig):
        callbacks.append(RouterWatch(model.config, place.say))
    freeze(model, settings)
    alone = steps_alone(model, settings)
    if alone:
        place.say(f"the first {alone:,} steps teach only what stands in: {count_added(model):,} parameters")
    routed = LossWeights(**{name: getattr(settings, name) for name in LossWeights.__dataclass_fields__})
    aids, goal = course.measured()
    if aids.hold:
        callbacks.insert(0, aids.hold)  # before the files: it adds to what they write
    trainer = MomTrainer(
        model,
        arguments,
        train_dataset=data.spliced_blocks(settings.pieces(course.teacher is not None, data.block_length)),
        eval_dataset=[],
        callbacks=callbacks,
        weights=routed if course.teacher else LossWeights(),
        held_out=HeldOut(data.valid_tensor(_EVAL_TOKENS), Protocol(data.block_length, data.block_length)),
        teacher=course.teacher,
        optimizer=settings.optimizer_for(course.teacher is not None),
        rates=Rates(settings.learning_rate, settings.matrix_rate, settings.embeddings_at(course.teacher is not None)),
        routing=aids,
        goal=goal,
        steps_alone=alone,
        micro_batch=settings.micro_batch,
        lr_factor=course.lr_factor,
        about={"text": data.sha256, "precision": precision_here(settings)},
        say=place.say,
    )
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl has these lines
    if rank():  # else all processes would drop out and explore by the same draws; a checkpoint brings its own state
        torch.manual_seed(place.seed + rank())
    return trainer, stop, bar


def routing_aids(course: Course) -> RoutingAids:
    """What train.supervise and train.budget ask for. Raises MomifyError where there is nothing to choose."""
    settings, model = course.settings, course.model
    if course.teacher is None or not (settings.supervise or settings.budget):
        return RoutingAids()
    places = [(half.kind, half.step) for step in model.model.steps for half in step if half.forks]
    if not places:
        raise MomifyError(
            "train.supervise and train.budget need half-steps that choose between home and SKIP; convert with "
            "mom.reach=skip or mom.budget, or set both to 0 and null"
        )
    budget = budget_of(model.config, course.data.block_length)
    supervision = hold = None
    check_savings(budget)
    if settings.supervise:
        blocks = course.data.spread_blocks(-(-METRIC_TOKENS // course.data.block_length))
        model.to(device_for(0))  # as the Trainer is about to: minutes on a processor
        with evaluating(model):
            supervision = Supervision(loss_metrics(model, blocks, course.place.seed), budget.savings)
    if settings.budget:
        check_share(budget, settings.budget, places)
        hold = BudgetHold(model, budget, places, settings.budget)
    return RoutingAids(supervision, hold)


def hidden_goal(course: Course, device: torch.device) -> HiddenGoal:
    """What train.hidden asks for, measured on `device`. Raises MomifyError where there is nothing to compare."""
    teacher, config, length = course.teacher.eval().to(device), course.model.config, course.data.block_length
    depths = matching_depths(config, course.step_layers, teacher.config.n_layer)
    if teacher.config.n_embd != config.hidden_size:
        raise MomifyError(
            f"train.hidden compares residuals, but the model's is {config.hidden_size} wide and its source's "
            f"{teacher.config.n_embd}; convert from the source that it is to learn from"
        )
    blocks = course.data.spread_blocks(-(-VARIANCE_TOKENS // length))
    return HiddenGoal(depths, source_variances(teacher, depths.values(), blocks))


def check_processes(checkpoint: Path) -> None:
    """Raise MomifyError where another number of processes wrote a checkpoint: the batches would be others."""
    before = read_seal(checkpoint).processes
    if before != count():
        launch = f"torchrun --nproc-per-node {before} -m momify" if before > 1 else "momify"
        raise MomifyError(
            f"{checkpoint} was written by {before} process(es) and this run has {count()}; "
            f"go on with {launch} train ... --resume"
        )


def tell_other_circumstances(checkpoint: Path, course: Course) -> None:
    """Say what makes the rest of a training another than it would have been: other text, another precision."""
    before, precision = read_seal(checkpoint), precision_here(course.settings)
    if before.text not in (None, course.data.sha256):
        course.place.say(
            f"warning: {checkpoint} was trained on other text than data.train and data.valid hold now; Ctrl-C and put "
            "it back, or go on with what is there"
        )
    if before.precision not in (None, precision):
        course.place.say(
            f"warning: {checkpoint} was trained in {before.precision}; this machine goes on in {precision}"
        )


def check_length(model: PreTrainedModel, data: TokenData) -> None:
    """Raise MomifyError when blocks are longer than the model's positions."""
    positions = model.config.max_position_embeddings
    if data.block_length > positions:
        raise MomifyError(f"data.block_length {data.block_length} exceeds the model's {positions} positions; lower it")


def check_tokens(model: PreTrainedModel, data: TokenData) -> None:
    """Raise MomifyError when the text has tokens that the model has no embedding for."""
    highest, known = data.highest, model.config.vocab_size
    if highest >= known:
        raise MomifyError(
            f"the text has token {highest} and the model {known} tokens: its tokenizer knows more than it does; use "
            "the tokenizer that the model was trained with"
        )


def check_vocabularies(model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Raise MomifyError when student and teacher do not predict the same number of tokens."""
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise MomifyError(
            f"the model has {model.config.vocab_size} tokens and its source {teacher.config.vocab_size}: their "
            "predictions cannot be compared; convert from the source that it is to learn from"
        )


def training_arguments(settings: TrainBlock, place: Place) -> TrainingArguments:
    """The Trainer's arguments for a train block."""
    every = settings.eval_every or settings.save_every
    arguments = TrainingArguments(
        output_dir=str(place.checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,  # cut into micro-batches by MomTrainer
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=int(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=settings.clip,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused on a machine without one
        bf16=precision_here(settings) == "bf16",
        **{_CHECKPOINTING: settings.gradient_checkpointing},
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        eval_strategy="steps",
        eval_steps=every,
        save_steps=settings.save_every,
        save_total_limit=settings.keep,
        seed=place.seed,
        data_seed=place.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # freeze has seen to them
        **({"fsdp": True, "fsdp_config": dict(_FSDP)} if settings.fsdp and count() > 1 else {}),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else several GPUs would be nn.DataParallel and as many batches a step
    return arguments
