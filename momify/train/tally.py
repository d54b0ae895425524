"""Sums since the last log, of the loss's parts and of the routing; checkpoints carry them, so no log line changes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from momify import processes
from momify.train.routing_log import ENTROPY, USE, use_shares


class Tally:
    """Adds tensors up by name, a step at a time; a step that is skipped leaves no trace."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._step: list[dict[str, Tensor]] = []

    def add(self, means: Mapping[str, Tensor], sums: Mapping[str, Tensor], share: float = 1.0) -> None:
        """A micro-batch that is `share` of the current step: scalars to be averaged, and tensors to be added up."""
        pairs = {name: torch.stack([v.detach().float(), torch.ones((), device=v.device)]) for name, v in means.items()}
        self._step.append({**{name: share * pair for name, pair in pairs.items()}, **sums})

    def keep_step(self) -> None:
        """Count the micro-batches added since the last step."""
        for added in self._step:
            for name, value in added.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._step = []

    def drop_step(self) -> None:
        """Forget the micro-batches added since the last step."""
        self._step = []

    def take(self) -> dict[str, float]:
        """Means of the scalars, router entropy and use shares over all processes; then start again from nothing."""
        sums = {name: processes.sum_of_all(value) for name, value in sorted(self._sums.items())}
        self._sums = {}
        means = {name: v for name, v in sums.items() if not name.startswith(USE) and name != ENTROPY}
        numbers = {name: (v[0] / v[1]).item() for name, v in means.items()}
        if ENTROPY in sums:
            numbers[ENTROPY] = (sums[ENTROPY][0] / sums[ENTROPY][1]).item()
        return numbers | use_shares(sums)

    def state(self) -> dict[str, Tensor]:
        """The sums, for a checkpoint."""
        return {name: value.cpu() for name, value in self._sums.items()}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from the sums of a checkpoint."""
        self._sums, self._step = {name: value.to(device) for name, value in state.items()}, []
