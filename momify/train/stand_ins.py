"""At first only what conversion added learns: patches, step deltas, routers (`train.stand_ins_first`).

The other weights get no update then: their gradients are taken away before anything reads them. So no weight decay and
no momentum moves them, the optimizer keeps nothing of them that would push when they begin to learn, and clipping
measures what learns. (A learning rate of 0 would let their moments run and their gradients clip the others';
`requires_grad` cannot change under DistributedDataParallel, which counts on a gradient of each parameter that it began
with.) Who learns follows from the number of the step alone, so that a resumed run goes on as it would have.
"""

from collections.abc import Iterable

from torch import nn

from momify.errors import MomifyError
from momify.recipe_blocks import TrainBlock

_ADDED = ("_router.", "_patch.", "_delta.")


def steps_alone(model: nn.Module, settings: TrainBlock) -> int:
    """How many steps at the beginning teach nothing but what conversion added.

    Raises MomifyError where that is asked for and nothing added can learn.
    """
    if settings.stand_ins_first and not count_added(model):
        raise MomifyError(
            "train.stand_ins_first: the model has no patches, step deltas or routers that are taught, so nothing would "
            "learn; convert with mom.patch_rank or mom.step_rank, or set it to 0"
        )
    return int(settings.stand_ins_first * settings.steps)


def count_added(model: nn.Module) -> int:
    """How many numbers of what conversion added can learn."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and _added(name))


def hold_back(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Take the gradients of all but what conversion added away: for an optimizer they then do not exist."""
    for name, parameter in parameters:
        if not _added(name):
            parameter.grad = None


def _added(name: str) -> bool:
    return any(part in name for part in _ADDED)
