"""What is at stake in a choice between module and patch, in nats: the measure that routers are fitted to.

A patch in the module's place changes the residual by d. To second order that moves the predictions of this token and
the later ones by a Kullback-Leibler divergence of d^T F d / 2, F the Fisher information of the residual there: the mean
of g g^T over tokens, g the gradient of the log-probability of tokens drawn from the model's own predictions. F makes
errors at different depths comparable, which their size does not: the residual grows with depth, and some directions of
it are never read. Behind a LayerNorm g goes with 1 / |x|, so F is taken of |x| g and d is divided by |x|.
"""

import torch
from torch import Tensor

from momify.model import MomForCausalLM
from momify.model.config import Kind
from momify.model.half import home_update, normalise, run_half

Place = tuple[Kind, int]
"""A half-step: its kind and its step."""
METRIC_TOKENS = 8192
_BATCH_TOKENS = 1024  # held at once, with all their activations


def loss_metrics(model: MomForCausalLM, tokens: Tensor, seed: int = 0) -> dict[Place, Tensor]:
    """For each half-step that chooses between its home and SKIP the root R (D, D) of its metric, F = R R^T.

    Every token is at its home. tokens (S, T) int64, of which the first METRIC_TOKENS are used; draws follow `seed`.
    """
    width, device = model.config.hidden_size, model.device
    forks = [half for step in model.model.steps for half in step if half.forks]
    sums = {(half.kind, half.step): torch.zeros(width, width, device=device) for half in forks}
    generator = torch.Generator(device).manual_seed(seed)
    rows = max(1, _BATCH_TOKENS // tokens.shape[1])
    used = tokens[: -(-METRIC_TOKENS // tokens.shape[1])]
    for batch in used.split(rows):
        _add_gradients(model, batch.to(device), generator, sums)
    return {place: _root(total / used.numel()) for place, total in sums.items()}


def _add_gradients(model: MomForCausalLM, batch: Tensor, generator: torch.Generator, sums: dict[Place, Tensor]) -> None:
    """Add the sums of |x|^2 g g^T over a batch (B, T) for each half-step of `sums`."""
    x, shared = model.model.begin(batch)
    x, behind, norms = x.detach().requires_grad_(), {}, {}
    for half in (half for step in model.model.steps for half in step):
        if half.forks:
            norms[half.kind, half.step] = x.detach().norm(dim=1, keepdim=True)
            x = x + home_update(normalise(x, shared), half, shared)
            behind[half.kind, half.step] = x
        else:
            y, _ = run_half(x, half, shared)
            x = x if y is None else x + y
    log_p = model.lm_head(model.model.ln_f(x)).float().log_softmax(-1)  # (n, V)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), list(behind.values()))
    for (place, norm), gradient in zip(norms.items(), gradients, strict=True):
        scaled = gradient * norm
        sums[place] += scaled.T @ scaled


def _root(metric: Tensor) -> Tensor:
    """R (D, D) of a symmetric positive semi-definite R R^T."""
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).sqrt()).float()


def stakes(change: Tensor, x: Tensor, root: Tensor) -> Tensor:
    """Nats (n,) that a change (n, D) of what a half-step adds to x (n, D) costs, by its metric's root (D, D).

    Never 0, so that its logarithm is finite.
    """
    cost = (change @ root).square().sum(1) / (2 * x.square().sum(1))
    return cost.clamp_min(1e-12)
