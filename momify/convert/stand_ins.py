"""What stands in for removed half-layers as tensors of the model: the low-rank maps of single steps, stacked."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from momify.convert.homes import HomePlan
from momify.convert.layers import Layers
from momify.convert.regression import Factors

StandIns = Mapping[tuple[str, int], Factors]
"""The map of a stack, by its name in the model's body ("mha_patch", "ffn_delta.up"), at a step."""


@dataclass(frozen=True)
class _Stack:
    """The steps that have a map of one name, and its sizes."""

    steps: list[int]
    inputs: int
    rank: int
    outputs: int


def stand_in_state(plan: HomePlan, layers: Layers, found: StandIns, std: float, seed: int) -> dict[str, Tensor]:
    """The state dict of the plan's patches and step deltas: maps that were found, else such as do nothing yet.

    A term of rank 1 that does nothing gets an input of normal numbers (`std`, drawn with `seed`): were both its vectors
    zero, no gradient would ever reach it.
    """
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, stack in _stacks(plan, layers).items():
        if not stack.steps:
            continue
        maps = [found.get((name, step)) or _nothing(stack) for step in stack.steps]
        weight_in = torch.stack([one.weight_in for one in maps])  # (S, in, r)
        drawn = torch.empty(weight_in.shape).normal_(std=std, generator=generator)
        idle = (weight_in == 0).all(dim=1, keepdim=True)
        state[f"model.{name}.weight_in"] = torch.where(idle, drawn, weight_in)
        state[f"model.{name}.weight_out"] = torch.stack([one.weight_out for one in maps])  # (S, r, out)
        state[f"model.{name}.bias"] = torch.stack([one.bias for one in maps])  # (S, out)
    return state


def _stacks(plan: HomePlan, layers: Layers) -> dict[str, _Stack]:
    width, inner = layers.down_weight.shape[2], layers.down_weight.shape[1]
    stacks = {f"{kind}_patch": _Stack(plan.patched(kind), width, plan.patch_rank, width) for kind in ("mha", "ffn")}
    sizes = {"mha_delta.qkv": (width, 3 * width), "mha_delta.out": (width, width),
             "ffn_delta.up": (width, inner), "ffn_delta.down": (inner, width)}  # fmt: skip
    for name, (inputs, outputs) in sizes.items():
        stacks[name] = _Stack(plan.adapted(name[:3]), inputs, plan.step_rank, outputs)
    return stacks


def _nothing(stack: _Stack) -> Factors:
    """A map that adds nothing."""
    return Factors(
        torch.zeros(stack.inputs, stack.rank), torch.zeros(stack.rank, stack.outputs), torch.zeros(stack.outputs)
    )
