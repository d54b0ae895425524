"""transformers' Trainer with what momify adds: the weighted losses and held-out perplexity; see sturdy.py too."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from momify.evaluate.perplexity import Protocol, perplexity
from momify.model.half import Observe, Sight
from momify.train.head_loss import HeadLoss, Teacher
from momify.train.hidden import HiddenGap, HiddenGoal, residuals
from momify.train.losses import balance_loss, next_token_loss
from momify.train.micro_batches import micro_batches
from momify.train.optimizer import Muon, Rates, parameter_groups, set_embeddings_apart
from momify.train.routing_log import routing_sums
from momify.train.spending import BudgetHold
from momify.train.stand_ins import hold_back
from momify.train.sturdy import SturdyTrainer
from momify.train.supervise import Lesson, Supervision


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part of the loss; a part of weight 0 is not computed (the next-token loss always is, to show)."""

    distill: float = 0.0
    cross_entropy: float = 1.0
    balance: float = 0.0
    supervise: float = 0.0
    hidden: float = 0.0  # at the first step


@dataclass(frozen=True)
class HeldOut:
    """Held-out tokens (N,) and how perplexity on them is measured."""

    tokens: Tensor
    protocol: Protocol


@dataclass(frozen=True)
class RoutingAids:
    """What helps routers along: what they are told, and what holds their budget; None for without."""

    supervision: Supervision | None = None
    hold: BudgetHold | None = None

    def lesson(self) -> Lesson | None:
        """What one forward pass teaches."""
        return None if self.supervision is None else self.supervision.draw()


