"""Tokens per second of prefill and decode, all models alternating so that they share the machine's moods."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from momify.errors import MomifyError
from momify.measure.mode import evaluating
from momify.model.outputs import CACHE

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """How to time: a prompt in one piece, then `decode` tokens one by one, each sequence of the batch.

    `warmup` rounds go uncounted before `rounds` counted ones. Raises MomifyError for a count below 1.
    """

    decode: int = 64
    rounds: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        for name, least in (("decode", 1), ("rounds", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise MomifyError(f"{name} {getattr(self, name)} is too small: give {least} or more")

    def describe(self, batch: int, prompt: int) -> str:
        """One line that says what was timed."""
        return (
            f"batch {batch}, prompt {prompt} tokens, {self.decode} tokens decoded one by one, "
            f"median of {self.rounds} alternating rounds"
        )


@dataclass(frozen=True)
class Spread:
    """Tokens per second, all sequences together, over the rounds: median, slowest and fastest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """One model's speed, in tokens per second."""

    prefill: Spread
    decode: Spread


@dataclass(frozen=True)
class Latency:
    """The speeds of several models measured in one run of `batch` sequences, and what they ran on."""

    batch: int
    speeds: dict[str, Speed]
    device: str
    dtype: str
    threads: int
    protocol: str


def measure_latency(
    models: Mapping[str, PreTrainedModel], prompts: Tensor, timing: Timing, clock: Clock = time.perf_counter
) -> Latency:
    """Time prefill of `prompts` (B, T) and decode after it, several models A B A B ...; all on one device.

    Raises MomifyError where prompt and decoded tokens together do not fit a model's positions.
    """
    batch, tokens = prompts.shape
    _check_fit(models, tokens + timing.decode)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with evaluating(*models.values()), torch.no_grad():
        for turn in range(timing.warmup + timing.rounds):
            for name, model in models.items():
                taken = _one_round(model, prompts.to(model.device), timing.decode, clock)
                if turn >= timing.warmup:
                    seconds[name].append(taken)
    first = next(iter(models.values()))
    return Latency(
        batch=batch,
        speeds={name: _speed(taken, batch * tokens, batch * timing.decode) for name, taken in seconds.items()},
        device=_device_name(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        protocol=timing.describe(batch, tokens),
    )


def _one_round(model: PreTrainedModel, prompts: Tensor, decode: int, clock: Clock) -> tuple[float, float]:
    """Seconds for the prompts, and for the tokens after them (greedy: what is generated decides the routing)."""
    start = _now(model, clock)
    out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    middle = _now(model, clock)
    for _ in range(decode):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, **{CACHE: getattr(out, CACHE)}, use_cache=True, logits_to_keep=1)
    return middle - start, _now(model, clock) - middle


def _now(model: PreTrainedModel, clock: Clock) -> float:
    """The time once the device has finished what was asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return clock()


def _speed(taken: list[tuple[float, float]], prompt: int, decoded: int) -> Speed:
    """From seconds a round, and the tokens of all sequences together."""
    prefill, decode = zip(*taken, strict=True)
    return Speed(_spread(prompt, prefill), _spread(decoded, decode))


def _spread(tokens: int, seconds: tuple[float, ...]) -> Spread:
    rates = [tokens / max(taken, 1e-9) for taken in seconds]  # a clock may stand still between two looks
    return Spread(statistics.median(rates), min(rates), max(rates))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _check_fit(models: Mapping[str, PreTrainedModel], needed: int) -> None:
    if not models:
        raise MomifyError("no model to time: give at least one")
    for name, model in models.items():
        limit = model.config.max_position_embeddings
        if needed > limit:
            raise MomifyError(f"timing needs {needed} positions and {name} has {limit}: shorten the prompt")
