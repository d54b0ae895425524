"""AdamW, or Muon for the matrices of the modules with AdamW for the rest, in one optimizer with one state.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest orthogonal
matrix, found by five Newton-Schulz iterations. torch.optim.Muon takes single matrices; a pool is a stack of them.
NorMuon (Li et al. 2025, arXiv 2510.05491, algorithm 1) then divides what each output unit gets by a running root mean
square of it, so that all of them move alike, as AdamW has it for each weight.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from momify.train.frozen import is_embedding

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that torch.optim.Muon uses
_ITERATIONS = 5
_RMS = 0.2  # root mean square of an AdamW update, so that learning rates and decay carry over (Liu et al. 2025)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `muon: True` are stacks of matrices (..., in, out) updated by orthogonalised momentum.

    A matrix without any gradient, of a module that no token took, is not updated (it decays, as with AdamW).

    evened: NorMuon, whose running mean square forgets as AdamW's second moment does (`betas`).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95, evened: bool = False, **adamw: Any
    ) -> None:
        super().__init__([{"muon": False, **group} for group in groups], lr=lr, **adamw)
        self.momentum, self.evened = momentum, evened

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both kinds of groups."""
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, lr = self.state[parameter], group["lr"]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # AdamW, on loading, looks for it in every state
        state["step"] += 1
        momentum = state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
        used = parameter.grad.flatten(-2).any(-1)[..., None, None]  # else old momentum would move at full size
        direction = orthogonalise(parameter.grad.lerp(momentum, self.momentum)) * used  # Nesterov
        if self.evened:
            direction = _evened(direction, state, group["betas"][1], group["eps"])
        scale = _RMS * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr * scale)


def _evened(direction: Tensor, state: dict[str, Any], beta: float, epsilon: float) -> Tensor:
    """Each output unit's column of `direction` (..., in, out) over the root of its running mean square, which is kept
    in `state`; as large as an orthogonal matrix on the whole.
    """
    square = direction.square().mean(-2, keepdim=True)  # (..., 1, out)
    if "square" not in state:
        state["square"] = torch.zeros_like(square)
    running = state["square"].lerp_(square, 1 - beta) / (1 - beta ** state["step"].item())
    evened = direction / (running.sqrt() + epsilon)
    wished = max(direction.shape[-2:]) ** -0.5
    return evened * (wished / evened.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(epsilon))


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix (..., in, out) = U S V^T: singular values end between 0.7 and 1.2; same dtype out."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


@dataclass(frozen=True)
class Rates:
    """Learning rates: the highest of most weights, and those of two kinds in multiples of it."""

    usual: float
    matrices: float = 1.0
    embeddings: float = 1.0


def parameter_groups(
    model: nn.Module, decayed: Iterable[str], weight_decay: float, rates: Rates
) -> list[dict[str, Any]]:
    """Parameter groups of `model`, each at its own rate: what has no weight decay, what else has, embeddings and head,
    and last the matrices of the blocks, for Muon.

    Embeddings, head, positions, routers, patches and step deltas stay with AdamW, as do vectors. `decayed` names what
    decays.
    """
    decayed = set(decayed)
    groups: dict[str, dict[str, Any]] = {  # first one of the usual rate: the Trainer logs that of the first
        "plain": {"weight_decay": 0.0, "lr": rates.usual},
        "decayed": {"weight_decay": weight_decay, "lr": rates.usual},
        "embeddings": {"weight_decay": weight_decay, "lr": rates.usual * rates.embeddings},
        "matrices": {"weight_decay": weight_decay, "lr": rates.usual * rates.matrices, "muon": True},
    }
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_kind(name, parameter, name in decayed)].append(parameter)
    return [{"params": members[kind], **groups[kind]} for kind in groups if members[kind]]


def set_embeddings_apart(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> None:
    """Give embeddings and head of `model` groups of their own, at `rate` times the learning rate that they had."""
    embeddings = {parameter for name, parameter in model.named_parameters() if is_embedding(name)}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in embeddings]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in embeddings]
            optimizer.add_param_group({**group, "params": moved, "lr": rate * group["lr"]})


def _kind(name: str, parameter: nn.Parameter, decays: bool) -> str:
    """The group of a parameter."""
    if is_embedding(name):
        return "embeddings"
    in_block = any(part in name for part in (".mha.", ".ffn.", ".attn.", ".mlp."))
    if in_block and name.endswith(".weight") and parameter.ndim >= 2:
        return "matrices"
    return "decayed" if decays else "plain"
