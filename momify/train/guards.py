"""What makes a step unfit to be taken, and what happens after several of them: skip, go back, stop with a name."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from momify import processes
from momify.errors import MomifyError
from momify.files import read_json, write_json

IN_A_ROW = 3  # so many unfit steps in a row end the course that training is on
_BACK, _MOST_ROLLBACKS = 0.3, 2  # what the learning rate is multiplied by at each going back, and how often at most
_FILE = "rollback.json"
_SHOWN = 16  # blocks that an error names


class UnfitStepsError(Exception):
    """Several steps in a row had a loss or a gradient that is not finite."""

    def __init__(self, first: int, last: int, found: str, blocks: list[int]) -> None:
        self.first, self.last, self.found, self.blocks = first, last, found, blocks
        super().__init__(f"steps {first} to {last}: {found}")

    def describe(self) -> str:
        """Step, tensor and batch in words."""
        shown = ", ".join(map(str, self.blocks[:_SHOWN])) + (", ..." if len(self.blocks) > _SHOWN else "")
        return f"{self.found} at step {self.last} (the third in a row), in the batch of training blocks {shown}"


class StepGuard:
    """Judges each optimizer step by its losses and gradients, before it is taken."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self._losses: list[Tensor] = []
        self._blocks: list[Tensor] = []

    def note(self, loss: Tensor, blocks: Tensor | None) -> None:
        """A micro-batch of the coming step: its loss, and the training blocks (B, pieces) it consists of."""
        self._losses.append(loss.detach())
        if blocks is not None:
            self._blocks.append(blocks)

    def unfit(self, step: int, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> bool:
        """Whether the coming `step` must be skipped; the processes agree on it.

        Raises UnfitStepsError when it is the third in a row.
        """
        found = _not_finite(self._losses, list(parameters))
        blocks = [index for piece in self._blocks for index in piece.flatten().tolist()]
        self._losses, self._blocks = [], []
        if not processes.any_of_all(found is not None):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW:
            found = found or "a loss or gradient of another process is not finite"
            raise UnfitStepsError(step - self.in_a_row + 1, step, found, blocks)
        return True


def _not_finite(losses: list[Tensor], parameters: list[tuple[str, torch.nn.Parameter]]) -> str | None:
    """The first thing that is not finite: a parameter, the loss, or a gradient; None where all are."""
    with_gradient = [(name, p) for name, p in parameters if p.grad is not None]
    norms = [_local(p.grad).norm() for _, p in with_gradient]
    if torch.stack([value.to(losses[0].device) for value in [*losses, *norms]]).isfinite().all():  # one wait for a GPU
        return None
    for name, parameter in parameters:
        if not torch.isfinite(_local(parameter.detach())).all():
            return f"weight {name} is not finite"
    for (name, _), norm in zip(with_gradient, norms, strict=True):
        if not math.isfinite(norm):
            wrong = [loss.item() for loss in losses if not math.isfinite(loss)]
            return f"the loss is {wrong[0] if wrong else 'finite'} and the gradient of {name} is not"
    return f"the loss is {next(loss.item() for loss in losses if not math.isfinite(loss))}"


def _local(tensor: Tensor) -> Tensor:
    """A tensor, or this process's part of one that is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class Rollback:
    """How often a run has gone back to a checkpoint, and what that made of its learning rate."""

    times: int = 0
    lr_factor: float = 1.0

    def again(self, error: UnfitStepsError) -> "Rollback":
        """One more. Raises MomifyError, naming step, tensor and batch, when it has been tried often enough."""
        if self.times >= _MOST_ROLLBACKS:
            raise MomifyError(
                f"{error.describe()}, also at {self.lr_factor:g} times the learning rate; look at that text, lower "
                "train.learning_rate, or set train.precision=fp32, and start anew"
            )
        return Rollback(self.times + 1, self.lr_factor * _BACK)


def read_rollback(checkpoints: Path) -> Rollback:
    """What a run's checkpoints folder says about earlier rollbacks."""
    path = checkpoints / _FILE
    if not path.exists():
        return Rollback()
    try:
        found = Rollback(**read_json(path))
        if not (isinstance(found.times, int) and 0 <= found.times <= _MOST_ROLLBACKS and 0 < found.lr_factor <= 1):
            raise TypeError("not a rollback")
        return found
    except TypeError:
        raise MomifyError(f"{path} is not what momify wrote; remove it to go on at the full learning rate") from None


def write_rollback(checkpoints: Path, rollback: Rollback) -> None:
    """Remember a rollback, so that a killed run goes on with the same learning rate; none leaves no file."""
    if rollback.times:
        write_json(checkpoints / _FILE, {"times": rollback.times, "lr_factor": rollback.lr_factor})
    else:
        (checkpoints / _FILE).unlink(missing_ok=True)
