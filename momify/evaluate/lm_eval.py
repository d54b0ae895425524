"""Tasks of EleutherAI's lm-eval, by name, for a model that momify has loaded."""

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from momify.devices import best_device
from momify.errors import MomifyError
from momify.evaluate.contestant import Contestant
from momify.evaluate.results import Key, Score
from momify.evaluate.task import Baseline, Turn

OWN_TASKS = "lm_eval"
"""Folder below the data folder with task files of the user's own."""
_BATCH = 16


@dataclass(frozen=True)
class _Loaded:
    """A task or group of lm-eval with its data."""

    manager: Any
    metrics: tuple[str, ...]
    higher_is_better: bool
    sha256: str
    shots: str
    examples: int
    """Of its largest task."""


@dataclass(frozen=True)
class LmEval:
    """The task `lm_eval:NAME`: scored as lm-eval scores it, without fine-tuning; at most `limit` examples.

    Raises MomifyError where lm-eval is not installed, does not know the task, or cannot have its data.
    """

    task: str
    limit: int | None = None
    folder: Path | None = None
    seeded: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _ = self._loaded  # what is wrong shows before a model is loaded

    @property
    def name(self) -> str:
        return f"lm_eval:{self.task}"

    @property
    def main(self) -> str:
        return self._loaded.metrics[0]

    @property
    def shown(self) -> tuple[str, ...]:
        return self._loaded.metrics

    @property
    def higher_is_better(self) -> bool:
        return self._loaded.higher_is_better

    @property
    def limited(self) -> bool:
        """Whether the limit leaves something out."""
        return self.limit is not None and self.limit < self._loaded.examples

    @cached_property
    def _loaded(self) -> _Loaded:
        own = self.folder / OWN_TASKS if self.folder else None
        return _load(self.task, own if own and own.is_dir() else None)

    def check_fit(self, one: Contestant) -> None:
        """Nothing to refuse: lm-eval cuts what is too long for a model."""

    def key(self, one: Contestant) -> Key:
        """Weights, tokenizer, lm-eval's version, and the task as lm-eval resolved it."""
        return {
            "sha256": one.sha256,
            "tokenizer": one.tokenizer_sha256,
            "lm_eval": version(),
            "task": self._loaded.sha256,
            "limit": self.limit if self.limited else None,
        }

    def incomparable(self, first: Contestant, other: Contestant) -> None:
        """Nothing: all are scored on the same examples, whatever their tokens."""

    def work(self, one: Contestant) -> int:
        """One piece: lm-eval does not say how far it is."""
        return 1

    def baselines(self) -> list[Baseline]:
        """None: what guesses reach differs from task to task."""
        return []

    def score(self, one: Contestant, turn: Turn) -> Score:
        """What lm-eval makes of the contestant."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = one.load().to(best_device())
        positions = model.config.max_position_embeddings
        with contextlib.redirect_stderr(io.StringIO()):  # its bars
            wrapped = HFLM(
                model, backend="causal", tokenizer=one.tokenizer, max_length=positions, batch_size=_BATCH,
                device=str(model.device),
            )  # fmt: skip
            found = simple_evaluate(
                wrapped, tasks=[self.task], limit=self.limit, bootstrap_iters=0, log_samples=False,
                task_manager=self._loaded.manager,
            )  # fmt: skip
        turn.tick(1)
        numbers = _numbers(found["results"][self.task])
        metrics = {name: numbers.get(name) for name in self._loaded.metrics}
        scored = sum(part["effective"] for part in found["n-samples"].values())
        of = sum(part["original"] for part in found["n-samples"].values())
        counted = f"{scored:,} of {of:,} (limited)" if self.limited else f"{scored:,}"
        return Score(metrics, f"lm-eval {version()}, {counted} examples, {self._loaded.shots}, not fine-tuned")


def version() -> str:
    """Of the lm-eval that is installed."""
    from importlib.metadata import version as installed

    return installed("lm_eval")


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """Metrics by name; lm-eval calls them NAME,FILTER, and a filter that does nothing "none"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in name and "," in name
    }


def _load(name: str, own: Path | None) -> _Loaded:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MomifyError(
            f"lm_eval:{name} needs EleutherAI's lm-eval, which is not installed; pip install 'momify[lm-eval]'"
        ) from None
    with contextlib.redirect_stderr(io.StringIO()):
        manager = _manager(TaskManager, name, own)
        if manager is None:
            raise MomifyError(
                f"lm-eval knows no task {name!r:.80}; `lm-eval ls tasks` lists them, and files of your own "
                f"go into the folder {OWN_TASKS}/ of --data-dir"
            )
        try:
            tasks = list(manager.load([name])["tasks"].values())
        except Exception as error:  # its loaders, and those of the data underneath, raise a dozen kinds
            reason = " ".join(str(error).split())[:150]
            raise MomifyError(f"lm_eval:{name} could not be loaded ({reason}); are its data at hand?") from None
    return _described(manager, tasks)


def _manager(task_manager: Any, name: str, own: Path | None) -> Any:
    """The manager that knows a task: of the user's own files, else of lm-eval's; None where both do not."""
    if own:
        manager = task_manager(include_path=str(own), include_defaults=False)  # lm-eval's own take ten seconds to index
        if name in manager.all_tasks:
            return manager
    manager = task_manager()
    return manager if name in manager.all_tasks else None


def _described(manager: Any, tasks: list[Any]) -> _Loaded:
    """What is known of loaded tasks: metrics of the first, and a hash over all that their files say."""
    first = tasks[0]
    directions = first.higher_is_better()
    metrics = [filtered for name in directions for filtered in _filtered(first, name)]
    configs = json.dumps([task.dump_config() for task in tasks], sort_keys=True, default=str)
    shots = sorted({task.config.num_fewshot or 0 for task in tasks})
    return _Loaded(
        manager,
        tuple(metrics),
        bool(next(iter(directions.values()))),
        hashlib.sha256(configs.encode()).hexdigest(),
        " and ".join(f"{count}-shot" for count in shots),
        max(len(task.eval_docs) for task in tasks),
    )


def _filtered(task: Any, metric: str) -> list[str]:
    """A metric's names, one a filter of the task."""
    filters = [one["name"] for one in task.config.filter_list or []] or ["none"]
    return [metric if name == "none" else f"{metric},{name}" for name in filters]
