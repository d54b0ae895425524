"""`momify plan`: what is planned for (a model, or a recipe with all that it says), and the plans themselves."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from momify.convert.homes import Request
from momify.errors import MomifyError
from momify.measure.cost import Shape
from momify.plan.figures import Figures, figures_of, planned_shape
from momify.plan.reading import read_shape, scratch_shape
from momify.plan.search import Candidate, parse_budget, search
from momify.plan.training import DEVICES, UTILISATION, TrainingCost, micro_batch_that_fits, training_cost
from momify.recipe import load_recipe
from momify.recipe_blocks import TrainBlock

REQUEST_KEYS = ("mha", "ffn", "depth", "modules_per_token", "mha_steps", "ffn_steps", "init", "reach",
                "patch_rank", "step_rank")  # fmt: skip


@dataclass(frozen=True)
class Premises:
    """What a plan starts from: the source's name and sizes, the conversion asked for, and how it would be trained."""

    name: str
    dense: Shape
    request: Request | None
    train: TrainBlock
    block: int
    """Tokens of a sequence, in training and for the costs of one."""
    line: str = ""
    """The command that converts and trains, where a recipe says how; it says more than `momify convert` can be told."""


@dataclass(frozen=True)
class Speed:
    """The GPU that a training is reckoned for: its name, FLOP/s while it trains, and where that number comes from."""

    device: str
    flops_per_second: float
    words: str


@dataclass(frozen=True)
class Plan:
    """One conversion: both models' figures, the command that makes it, and what training takes."""

    request: Request
    source: Figures
    mom: Figures
    line: str
    training: TrainingCost
    speed: Speed
    micro_batch: int | None
    """Sequences at once with which the training fits the device; None if not even one does."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "command": self.line,
            "request": asdict(self.request),
            "source": self.source.to_dict(),
            "mom": self.mom.to_dict(),
            "training": self.training.to_dict(),
            "speed": self.speed.words,
            "micro_batch_that_fits": self.micro_batch,
        }


def premises(model: str, tokens: int | None = None, overrides: Sequence[str] = ()) -> Premises:
    """What MODEL means: a recipe file (.yaml), with `overrides` as in momify run, or a model alone.

    `tokens`: the length of a sequence, the recipe's block or the source's positions (at most 1024) if left out. Raises
    MomifyError where there is no such model, and for a length beyond its positions.
    """
    if Path(model).suffix in (".yaml", ".yml"):
        found = _of_recipe(Path(model), list(overrides))
    else:
        if overrides:
            raise MomifyError(f"'{overrides[0]}' sets a key of a recipe, and {model} is none; give a .yaml file")
        dense = read_shape(model)
        found = Premises(model, dense, None, TrainBlock(), min(1024, dense.positions))
    found = replace(found, block=tokens or found.block)
    if found.block > found.dense.positions:
        raise MomifyError(
            f"--tokens {found.block} exceeds the {found.dense.positions} positions of {model}; give fewer"
        )
    return found


def _of_recipe(path: Path, overrides: list[str]) -> Premises:
    recipe = load_recipe(path, overrides)
    if recipe.source.scratch:
        name, dense = str(recipe.folder / "source"), scratch_shape(recipe.source.scratch)
    else:
        name, dense = recipe.source.model, read_shape(recipe.source.model, recipe.source.revision)
    request = Request(**{key: getattr(recipe.mom, key) for key in REQUEST_KEYS}) if recipe.mom else None
    line = shlex.join(["momify", "train", str(path), *overrides]) if request else ""
    return Premises(name, dense, request, recipe.train, recipe.data.block_length, line)


def make_plan(given: Premises, request: Request, speed: Speed) -> Plan:
    """The plan of one conversion. Raises MomifyError for what the source cannot give."""
    shape = planned_shape(given.dense, request)
    train = given.train.with_hidden(comparable=request.init != "random")
    return Plan(
        request=request,
        source=figures_of(given.dense, given.block),
        mom=figures_of(shape, given.block),
        line=given.line or command(given.name, request, given.dense.steps),
        training=training_cost(given.dense, shape, train, given.block, speed.flops_per_second),
        speed=speed,
        micro_batch=micro_batch_that_fits(given.dense, shape, train, given.block, DEVICES[speed.device]),
    )


def command(model: str, request: Request, layers: int) -> str:
    """The `momify convert` that makes it; what the source's depth and K = 1 give anyway is left out."""
    words = ["momify", "convert", model, "--mha", request.mha, "--ffn", request.ffn]
    if request.depth not in (None, layers):
        words += ["--depth", request.depth]
    if request.modules_per_token != 1:
        words += ["--top-k", request.modules_per_token]
    for flag, steps in (("--mha-steps", request.mha_steps), ("--ffn-steps", request.ffn_steps)):
        words += [] if steps is None else [flag, steps]
    words += [] if request.reach is None else ["--reach", request.reach]
    words += ["--patch-rank", request.patch_rank] if request.patch_rank else []
    words += [] if request.step_rank is None else ["--step-rank", request.step_rank]
    words += [] if request.init == "home" else ["--init", request.init]
    return shlex.join(map(str, words))


def make_search(given: Premises, budget: str, speed: Speed) -> tuple[list[Candidate], list[Plan]]:
    """The conversions that keep most of the source within `budget`, and their plans, the best first."""
    found = search(given.dense, parse_budget(budget), given.block)
    return found, [make_plan(given, one.request, speed) for one in found]


def training_speed(device: str, tflops: float | None) -> Speed:
    """The speed to reckon with: `tflops` as measured, else a part of what the device's maker states."""
    if device not in DEVICES:
        raise MomifyError(f"--device '{device}' is unknown; known: {', '.join(DEVICES)}; --tflops sets another speed")
    if tflops is not None:
        return Speed(device, tflops * 1e12, "as given")
    return Speed(
        device, UTILISATION * DEVICES[device].peak, f"{UTILISATION:.0%} of its peak, a hope; --tflops sets yours"
    )