class MomTrainer(SturdyTrainer):
    """Trains a dense GPT-2 (no teacher) or a MoM (teacher = its source) on the weighted sum of the losses.

    Every part of the loss is logged as its own mean over the steps since the last log.

    micro_batch: blocks of a forward pass at most, None for a step's whole batch. The Trainer's own accumulation, which
    is not used, lets a smaller last micro-batch weigh as much as the others, and gives several processes other blocks.
    """

    loss_is_scaled_for_ga = True  # compute_loss weighs a micro-batch by its share of the step

    def __init__(
        self,
        *args: Any,
        weights: LossWeights,
        held_out: HeldOut,
        teacher: PreTrainedModel | None = None,
        optimizer: str = "adamw",
        rates: Rates | None = None,
        routing: RoutingAids | None = None,
        goal: HiddenGoal | None = None,
        steps_alone: int = 0,
        micro_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weights, self.held_out = weights, held_out
        self.optimizer_name, self.rates = optimizer, rates or Rates(self.args.learning_rate)
        self.routing, self.goal, self.steps_alone = routing or RoutingAids(), goal, steps_alone
        self.micro_batch, self._share = micro_batch, 1.0  # of the step's blocks, that which compute_loss is given
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        if self.teacher is not None and self._asks:
            self.teacher.to(self.args.device)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A step's batch, one micro-batch after the other; its loss and gradient are the whole batch's."""
        losses, parts = [], micro_batches(inputs, self.micro_batch)
        for number, (share, part) in enumerate(parts, 1):
            self._share = share
            # processes exchange gradients once a step
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, *args, **kwargs))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The weighted loss of input_ids and labels (B, T), times their share of the step's batch."""
        if self.teacher is not None:
            loss, outputs = self._taught_loss(model, inputs)
        else:
            outputs = model(input_ids=inputs["input_ids"], use_cache=False)
            cross_entropy = next_token_loss(outputs.logits, inputs["labels"])
            loss = self.weights.cross_entropy * cross_entropy
            self.tally.add({"loss": loss, "cross_entropy": cross_entropy}, {}, self._share)
        loss = self._share * loss
        return (loss, outputs) if return_outputs else loss

    def _taught_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The weighted loss of a MoM beside its teacher, and what the MoM gave."""
        weights = self.weights
        lesson = self.routing.lesson() if weights.supervise else None
        head_loss, gap = self._ask_teacher(inputs)
        watching = tuple(observer for observer in (lesson, gap) if observer is not None)
        outputs = model(
            input_ids=inputs["input_ids"],
            use_cache=False,
            output_router_logits=True,
            head_loss=head_loss,
            observe=partial(_show, watching) if watching else None,
        )
        choices = [record for record in outputs.routing if record.routed]
        loss, parts = outputs.loss, {"cross_entropy": outputs.loss_parts[1]}
        if weights.distill:
            parts["distill"] = outputs.loss_parts[0]
        more = {}
        if weights.balance and choices:
            pairs = zip(outputs.router_logits, choices, strict=True)
            more["balance"] = torch.stack([balance_loss(logits, r.modules) for logits, r in pairs]).mean()
        if lesson is not None:
            more["supervise"] = lesson.loss()
        if gap is not None:
            more["hidden"] = gap.loss()
        for name, part in more.items():
            loss = loss + getattr(weights, name) * part * (self._left() if name == "hidden" else 1)
        if self.routing.hold is not None and model.training:
            self.routing.hold.note(choices)
        self.tally.add({"loss": loss, **parts, **more}, routing_sums(choices, outputs.router_logits), self._share)
        return loss, outputs

    def _left(self) -> float:
        """Share of the steps that are left: residuals guide the beginning, predictions decide the end."""
        return 1 - self.state.global_step / self.state.max_steps

    def _judge_step(self, model: torch.nn.Module) -> bool:
        if self.state.global_step < self.steps_alone:
            hold_back(self.accelerator.unwrap_model(model).named_parameters())
        fit = super()._judge_step(model)
        if not fit and self.routing.hold is not None:
            self.routing.hold.forget()
        return fit

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or Muon or NorMuon for the matrices of the blocks."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        if self.optimizer_name == "adamw":
            super().create_optimizer(model)
            if self.rates.embeddings != 1:  # else the Trainer's groups, which older checkpoints have
                set_embeddings_apart(self.optimizer, model, self.rates.embeddings)
            return self.optimizer
        decayed, decay = self.get_decay_parameter_names(model), self.args.weight_decay
        groups = parameter_groups(model, decayed, decay, self.rates)
        betas, evened = (self.args.adam_beta1, self.args.adam_beta2), self.optimizer_name == "normuon"
        self.optimizer = Muon(groups, lr=self.rates.usual, evened=evened, betas=betas, eps=self.args.adam_epsilon)
        return self.optimizer

    @property
    def _asks(self) -> bool:
        """Whether the teacher is asked for anything: it is there too where labels alone are learned."""
        return bool(self.weights.distill or self.goal)

    def _ask_teacher(self, inputs: dict[str, Tensor]) -> tuple[HeadLoss, HiddenGap | None]:
        """The losses that need the head, and that of the residual, with what the teacher says where it is asked."""
        weights, teacher, gap = self.weights, None, None
        if self._asks:
            depths = self.goal.depths.values() if self.goal else ()
            with torch.no_grad(), self.compute_loss_context_manager(), residuals(self.teacher, depths) as seen:
                body = self.teacher.base_model(input_ids=inputs["input_ids"], use_cache=False)
            teacher = Teacher(body.last_hidden_state, self.teacher.get_output_embeddings().weight)
            gap = HiddenGap(self.goal, seen) if self.goal else None
        return HeadLoss(inputs["labels"], weights.cross_entropy, weights.distill, teacher), gap

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss and the routing since the last log, then log as the Trainer does."""
        if "loss" in logs:
            logs.update(self.tally.take())
        super().log(logs)  # without the time: metrics.jsonl has tokens/s of its own, which leave out measuring
        self.state.log_history.clear()  # every checkpoint would hold all of metrics.jsonl

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss by the report's own protocol."""
        model = self.accelerator.unwrap_model(self.model)
        result = perplexity(model, self.held_out.tokens, self.held_out.protocol)
        self.held_out_at = (self.state.global_step, result.loss)
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _show(observers: tuple[Observe, ...], sight: Sight) -> None:
    for observer in observers:
        observer(sight)
