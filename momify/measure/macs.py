"""MACs three ways on the same input: closed form as routed, fvcore, torch (design section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import torch
from torch import Tensor
from transformers import PreTrainedModel

from momify.measure.cost import Macs, dense_macs, mom_macs
from momify.measure.flops import Count, count_fvcore, count_torch
from momify.measure.mode import evaluating
from momify.measure.routing import realised

AGREEMENT = 0.01  # design section 4


@dataclass(frozen=True)
class Range:
    """Counts of `inputs` inputs: mean, least, most, and standard deviation."""

    inputs: int
    mean: float
    low: float
    high: float
    deviation: float

    @classmethod
    def of(cls, counts: Sequence[float]) -> "Range":
        """Of at least one count."""
        return cls(len(counts), fmean(counts), min(counts), max(counts), pstdev(counts))


@dataclass(frozen=True)
class MacCounts:
    """MACs of one forward pass on each of several inputs of one shape.

    `closed` has an entry per input; `fvcore` and `torch` are as long as each other, for the first inputs: a dense
    model's count is the same for all, a MoM's is not.
    """

    batch: int
    tokens: int
    closed: tuple[Macs, ...]
    fvcore: tuple[Count, ...]
    torch: tuple[Count, ...]

    @property
    def mean(self) -> Macs:
        """The closed form by part, averaged over the inputs."""
        parts = [macs.parts() for macs in self.closed]
        return Macs(**{name: fmean(part[name] for part in parts) for name in parts[0]})

    def ways(self) -> dict[str, Range]:
        """Mean and spread of each way of counting; the spread is the text's, as routing depends on it."""
        closed = [macs.total for macs in self.closed]
        found = {"closed_form": closed, "fvcore": [c.macs for c in self.fvcore], "torch": [c.macs for c in self.torch]}
        return {name: Range.of(counts) for name, counts in found.items() if counts}

    @property
    def largest_difference(self) -> float:
        """Of the three counts of one input, the widest gap relative to the closed form."""
        triples = zip(self.closed, self.fvcore, self.torch, strict=False)
        return max(
            (abs(other.macs - closed.total) / closed.total for closed, *others in triples for other in others),
            default=0.0,
        )

    @property
    def agree(self) -> bool:
        """Whether the counters were asked, found nothing unknown, and lie within 1% of the closed form."""
        unknown = any(count.unknown for count in self.fvcore)
        return bool(self.fvcore) and not unknown and self.largest_difference <= AGREEMENT


def count_macs(model: PreTrainedModel, inputs: Sequence[Tensor], counted: int | None = None) -> MacCounts:
    """Count each of `inputs` (B, T), all of one shape; the counters see the first `counted` (None: all)."""
    inputs = [ids.to(model.device) for ids in inputs]
    batch, tokens = inputs[0].shape
    some = inputs[:counted]
    return MacCounts(
        batch=batch,
        tokens=tokens,
        closed=tuple(closed_form(model, ids) for ids in inputs),
        fvcore=tuple(count_fvcore(model, ids) for ids in some),
        torch=tuple(count_torch(model, ids) for ids in some),
    )


def closed_form(model: PreTrainedModel, input_ids: Tensor) -> Macs:
    """The closed form for `input_ids` (B, T): a MoM runs once to see its routing, a dense model does not."""
    batch, tokens = input_ids.shape
    if model.config.model_type == "gpt2":
        return dense_macs(model.config, batch, tokens)
    with evaluating(model), torch.no_grad():
        out = model(input_ids=input_ids, use_cache=False, output_router_logits=True)
    return mom_macs(model.config, batch, tokens, realised(out.routing, batch * tokens))
