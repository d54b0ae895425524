"""Bytes three ways: weights, KV cache and activations at their peak, each measured and beside its closed form."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from momify.measure.activations import Call, activation_bytes
from momify.measure.cost import HalfStep, attention_steps, kv_bytes_per_token, parameters, planned_usage
from momify.measure.live_bytes import LiveBytes
from momify.measure.mode import evaluating
from momify.measure.routing import realised
from momify.model.outputs import CACHE

Phase = Literal["prompt", "decode"]


@dataclass(frozen=True)
class Bytes:
    """One quantity as it was found and as the closed form has it."""

    measured: int
    formula: int


@dataclass(frozen=True)
class Load:
    """What one forward pass needs: `tokens` of prompt at once, or one token more with that prompt in the cache.

    weights + kv + activations is the most that was ever alive; `kv` is the cache at the end of the pass.
    """

    phase: Phase
    batch: int
    tokens: int
    weights: Bytes
    kv: Bytes
    activations: Bytes

    @property
    def total(self) -> Bytes:
        """All three together."""
        parts = (self.weights, self.kv, self.activations)
        return Bytes(sum(part.measured for part in parts), sum(part.formula for part in parts))


@dataclass(frozen=True)
class Memory:
    """Bytes of weights and of KV cache per token in the model's own dtype, and whole loads if inputs were given.

    `kv_bytes_per_token_measured` is None if no cache was looked at; `kv_steps` steps hold keys and values.
    """

    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_token_measured: float | None
    kv_steps: int
    loads: tuple[Load, ...] = ()
    method: str = ""


def measure_memory(model: PreTrainedModel, prompts: Sequence[Tensor] = ()) -> Memory:
    """Count the bytes of `model`; with `prompts` (B, T), each of its own B, also of the loads that they make.

    The closed form of activations is a MoM's: transformers' GPT-2 holds more.
    """
    found = [load for prompt in prompts for load in measure_loads(model, prompt.to(model.device))]
    kept = [load.kv.measured / (load.batch * load.tokens) for load in found if load.phase == "prompt"]
    return Memory(
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=weight_bytes(model),
        kv_bytes_per_token=kv_bytes_per_token(model.config, model.dtype.itemsize),
        kv_bytes_per_token_measured=kept[0] if kept else None,
        kv_steps=attention_steps(model.config),
        loads=tuple(found),
        method=_method(model.device),
    )


def _method(device: torch.device) -> str:
    if device.type == "cuda":
        return "the CUDA allocator's peak"
    return "live tensor bytes, operator by operator"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, a shared (tied) one once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measure_loads(model: PreTrainedModel, prompt: Tensor) -> tuple[Load, Load]:
    """The loads of `prompt` (B, T), and of one token after it; logits of the last token only, as generating does.

    The cache may hold more than its formula says: where tokens that skip are masked, one byte per token and step says
    so, and a model without any attention marks each token by two numbers.
    """
    prompt = prompt[:, : model.config.max_position_embeddings - 1]  # a position is left for the token after it
    batch, tokens = prompt.shape
    token = prompt[:, :1].clone()  # a view would keep the whole prompt's bytes in the count
    with evaluating(model), torch.no_grad():
        if model.device.type == "cuda":  # cuBLAS takes its workspace at the first product, and keeps it: no activations
            model(input_ids=prompt, use_cache=False, logits_to_keep=1)
        first, after = _Pass(model, prompt).run(None)
        cache = getattr(after, CACHE)
        usage = _usage(model, after, batch * tokens)
        del after  # its logits are no part of the next pass
        second, after = _Pass(model, token).run(cache)
    calls = (Call(batch, tokens), usage), (Call(batch, 1, tokens), _usage(model, after, batch))
    phases: tuple[Phase, Phase] = ("prompt", "decode")
    return tuple(
        _load(model, phase, found, *formula)
        for phase, found, formula in zip(phases, (first, second), calls, strict=True)
    )


def _usage(model: PreTrainedModel, out: object, tokens: int) -> Sequence[HalfStep]:
    """What each half-step of the pass that gave `out` computed."""
    if model.config.model_type == "gpt2":
        return planned_usage(model.config, 1, tokens)
    return realised(out.routing, tokens)


@dataclass(frozen=True)
class _Found:
    """Of one pass: bytes alive at most beyond those before it, and of the cache before and after."""

    peak: int
    cache_before: int
    cache_after: int


@dataclass(frozen=True)
class _Pass:
    """One forward pass whose memory is watched."""

    model: PreTrainedModel
    ids: Tensor

    def run(self, cache: Cache | None) -> tuple[_Found, object]:
        """Watch the pass with `cache` (None: it makes one): what was found, and the model's output."""
        before = _bytes(cache)
        routed = {"output_router_logits": True} if self.model.config.model_type == "mom" else {}

        def forward() -> object:
            return self.model(input_ids=self.ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1, **routed)

        peak, out = peak_bytes(forward, self.model.device, self._known(cache))
        return _Found(peak, before, _bytes(getattr(out, CACHE))), out

    def _known(self, cache: Cache | None) -> Iterator[Tensor]:
        """What is alive before; one after the other, as holding on to old keys would keep them alive."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield self.ids
        yield from _tensors(cache)


def peak_bytes(run: Callable[[], object], device: torch.device, known: Iterator[Tensor]) -> tuple[int, object]:
    """The most bytes alive during `run` beyond those before it, and what it gave.

    `known`: every tensor from before that `run` works on; an allocator knows them by itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        out = run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start, out
    with LiveBytes(known) as meter:
        start = meter.now
        out = run()
    return meter.peak - start, out


def _load(model: PreTrainedModel, phase: Phase, found: _Found, call: Call, usage: Sequence[HalfStep]) -> Load:
    held, size = call.past + call.tokens, model.dtype.itemsize
    call = Call(call.batch, call.tokens, call.past, size)
    return Load(
        phase=phase,
        batch=call.batch,
        tokens=call.past or call.tokens,
        weights=Bytes(weight_bytes(model), parameters(model.config).total * size),
        kv=Bytes(found.cache_after, kv_bytes_per_token(model.config, size) * call.batch * held),
        activations=Bytes(
            found.peak - (found.cache_after - found.cache_before), activation_bytes(model.config, usage, call)
        ),
    )


def _bytes(cache: Cache | None) -> int:
    """What the storages hold, room for later tokens included; each counts once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(cache)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(cache: Cache | None) -> Iterator[Tensor]:
    """All that the layers of a cache hold, keys and values and whatever a layer adds to them."""
    for layer in cache.layers if cache is not None else ():
        yield from (value for value in vars(layer).values() if isinstance(value, Tensor))
