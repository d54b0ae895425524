"""transformers' Trainer with what momify adds: the weighted losses and held-out perplexity; see sturdy.py too."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from momify.evaluate.perplexity import Protocol, perplexity
from momify.train.head_loss import HeadLoss, Teacher
from momify.train.losses import balance_loss, next_token_loss
from momify.train.optimizer import Muon, parameter_groups
from momify.train.routing_log import routing_sums
from momify.train.spending import BudgetHold
from momify.train.sturdy import SturdyTrainer
from momify.train.supervise import Lesson, Supervision


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part of the loss; a part of weight 0 is not computed (the next-token loss always is, to show)."""

    distill: float = 0.0
    cross_entropy: float = 1.0
    balance: float = 0.0
    supervise: float = 0.0


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

    Every part of the loss is logged as its own mean over the micro-batches since the last log.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a mean: the Trainer divides by the accumulation steps

    def __init__(
        self,
        *args: Any,
        weights: LossWeights,
        held_out: HeldOut,
        teacher: PreTrainedModel | None = None,
        muon: bool = False,
        routing: RoutingAids | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weights, self.held_out, self.muon = weights, held_out, muon
        self.routing = routing or RoutingAids()
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device) if teacher is not None else None

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The weighted loss of a batch of input_ids and labels (B, T)."""
        routed = self.teacher is not None
        sums: dict[str, Tensor] = {}
        lesson = self.routing.lesson() if self.weights.supervise else None
        extra = {}
        if routed:
            extra = {"output_router_logits": True, "head_loss": self._head_loss(inputs), "observe": lesson}
        outputs = model(input_ids=inputs["input_ids"], use_cache=False, **extra)
        if routed:
            loss, parts = outputs.loss, {"cross_entropy": outputs.loss_parts[1]}
            if self.weights.distill:
                parts["distill"] = outputs.loss_parts[0]
        else:
            parts = {"cross_entropy": next_token_loss(outputs.logits, inputs["labels"])}
            loss = self.weights.cross_entropy * parts["cross_entropy"]
        if routed:
            choices = [record for record in outputs.routing if record.routed]
            sums = routing_sums(choices, outputs.router_logits)
            if self.weights.balance and choices:
                pairs = zip(outputs.router_logits, choices, strict=True)
                parts["balance"] = torch.stack([balance_loss(logits, r.modules) for logits, r in pairs]).mean()
                loss = loss + self.weights.balance * parts["balance"]
            if lesson is not None:
                parts["supervise"] = lesson.loss()
                loss = loss + self.weights.supervise * parts["supervise"]
            if self.routing.hold is not None and model.training:
                self.routing.hold.note(choices)
        self.tally.add({"loss": loss, **parts}, sums)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or Muon for the matrices of the blocks."""
        if not self.muon or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        groups = parameter_groups(model, self.get_decay_parameter_names(model), self.args.weight_decay)
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        self.optimizer = Muon(groups, lr=self.args.learning_rate, betas=betas, eps=self.args.adam_epsilon)
        return self.optimizer

    def _head_loss(self, inputs: dict[str, Tensor]) -> HeadLoss:
        """The losses that need the head, with what the teacher says where it is asked."""
        weights, teacher = self.weights, None
        if weights.distill:
            with torch.no_grad(), self.compute_loss_context_manager():
                body = self.teacher.base_model(input_ids=inputs["input_ids"], use_cache=False)
            teacher = Teacher(body.last_hidden_state, self.teacher.get_output_embeddings().weight)
        return HeadLoss(inputs["labels"], weights.cross_entropy, weights.distill, teacher)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss and the routing since the last log, then log as the Trainer does."""
        if "loss" in logs:
            logs.update(self.tally.take())
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss by the report's own protocol."""
        model = self.accelerator.unwrap_model(self.model)
        result = perplexity(model, self.held_out.tokens, self.held_out.protocol)
        self.held_out_at = (self.state.global_step, result.loss)
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
