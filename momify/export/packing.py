"""Half-steps of a MoM without choices -> layers of a GPT-2, each of which runs an attention, then a feed-forward."""

from collections.abc import Iterable
from dataclasses import dataclass

from momify.convert.homes import NOUNS
from momify.errors import MomifyError
from momify.model import HalfStep, MomConfig, half_steps


@dataclass(frozen=True)
class Layer:
    """What a GPT-2 layer runs; None: a half of zeros, which adds exactly nothing.

    A patch is a feed-forward half, whichever kind of module it stands for.
    """

    attention: HalfStep | None = None
    feed_forward: HalfStep | None = None

    @property
    def halves(self) -> tuple[HalfStep, ...]:
        """What it runs, without the zeros."""
        return tuple(half for half in (self.attention, self.feed_forward) if half is not None)


def is_patch(half: HalfStep) -> bool:
    """Whether a half-step without a choice is the patch alone: what it can choose is SKIP."""
    return half.home == half.skip


def fixed_halves(config: MomConfig) -> tuple[HalfStep, ...]:
    """What every token runs, in order. Raises MomifyError where tokens choose."""
    halves = half_steps(config)
    choosing = [half for half in halves if half.routed]
    if choosing:
        first = choosing[0]
        raise MomifyError(
            f"tokens choose at {len(choosing)} of {len(halves)} half-steps (first: {NOUNS[first.kind]} of step "
            f"{first.step}, {len(first.reach)} choices, K = {config.modules_per_token}), which no plain GPT-2 can; "
            "use --format mom, or convert with mom.reach=home"
        )
    return halves


def pack(halves: Iterable[HalfStep]) -> tuple[Layer, ...]:
    """The fewest layers that run `halves` in this order; at least one, as a GPT-2 has.

    Each half goes into the last layer if there is room behind what that runs already: no other way needs fewer.
    """
    layers: list[Layer] = []
    for half in halves:
        if half.kind == "mha" and not is_patch(half):
            layers.append(Layer(attention=half))
        elif layers and layers[-1].feed_forward is None:
            layers[-1] = Layer(layers[-1].attention, half)
        else:
            layers.append(Layer(feed_forward=half))
    return tuple(layers) or (Layer(),)
