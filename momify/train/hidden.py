"""The MoM's residual becomes the source's, wherever both stand for the same (`train.hidden`).

In front of a half-step that runs in a source layer's place the MoM's residual stands for the source's there, and at the
end for that behind its last layer: so the conversion's refit sees it too (convert/refit.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from momify.errors import MomifyError
from momify.measure.stakes import Place
from momify.model import MomConfig
from momify.model.half import Sight
from momify.model.layout import half_steps

Depths = Mapping[Place | None, int]
"""How many half-layers of the source the residual in front of a half-step (None: at the end) stands for."""
VARIANCE_TOKENS = 8192
_BATCH_TOKENS = 1024  # whose residuals at all depths are held at once


def matching_depths(config: MomConfig, step_layers: Sequence[int | None] | None, layers: int) -> Depths:
    """Where the residuals of a MoM and of its source of `layers` layers are compared.

    step_layers: the source layer that each step stands for, None for an added one. In front of the first half-step
    there is nothing but embeddings, so that is no place. Raises MomifyError where no step stands for a layer, or these
    are not the model's steps.
    """
    if not step_layers or all(layer is None for layer in step_layers):
        raise MomifyError(
            "train.hidden needs steps that stand for layers of the source, and this model has none (mom.init random, "
            "or no plan in its momify.json); convert with init home, or set train.hidden 0"
        )
    known = [layer for layer in step_layers if layer is not None]
    if len(step_layers) != config.num_steps or known != sorted(set(known) & set(range(layers))):
        raise MomifyError("the plan in the model's momify.json is not that of its steps; convert the source again")
    depths: dict[Place | None, int] = {}
    for index, half in enumerate(half_steps(config)):
        layer = step_layers[half.step]
        if index and layer is not None and half.home != half.skip:
            depths[half.kind, half.step] = 2 * layer + (half.kind == "ffn")
    return {**depths, None: 2 * layers}


@contextmanager
def residuals(source: GPT2LMHeadModel, depths: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """For as long as the block lasts, each forward pass leaves its residuals (B, T, D) behind so many half-layers."""
    body, seen = source.transformer, {}
    norms = [norm for block in body.h for norm in (block.ln_1, block.ln_2)] + [body.ln_f]  # each reads the residual
    hooks = [norms[depth].register_forward_pre_hook(partial(_keep, seen, depth)) for depth in set(depths)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _keep(seen: dict[int, Tensor], depth: int, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen[depth] = inputs[0].detach()


@torch.no_grad()
def source_variances(source: GPT2LMHeadModel, depths: Iterable[int], tokens: Tensor) -> dict[int, float]:
    """The variance of the source's residual over tokens (S, T) at each depth, as the mean over width.

    Of training text that is always the same: were it that of each batch, the loss would hang on how batches are cut.
    """
    batches = tokens.to(source.device).split(max(1, _BATCH_TOKENS // tokens.shape[1]))
    with residuals(source, depths) as seen:
        sums: dict[int, list[Tensor]] = {}
        for batch in batches:
            source.base_model(input_ids=batch, use_cache=False)
            for depth, x in seen.items():
                rows = x.flatten(0, 1).double()  # (n, D)
                first, second = sums.get(depth, [0.0, 0.0])
                sums[depth] = [first + rows.sum(0), second + rows.square().sum(0)]
    count = tokens.numel()
    found = {depth: second / count - (first / count).square() for depth, (first, second) in sums.items()}  # (D,) each
    return {depth: max(float(each.mean()), 1e-12) for depth, each in found.items()}


@dataclass(frozen=True)
class HiddenGoal:
    """Where the residual of a MoM shall become its source's, and how much that varies at each depth."""

    depths: Depths
    variances: Mapping[int, float]


class HiddenGap:
    """An observer of one forward pass, on tokens of which the source left its residuals (B, T, D) by depth.

    Checkpointed steps are shown twice: the first time counts, and the second leaves nothing that would stay in memory.
    """

    def __init__(self, goal: HiddenGoal, seen: Mapping[int, Tensor]) -> None:
        self.goal, self.seen = goal, seen
        self._gaps: dict[int, Tensor] = {}

    def __call__(self, sight: Sight) -> None:
        """Set the residual against the source's, where it stands for that."""
        depth = self.goal.depths.get(None if sight.half is None else (sight.half.kind, sight.half.step))
        if depth is not None:
            gap = (sight.x.float() - self.seen[depth].flatten(0, 1).float()).square().mean()
            self._gaps.setdefault(depth, gap / self.goal.variances[depth])

    def loss(self) -> Tensor:
        """Mean over the depths of squared error relative to the source's variance there, ()."""
        return torch.stack(list(self._gaps.values())).mean()
