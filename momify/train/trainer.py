"""transformers' Trainer with what momify adds: the weighted losses, whole checkpoints, held-out perplexity."""

import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import rotate_checkpoints

from momify.errors import MomifyError
from momify.evaluate.perplexity import Protocol, perplexity
from momify.train.losses import balance_loss, distillation_loss, next_token_loss
from momify.train.routing_log import RoutingLog


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part of the loss; a part of weight 0 is not computed (the next-token loss always is, to show)."""

    distill: float = 0.0
    cross_entropy: float = 1.0
    balance: float = 0.0


@dataclass(frozen=True)
class HeldOut:
    """Held-out tokens (N,) and how perplexity on them is measured."""

    tokens: Tensor
    protocol: Protocol


class AtomicTrainer(Trainer):
    """A Trainer whose checkpoints appear whole: written under `.partial`, then renamed."""

    _sub: tuple[str, ...] = ()

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), *self._sub)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._sub = (".partial",)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._sub = ()
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        root, name = self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        shutil.rmtree(os.path.join(root, name), ignore_errors=True)
        os.replace(os.path.join(root, ".partial", name), os.path.join(root, name))
        rotate_checkpoints(root, self.args.save_total_limit, self.state.best_model_checkpoint)


class MomTrainer(AtomicTrainer):
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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weights, self.held_out = weights, held_out
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device) if teacher is not None else None
        self._parts: dict[str, list[Tensor]] = {}
        self._routing = RoutingLog()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The weighted loss of a batch of input_ids and labels (B, T)."""
        routed = self.teacher is not None
        extra = {"output_router_logits": True} if routed else {}
        outputs = model(input_ids=inputs["input_ids"], use_cache=False, **extra)
        parts = {"cross_entropy": next_token_loss(outputs.logits, inputs["labels"])}
        loss = self.weights.cross_entropy * parts["cross_entropy"]
        if routed and self.weights.distill:
            parts["distill"] = distillation_loss(outputs.logits, self._teacher_logits(inputs["input_ids"]))
            loss = loss + self.weights.distill * parts["distill"]
        if routed:
            choices = [record for record in outputs.routing if record.routed]
            self._routing.add(choices, outputs.router_logits)
            if self.weights.balance and choices:
                pairs = zip(outputs.router_logits, choices, strict=True)
                parts["balance"] = torch.stack([balance_loss(logits, r.modules) for logits, r in pairs]).mean()
                loss = loss + self.weights.balance * parts["balance"]
        for name, value in parts.items():
            self._parts.setdefault(name, []).append(value.detach())
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_logits(self, input_ids: Tensor) -> Tensor:
        with self.compute_loss_context_manager():
            return self.teacher(input_ids=input_ids, use_cache=False).logits

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch. Raises MomifyError when the loss is not finite, before a weight can become so."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise MomifyError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower train.learning_rate, or set "
                "train.precision=fp32, and go on from the last checkpoint with --resume"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss and the routing since the last log, then log as the Trainer does."""
        if "loss" in logs:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._parts.items() if values})
            logs.update(self._routing.take())
            self._parts.clear()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss by the report's own protocol."""
        model = self.accelerator.unwrap_model(self.model)
        result = perplexity(model, self.held_out.tokens, self.held_out.protocol)
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
