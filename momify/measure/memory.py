"""Bytes that a model keeps: its weights, and keys and values per token, by formula and in a real cache."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from momify.measure.cost import attention_steps, kv_bytes_per_token
from momify.measure.mode import evaluating


@dataclass(frozen=True)
class Memory:
    """Bytes of weights and of KV cache per token in the model's own dtype.

    `kv_bytes_per_token_measured` is None if no cache was looked at; `kv_steps` steps hold keys and values.
    """

    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_token_measured: float | None
    kv_steps: int


def measure_memory(model: PreTrainedModel, prompt: Tensor | None = None) -> Memory:
    """Count the bytes of `model`; with a `prompt` (B, T) also those of the cache that it leaves."""
    return Memory(
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=weight_bytes(model),
        kv_bytes_per_token=kv_bytes_per_token(model.config, model.dtype.itemsize),
        kv_bytes_per_token_measured=None if prompt is None else measured_kv_bytes(model, prompt),
        kv_steps=attention_steps(model.config),
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, a shared (tied) one once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measured_kv_bytes(model: PreTrainedModel, prompt: Tensor) -> float:
    """Bytes per token and sequence of everything that the cache holds after `prompt` (B, T).

    More than the formula in two cases: where tokens that skip are masked, one byte per token and step says so, and
    a model without any attention marks each token by two numbers.
    """
    with evaluating(model), torch.no_grad():
        cache = model(input_ids=prompt.to(model.device), use_cache=True).past_key_values
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache)) / prompt.numel()


def _tensors(cache: Cache) -> Iterable[Tensor]:
    """All that the layers of a cache hold, keys and values and whatever a layer adds to them."""
    for layer in cache.layers:
        yield from (value for value in vars(layer).values() if isinstance(value, Tensor))
