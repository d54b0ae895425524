"""The losses on the vocabulary without its logits: computed and differentiated a few rows at a time.

At 8 x 1024 tokens and 50,257 tokens of vocabulary the logits of teacher and student in float32 take 3.3 GB, their
log-softmaxes as much again. Here no more than a chunk of rows exists at once, in the forward pass as in the backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**24
"""Logits that one chunk holds, at most, for the student and as many for the teacher (64 MiB each in float32)."""
CPU_CHUNK = 2**20
"""The same on a CPU: a dozen passes go over a chunk, which at 4 MiB stays in its cache (half the time of 64 MiB)."""


@dataclass(frozen=True)
class Teacher:
    """What the teacher says of the same tokens, before its head: hidden (B, T, D'), its head's weight (V, D')."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class HeadLoss:
    """distill * KL(teacher || student) + cross_entropy * next-token loss, from hidden states and the head's weight.

    The same values and gradients as `losses.distillation_loss` and `losses.next_token_loss` of the logits.
    """

    labels: Tensor  # (B, T); -100 is not scored
    cross_entropy: float
    distill: float = 0.0
    teacher: Teacher | None = None  # needed for distill
    chunk: int | None = None  # logits held at once; None: what suits the device

    def __call__(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (), and its parts (2,) unweighed and without gradient: divergence, cross-entropy.

        hidden (B, T, D), weight (V, D); the divergence is 0 where there is no teacher.
        """
        targets = torch.full_like(self.labels, -100)
        targets[:, :-1] = self.labels[:, 1:]
        return _ChunkedLoss.apply(hidden.flatten(0, 1), weight, targets.flatten(), self)


class _ChunkedLoss(torch.autograd.Function):
    """The loss and, at once, its gradients: the logits of a chunk are not needed a second time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, loss: HeadLoss) -> tuple[Tensor, Tensor]:
        sums = _Sums(hidden, weight, targets, loss, ctx.needs_input_grad)
        for start in range(0, hidden.shape[0], sums.rows):
            sums.add(slice(start, start + sums.rows))
        divergence, cross_entropy = sums.divergence / hidden.shape[0], sums.cross_entropy / sums.scored
        total = loss.cross_entropy * cross_entropy
        if loss.distill:
            total = total + loss.distill * divergence
        parts = torch.stack([divergence, cross_entropy])
        ctx.save_for_backward(sums.d_hidden, sums.d_weight)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        made = (None if one is None else one * grad.to(one.dtype) for one in ctx.saved_tensors)
        return *made, None, None


class _Sums:
    """What accumulates from chunk to chunk. n = B*T rows, V vocabulary."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, loss: HeadLoss, needs: Sequence[bool]) -> None:
        self.hidden, self.targets, self.loss = hidden, targets, loss
        self.kind = _product_kind(hidden)
        self.weight = weight.to(self.kind)
        teacher = loss.teacher if loss.distill else None
        self.teacher_hidden = None if teacher is None else teacher.hidden.flatten(0, 1)
        self.teacher_weight = None if teacher is None else teacher.weight.to(self.kind)
        self.scored = (targets != -100).sum().clamp_min(1)
        self.rows = max(1, (loss.chunk or (CPU_CHUNK if hidden.is_cpu else CHUNK)) // weight.shape[0])
        self.exact = torch.promote_types(self.kind, torch.float32)
        self.divergence = hidden.new_zeros((), dtype=self.exact)
        self.cross_entropy = hidden.new_zeros((), dtype=self.exact)
        self.d_hidden = torch.empty_like(hidden) if any(needs[:2]) else None
        self.d_weight = torch.zeros_like(weight) if needs[1] else None  # a head that stays costs a third less

    def add(self, rows: slice) -> None:
        """Add the rows of one chunk."""
        h = self.hidden[rows].to(self.kind)
        log_p = (h @ self.weight.T).to(self.exact).log_softmax(-1)  # (rows, V)
        targets = self.targets[rows]
        scored = targets != -100
        places = targets.clamp_min(0).unsqueeze(1)
        self.cross_entropy -= (log_p.gather(1, places).squeeze(1) * scored).sum()
        log_t = None
        if self.teacher_hidden is not None:
            log_t = (self.teacher_hidden[rows].to(self.kind) @ self.teacher_weight.T).to(self.exact).log_softmax(-1)
            self.divergence += torch.nn.functional.kl_div(log_p, log_t, log_target=True, reduction="sum")
        if self.d_hidden is not None:
            d_logits = self._slope(log_p, log_t, scored, places).to(self.kind)
            self.d_hidden[rows] = d_logits @ self.weight
            if self.d_weight is None:
                return
            if self.kind == self.d_weight.dtype:
                self.d_weight.addmm_(d_logits.T, h)
            else:  # chunks add up in the parameter's own precision
                self.d_weight += d_logits.T @ h

    def _slope(self, log_p: Tensor, log_t: Tensor | None, scored: Tensor, places: Tensor) -> Tensor:
        """The gradient of the loss by a chunk's logits; it takes the place of log_p."""
        each = self.loss.cross_entropy * scored.to(self.exact) / self.scored  # (rows,)
        p = log_p.exp_()
        if log_t is None:
            p *= each.unsqueeze(1)
        else:
            share = self.loss.distill / self.hidden.shape[0]
            p *= (each + share).unsqueeze(1)
            p -= log_t.exp_().mul_(share)
        return p.scatter_add_(1, places, -each.to(p.dtype).unsqueeze(1))


def _product_kind(hidden: Tensor) -> torch.dtype:
    """The precision that the head multiplies in: autocast's, or that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
