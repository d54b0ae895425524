"""What the routers did, as sums that add up over micro-batches and processes, and the numbers to show of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ENTROPY, USE = "router_entropy", "use/"


def routing_sums(records: Sequence[Any], router_logits: Sequence[Tensor]) -> dict[str, Tensor]:
    """First choices per routed half-step (M + 1,) and the routers' entropy as [sum, count].

    The logits (n, M + 1) stand in the order of `records`. Nothing is copied from the device.
    """
    sums: dict[str, Tensor] = {}
    for record, logits in zip(records, router_logits, strict=True):
        log_p = logits.detach().float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p.masked_fill(~torch.isfinite(log_p), 0)).sum()
        sums[f"{USE}{record.kind}/{record.step}"] = torch.bincount(record.modules[:, 0], minlength=logits.shape[-1])
        sums[ENTROPY] = sums.get(ENTROPY, 0) + torch.stack([entropy, entropy.new_tensor(len(logits))])
    return sums


def use_shares(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """`use/<kind>/<step>/<module>` shares of the tokens, SKIP by its name; a share of 0 is left out."""
    shares: dict[str, float] = {}
    for name in sorted((n for n in sums if n.startswith(USE)), key=_by_step):
        use = sums[name].tolist()
        labels = [*map(str, range(len(use) - 1)), "skip"]
        shares |= {f"{name}/{label}": n / sum(use) for label, n in zip(labels, use, strict=True) if n}
    return shares


def _by_step(name: str) -> tuple[str, int]:
    _, kind, step = name.split("/")
    return kind, int(step)
