"""A copy of the source's modules that learns for a short while to predict what the source predicts.

What is judged by such a copy is told by what training leaves of a removal, not by what the removal costs now. Only a
choice is taken from it: the conversion starts from the source's own weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from momify.convert.importance import Progress, check_tokens
from momify.convert.network import HalfWeights, Network, embed, half_layer_update, half_update, half_weights, last_norm
from momify.convert.refit import own_layers
from momify.errors import MomifyError
from momify.train.head_loss import HeadLoss, Teacher

STEP_TOKENS = 1024  # of a step, or one block where that is longer: many small steps learn most from few tokens
_WARMUP = 0.1
_CLIP = 1.0


class NotFiniteError(MomifyError):
    """The loss or the gradient of a copy is not a number."""


@dataclass(frozen=True)
class ShortTraining:
    """How a copy learns: AdamW without decay, a warm-up of a tenth, cosine."""

    way: str  # of mom.importance that asks for it
    learning_rate: float
    bf16: bool = False
    seed: int = 0
    version: int = 1  # of everything else about it: another makes kept choices void


def trained_copy(
    network: Network,
    tokens: Tensor,
    kept: Callable[[torch.Generator], Sequence[int]],
    training: ShortTraining,
    progress: Progress | None = None,
) -> Network:
    """A copy of `network`, its modules trained on `tokens` (S, T) int64, each block once, in an order that the seed
    draws.

    kept: the half-layers that run in the next step, ascending, which may be drawn. Embeddings, last norm and head stay
    the source's. It holds the modules that ever run five times while it trains: the source's, the copy's, gradients and
    two moments. Raises MomifyError for tokens that the network cannot read, NotFiniteError where the loss or a gradient
    is not finite.
    """
    check_tokens(network, tokens)
    layers = own_layers(network.layers)
    halves = [_learning(half_weights(layers, half)) for half in range(2 * layers.num_layers)]
    parameters = [getattr(weights, part.name) for weights in halves for part in fields(weights)]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(training.seed)
    batches = tokens[torch.randperm(len(tokens), generator=generator)].split(max(1, STEP_TOKENS // tokens.shape[1]))
    schedule = get_cosine_schedule_with_warmup(optimizer, int(_WARMUP * len(batches)), len(batches))
    for number, batch in enumerate(batches):
        running = {half: halves[half] for half in kept(generator)}
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=training.bf16):
            loss = divergence(network, running, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        _check_finite(loss.item(), norm.item(), number + 1, training)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(number + 1, len(batches))
    return replace(network, layers=layers)


def _check_finite(loss: float, norm: float, step: int, training: ShortTraining) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFiniteError(
            f"importance {training.way}: in step {step} of what a copy learns the loss is {loss:g} and the gradient's "
            f"norm {norm:g}; lower train.learning_rate ({training.learning_rate:g}) or use importance greedy"
        )


def divergence(network: Network, kept: Mapping[int, HalfWeights], batch: Tensor) -> Tensor:
    """KL(source || copy that runs the half-layers `kept`), a mean over the tokens of the batch (B, T), ()."""
    with torch.no_grad():
        taught = embed(network.frame, batch)
        for half in range(2 * network.layers.num_layers):
            taught = taught + half_layer_update(network, half, taught)
    x = embed(network.frame, batch)
    for half, weights in kept.items():
        x = x + half_update(network, half, weights, x)
    head = network.frame.head
    loss, _ = HeadLoss(batch, 0.0, 1.0, Teacher(last_norm(network, taught), head))(last_norm(network, x), head)
    return loss


def _learning(weights: HalfWeights) -> HalfWeights:
    """The same memory as leaves with a gradient of their own: that of a stack would be as large as the stack."""
    return HalfWeights(*(getattr(weights, part.name).detach().requires_grad_() for part in fields(weights)))
