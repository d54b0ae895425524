"""Warnings while a model trains: routers that collapse, a held-out loss that rises."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from momify.model import MomConfig
from momify.train.routing_log import USE

UNUSED_STEPS = 100  # a module that no token chose for so many steps is worth a word
_ALL = 0.999  # the share of the tokens at which one choice has taken all of them
_RISES = 3  # so many held-out losses in a row, each above the one before, are no accident

Say = Callable[[str], None]


class RouterWatch(TrainerCallback):
    """Warns, once each, of a module that no token uses for long and of one choice that takes all tokens of a kind.

    At one step a single choice is no collapse: with init "home" every step starts so. It is one when steps whose
    homes differ all end at the same choice.
    """

    def __init__(self, config: MomConfig, say: Say, unused_steps: int = UNUSED_STEPS) -> None:
        self._config, self._say, self._unused_steps = config, say, unused_steps
        self._last_used: dict[tuple[str, str], int] = {}
        self._warned: set[tuple[str, str]] = set()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kw: Any
    ) -> None:
        for kind in ("mha", "ffn"):
            use = self._use(kind, logs)
            if use:
                self._look_for_unused(kind, use, state.global_step)
                self._look_for_all(kind, use)

    def _use(self, kind: str, logs: dict[str, float]) -> dict[str, float]:
        """Share of the routed tokens per choice of a kind, over all its steps."""
        routed = self._config.routed(kind)
        use: dict[str, float] = {}
        for name, share in logs.items():
            if name.startswith(f"{USE}{kind}/"):
                choice = name.rsplit("/", 1)[1]
                use[choice] = use.get(choice, 0.0) + share / len(routed)
        return use

    def _look_for_unused(self, kind: str, use: dict[str, float], step: int) -> None:
        reach = self._config.reach(kind)
        fixed = {str(choices[0]) for choices in reach if len(choices) == 1}
        routable = {str(choice) for choices in reach if len(choices) > 1 for choice in choices}
        for module in map(str, range(self._config.num_modules(kind))):
            since = self._last_used.setdefault((kind, module), step)
            if use.get(module) or module in fixed or module not in routable:
                self._last_used[kind, module] = step
            elif step - since >= self._unused_steps:
                self._warn_once(kind, module, f"no token has chosen it for {step - since} steps")

    def _look_for_all(self, kind: str, use: dict[str, float]) -> None:
        homes = {self._config.homes(kind)[step] for step in self._config.routed(kind)}
        for choice, share in use.items():
            if share >= _ALL and len(homes) > 1:
                self._warn_once(
                    kind, f"{choice} (all)", f"{100 * share:.1f}% of the tokens choose it at every step; others idle"
                )

    def _warn_once(self, kind: str, choice: str, what: str) -> None:
        if (kind, choice) not in self._warned:
            self._warned.add((kind, choice))
            name = choice.removesuffix(" (all)")
            self._say(
                f"warning: router collapse: {kind} {'SKIP' if name == 'skip' else 'module ' + name}: {what}; "
                "raise train.balance or train.explore, or lower train.learning_rate"
            )


class OverfitWatch(TrainerCallback):
    """Warns when the held-out loss has risen several times in a row; a resumed run remembers the earlier ones."""

    def __init__(self, metrics: Path, say: Say) -> None:
        self._metrics, self._say, self._warned = metrics, say, False
        self._losses: list[tuple[int, float]] = []  # step, held-out loss

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        rows = _rows(self._metrics)  # a loss that was no number is in words there
        self._losses = [
            (row["step"], row["eval_loss"]) for row in rows if isinstance(row.get("eval_loss"), float | int)
        ]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kw: Any
    ) -> None:
        self._losses.append((state.global_step, metrics["eval_loss"]))
        last = [loss for _, loss in self._losses[-_RISES - 1 :]]
        rising = len(last) > _RISES and all(a < b for a, b in pairwise(last))
        if rising and not self._warned:
            self._warned = True
            step, best = min(self._losses, key=lambda pair: pair[1])
            self._say(
                f"warning: overfitting: the held-out loss has risen {_RISES} times in a row to {last[-1]:.4f}; "
                f"it was {best:.4f} at step {step}, whose checkpoint is kept if one was saved there; "
                "give more text or fewer train.steps"
            )


def _rows(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text("utf-8").splitlines()] if metrics.exists() else []
