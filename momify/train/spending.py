"""A budget of MACs held while a model trains (`train.budget`): the threshold of SKIP follows what is really spent."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from momify import processes
from momify.files import read_json
from momify.measure.budget import FLOOR, Budget
from momify.measure.stakes import Place
from momify.model import MomForCausalLM
from momify.model.outputs import RoutingRecord

_GAIN = 1.0  # logits of threshold for each token too many that runs, as a share: a quarter of what would do at once
_LIFT = 0.1  # logits a step by which a half-step below its floor is made dearer to skip


class BudgetHold(TrainerCallback):
    """After each step moves `router_threshold` towards spending the share, and half-steps back above their floor.

    Nothing is remembered from step to step but the threshold and the routers themselves: a resumed run goes on as it
    would have.
    """

    def __init__(self, model: MomForCausalLM, budget: Budget, places: Sequence[Place], share: float) -> None:
        self.model, self.budget, self.places, self.share = model, budget, tuple(places), share
        self.spent: float | None = None
        self._counts: dict[Place, Tensor] = {}

    def note(self, records: Iterable[RoutingRecord]) -> None:
        """Count who skips in a micro-batch of the current step. Nothing is copied from the device."""
        for record in records:
            place = record.kind, record.step
            if place in self.places:
                skips = (record.modules[:, 0] == record.skip).sum()
                counts = torch.stack([skips, skips.new_tensor(len(record.modules))])
                self._counts[place] = self._counts.get(place, 0) + counts

    def forget(self) -> None:
        """Leave the micro-batches of the current step out: it is not taken."""
        self._counts = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Start an attempt without what one that was given up had counted."""
        self.forget()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Correct the threshold and what lies below its floor, by a step that was taken."""
        if not self._counts:
            return
        counts = processes.sum_of_all(torch.stack([self._counts[place] for place in self.places])).tolist()
        self.forget()
        skipping = {place: skips / tokens for place, (skips, tokens) in zip(self.places, counts, strict=True)}
        self.spent = self.budget.spent(skipping)
        most = sum(self.budget.savings[kind] for kind, _ in self.places)
        self.model.config.router_threshold += _GAIN * (self.spent - self.share) / most
        for place, share in skipping.items():
            if share > 1 - FLOOR:
                self._lift(place)

    @torch.no_grad()
    def _lift(self, place: Place) -> None:
        kind, step = place
        config, body = self.model.config, self.model.model
        router = body.mha_router if kind == "mha" else body.ffn_router
        router.bias[config.routed(kind).index(step), config.homes(kind)[step]] += _LIFT

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kw: Any
    ) -> None:
        """The share of the reachable MACs that the last step spent, and the threshold."""
        if "loss" in logs and self.spent is not None:
            logs |= {"spent": self.spent, "router_threshold": self.model.config.router_threshold}


def take_threshold(model: MomForCausalLM, checkpoint: Path) -> None:
    """Go on with the threshold that a checkpoint's config holds."""
    model.config.router_threshold = float(read_json(checkpoint / "config.json").get("router_threshold", 0.0))
