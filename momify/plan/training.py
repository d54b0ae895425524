"""What training will take, in closed form: bytes per GPU at the peak, and time at a stated speed."""

from dataclasses import asdict, dataclass

from momify.measure.cost import KINDS, Kind, Shape, dense_macs, mom_macs, parameters, planned_usage
from momify.recipe_blocks import TrainBlock

FLOAT = 4
ADAM, MUON = 8, 4  # bytes of optimizer state a parameter


@dataclass(frozen=True)
class Saved:
    """What a half-step keeps for its backward pass, in floats of n x D (`inner`: of n x I).

    `sorted_*`: what it keeps beyond that where rows are sorted by module.
    """

    attention: float
    forward: float
    inner: float
    sorted_attention: float
    sorted_forward: float


SAVED = {"fp32": Saved(6, 2, 2, 4, 1), "bf16": Saved(5, 2, 1, 2, 0.5)}
CHUNK = 2**24  # logits of the student that its losses hold at once on a GPU, as train/head_loss.py has it
COPIES = 5  # of them in float32: logits, log-probabilities and gradients of student and teacher
UTILISATION = 0.35  # of a device's stated peak; what a run reaches is in its metrics.jsonl
USABLE = 0.9  # of a device's memory: the rest goes to the driver and to gaps


@dataclass(frozen=True)
class Device:
    """A GPU as its maker states it: FLOP/s of dense 16-bit tensor products, and bytes of memory."""

    peak: float
    memory: float


DEVICES = {
    "v100": Device(125e12, 32e9),
    "a100": Device(312e12, 80e9),
    "h100": Device(989e12, 80e9),
    "h200": Device(989e12, 141e9),
    "l4": Device(121e12, 24e9),
    "rtx4090": Device(165e12, 24e9),
}


@dataclass(frozen=True)
class TrainingCost:
    """Bytes on one GPU by what holds them, and the time for all steps at `flops_per_second` per GPU."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    flops: float
    flops_per_second: float

    @property
    def bytes(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations

    @property
    def seconds(self) -> float:
        """Time for all steps; each GPU of several does its own batches in the same time."""
        return self.flops / self.flops_per_second

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {**asdict(self), "bytes": self.bytes, "seconds": self.seconds}


def training_cost(source: Shape, mom: Shape, settings: TrainBlock, block: int, flops_per_second: float) -> TrainingCost:
    """Phase 2 of a recipe's train block on blocks of `block` tokens, one GPU's share of it.

    Weights, gradients and optimizer state are float32 (mixed precision keeps them so); the source runs beside as the
    teacher. FLOPs: a forward and two backward passes of the MoM, a forward pass of the teacher. Embeddings that do not
    learn have no gradient and no state, and their head one backward product instead of two. Every batch counts as full,
    so FLOPs and time are the most: how short the last of an epoch is, only the text would tell.
    """
    count = parameters(mom)
    learning = count.total - (count.embeddings + count.head if settings.freeze_embeddings else 0)
    modules = count.attention + count.ffn if settings.optimizer_for(taught=True) != "adamw" else 0
    sequences = settings.micro_batch or settings.batch_size
    mom_forward = mom_macs(mom, 1, block, planned_usage(mom, 1, block))
    mom_training = 3 * mom_forward.total - (mom_forward.head if settings.freeze_embeddings else 0)
    taught = settings.distill or settings.hidden
    per_sequence = mom_training + (dense_macs(source, 1, block).total if taught else 0)
    return TrainingCost(
        weights=FLOAT * count.total,
        gradients=FLOAT * learning,
        optimizer=ADAM * (learning - modules) + MUON * modules,
        teacher=FLOAT * parameters(source).total if taught else 0,
        activations=training_activations(mom, sequences * block, settings),
        flops=2 * per_sequence * settings.steps * settings.batch_size,
        flops_per_second=flops_per_second,
    )


def micro_batch_that_fits(source: Shape, mom: Shape, settings: TrainBlock, block: int, device: Device) -> int | None:
    """The most sequences at once, a divisor of the batch, with which training fits; None if not even one does."""
    for sequences in range(settings.batch_size, 0, -1):
        if settings.batch_size % sequences == 0:
            tried = settings.model_copy(update={"micro_batch": sequences})
            if training_cost(source, mom, tried, block, 1.0).bytes <= USABLE * device.memory:
                return sequences
    return None


def training_activations(mom: Shape, rows: int, settings: TrainBlock) -> int:
    """Bytes that n = `rows` tokens keep for the backward pass, and what the losses hold beside that.

    The losses take the logits a chunk at a time, make the gradient of the head at once and, in bf16, hold both heads in
    it too. An attention half keeps its input, the normalised input, q, k, v and the output, a feed-forward half the
    first two and its inner activations; in bf16, and where the machine decides, most of them take half a float. A patch
    keeps the rows that it is given and those between its factors, a delta these only.
    """
    saved, d, steps = SAVED[settings.precision or "bf16"], mom.width, []
    for step in range(mom.steps):
        attention = saved.attention + saved.sorted_attention * mom.mha.routed(step)
        forward = (saved.forward + saved.sorted_forward * mom.ffn.routed(step)) * d + saved.inner * mom.inner
        parts = sum(_small_parts(mom, kind, step, saved) for kind in KINDS)
        steps.append(attention * d * mom.mha.runs(step) + forward * mom.ffn.runs(step) + parts)
    kept = len(steps) * mom.width + max(steps) if settings.gradient_checkpointing else sum(steps)
    if settings.hidden:  # at each depth the source's residual, and the difference to it
        depths = sum(mom.pool(kind).runs(step) for kind in KINDS for step in range(mom.steps))
        kept += depths * mom.width * (1 if settings.gradient_checkpointing else 2)
    head = mom.vocab * mom.width
    logits = COPIES * min(rows * mom.vocab, CHUNK)
    logits += (0 if settings.freeze_embeddings else head) + (0 if settings.precision == "fp32" else head)
    return int(FLOAT * (rows * kept + logits))


def _small_parts(mom: Shape, kind: Kind, step: int, saved: Saved) -> float:
    """Floats of a row that a step's patch and delta keep; where nothing runs, a patch its half's input as well."""
    kept = 2 * mom.step_rank if mom.adapted(kind, step) else 0
    if mom.patched(kind, step):
        rows = saved.sorted_forward if mom.pool(kind).runs(step) else saved.forward
        kept += rows * mom.width + mom.patch_rank
    return kept
