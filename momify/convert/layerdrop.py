"""A copy of the source that has learned to do without any of its half-layers: what removals are judged by.

The loss without a half-layer, measured on the source, says what its removal costs now, not what training will leave of
that. So a copy is trained for a short while to predict what the source predicts, with half-layers dropped at random in
every step (LayerDrop, Fan et al. 2019, arXiv 1909.11556, for half-layers). Its losses with a set left out stand for
those of any set after recovery, as the weights of a one-shot search do for the networks in it; only the choice is taken
from it, the conversion starts from the source's own weights (docs/results.md).
"""

import math
from collections.abc import Mapping
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


@dataclass(frozen=True)
class DropTraining:
    """How the copy learns: AdamW without decay, a warm-up of a tenth, cosine."""

    learning_rate: float
    bf16: bool = False
    seed: int = 0
    version: int = 1  # of everything else about it: another makes kept choices void


def trained_with_drops(
    network: Network,
    tokens: Tensor,
    quotas: tuple[int, int],
    training: DropTraining,
    progress: Progress | None = None,
) -> Network:
    """A copy of `network`, its modules trained on `tokens` (S, T) int64 while `quotas` (attention, feed-forward) of
    them, others in each step, are left out.

    Embeddings, last norm and head stay the source's. It holds the modules five times while it trains: the source's,
    the copy's, gradients and two moments. Raises MomifyError for tokens that the network cannot read, and where the
    loss or a gradient is not finite.
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
        kept = drawn(layers.num_layers, quotas, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=training.bf16):
            loss = divergence(network, {half: halves[half] for half in kept}, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        _check_finite(loss.item(), norm.item(), number + 1, training)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(number + 1, len(batches))
    return replace(network, layers=layers)


def _check_finite(loss: float, norm: float, step: int, training: DropTraining) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise MomifyError(
            f"importance layerdrop: in step {step} of what the copy learns the loss is {loss:g} and the gradient's "
            f"norm {norm:g}; lower train.learning_rate ({training.learning_rate:g}) or use importance greedy"
        )


def drawn(num_layers: int, quotas: tuple[int, int], generator: torch.Generator) -> list[int]:
    """The half-layers that run in one step, ascending: all but `quotas` of each kind, drawn with equal chances."""
    kept = []
    for offset, quota in enumerate(quotas):
        layers = torch.randperm(num_layers, generator=generator)[quota:]
        kept += (2 * layers + offset).tolist()
    return sorted(kept)


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
