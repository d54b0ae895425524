"""Fine-tuning as every contestant gets it: AdamW, a warm-up, a linear fall, no choice among checkpoints.

A plain loop: the runs are short, are made again from their seed when killed, and models come and go in one process.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from momify.errors import MomifyError
from momify.evaluate.batches import Batch
from momify.model import MomConfig

WARMUP, WEIGHT_DECAY, CLIP = 0.1, 0.01, 1.0

Loss = Callable[[PreTrainedModel, Batch], Tensor]
"""The summed loss over a batch's targets."""


@dataclass(frozen=True)
class FineTuning:
    """How a task is learned. `batch_size` examples an optimizer step; dropout of embeddings and residual branches."""

    learning_rate: float = 1e-4
    epochs: int = 3
    batch_size: int = 32
    dropout: float = 0.1
    precision: str = "fp32"

    def describe(self) -> str:
        """The part of a protocol line that tells of the training."""
        return (
            f"learning rate {self.learning_rate:g} (warm-up {WARMUP:.0%}, then linear to 0), epochs {self.epochs}, "
            f"batch {self.batch_size}, dropout {self.dropout:g}, weight decay {WEIGHT_DECAY:g}, {self.precision}"
        )

    def steps(self, examples: int) -> int:
        """Optimizer steps for so many examples."""
        return self.epochs * math.ceil(examples / self.batch_size)


def autocast(model: PreTrainedModel, settings: FineTuning) -> AbstractContextManager:
    """Mixed precision where the settings want it; weights stay in float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def fine_tune(
    model: PreTrainedModel,
    steps: Iterable[list[Batch]],
    total: int,
    loss: Loss,
    settings: FineTuning,
    tick: Callable[[int], None],
) -> None:
    """Train `model` in place: one optimizer step for each list of micro-batches, `total` in all; eval mode afterwards.

    The loss of a step is the mean over its targets, however they are spread over micro-batches. Raises MomifyError when
    a loss or a gradient is not finite: the score of such a model would say nothing.
    """
    set_dropout(model, settings.dropout)
    model.train()
    optimizer = torch.optim.AdamW(_groups(model), lr=settings.learning_rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * total), total)
    for number, micro_batches in enumerate(steps, 1):
        targets = sum(count_targets(batch) for batch in micro_batches)
        seen = 0.0
        for batch in micro_batches:
            with autocast(model, settings):
                part = loss(model, batch.to(model.device)) / targets
            part.backward()
            seen += part.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not (math.isfinite(seen) and math.isfinite(norm.item())):
            raise MomifyError(
                f"fine-tuning lost its way at step {number} of {total} (loss {seen}); "
                f"lower eval.learning_rate ({settings.learning_rate:g}) or set eval.precision=fp32"
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tick(1)
    model.eval()


def count_targets(batch: Batch) -> int:
    """How many things a batch asks to be learned: labels that are not -100."""
    return int((batch.labels != -100).sum())


def set_dropout(model: PreTrainedModel, share: float) -> None:
    """The same dropout for every contestant, whatever its config says: a MoM reads it there, a GPT-2 in its layers.

    None in attention, where it would cost the fused kernel (a quarter of the time on a CPU).
    """
    if isinstance(model.config, MomConfig):
        model.config.update({"embd_pdrop": share, "attn_pdrop": 0.0, "resid_pdrop": share})
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0 if name.endswith("attn_dropout") else share


def _groups(model: PreTrainedModel) -> list[dict]:
    """Matrices and embeddings with weight decay; biases and norms without."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    free = {name for name, p in trained if p.ndim < 2 or name.endswith("bias")}  # a pool's biases are (M, n)
    return [
        {"params": [p for name, p in trained if name not in free], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in trained if name in free], "weight_decay": 0.0},
    ]
