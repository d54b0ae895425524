"""A Trainer that loses nothing: whole, sealed checkpoints, unfit steps skipped, exact sums across a restart."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer

from momify import processes
from momify.errors import MomifyError
from momify.files import disk_errors
from momify.train.checkpoints import PARTIAL, Seal, put_in_place, read_seal, rotate, seal
from momify.train.guards import StepGuard
from momify.train.tally import Tally


class SturdyTrainer(Trainer):
    """Checkpoints written under `.partial`, sealed, renamed; a step whose loss or gradient is not finite is skipped.

    `lr_factor` multiplies the learning rate, also of the optimizer that a checkpoint brings along. `about`: what
    else the checkpoints shall say, by the names of `Seal`.
    """

    def __init__(
        self,
        *args: Any,
        lr_factor: float = 1.0,
        about: dict[str, str] | None = None,
        say: Callable[[str], None] = lambda line: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._about = about or {}
        self.tally, self.guard, self.lr_factor, self._say = Tally(), StepGuard(), lr_factor, say
        self.held_out_at: tuple[int, float] | None = None  # step and loss of the last measurement
        self._sub: tuple[str, ...] = ()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, noted for the judgement of its step."""
        blocks = inputs.get("block")
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.note(loss, blocks)
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self._judge_step(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # no clipping: nobody has judged the gradients yet
            self._judge_step(model)
        return super()._get_grad_norm(model, grad_norm)

    def _judge_step(self, model: torch.nn.Module) -> bool:
        """Whether a step is fit; take the gradients away from one that is not: the optimizer then changes nothing."""
        step = self.state.global_step + 1
        if self.guard.unfit(step, self.accelerator.unwrap_model(model).named_parameters()):
            self._say(f"warning: step {step} skipped: its loss or gradient is not finite")
            self.optimizer.zero_grad()
            self.tally.drop_step()
            return False
        self.tally.keep_step()
        return True

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), *self._sub)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        root, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with disk_errors(root / name, also=(SafetensorError, RuntimeError)):
            try:
                self._sub = (PARTIAL,)
                super()._save_checkpoint(model, trial)
                self._sub = ()
                processes.wait_for_all()
                if self.args.should_save:
                    seal(root / PARTIAL / name, self._seal())
                    put_in_place(root / PARTIAL / name, root / name)
                    rotate(root, self.args.save_total_limit)
            finally:
                self._sub = ()
                if self.args.should_save:  # after an error, too: a full disk gets its space back
                    shutil.rmtree(root / PARTIAL, ignore_errors=True)
        processes.wait_for_all()

    def _seal(self) -> Seal:
        step = self.state.global_step
        measured = self.held_out_at[1] if self.held_out_at and self.held_out_at[0] == step else None
        sound = measured is None or math.isfinite(measured)
        loss = measured if sound else None
        return Seal(step, loss, self.lr_factor, self.guard.in_a_row, processes.count(), sound, **self._about)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self.tally.state(), self._tally_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = self._tally_file(checkpoint)
        if not processes.any_of_all(not path.is_file()):  # else another number of processes wrote it
            self.tally.restore(torch.load(path, weights_only=True), self.args.device)

    def _tally_file(self, folder: str) -> Path:
        return Path(folder) / f"tally_{self.args.process_index}.pt"

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, at the lowered rate: rollback.json may be all that an earlier attempt left."""
        fresh = self.lr_scheduler is None
        scheduler = super().create_scheduler(*args, **kwargs)
        if fresh and self.lr_factor != 1:
            self._multiply_learning_rate(self.lr_factor)  # a checkpoint brings its own, which replaces it
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise MomifyError(
                f"{checkpoint}: its optimizer groups the weights otherwise ({error}), as another version of momify "
                "did; start the run anew with --overwrite, or under another run.name"
            ) from None
        if checkpoint is None:
            return
        found = read_seal(Path(checkpoint))
        self.guard.in_a_row = found.skipped_in_a_row
        if found.lr_factor != self.lr_factor:
            self._multiply_learning_rate(self.lr_factor / found.lr_factor)

    def _multiply_learning_rate(self, factor: float) -> None:
        scheduler = self.lr_scheduler
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        scheduler._last_lr = [rate * factor for rate in scheduler.get_last_lr()]
        for group in self.optimizer.param_groups:
            group["lr"], group["initial_lr"] = group["lr"] * factor, group["initial_lr"] * factor
