"""What the routers did since the last log: entropy and module use, one number each, from the forward's own record."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RoutingLog:
    """Sums routing records until they are taken; nothing is copied from the device before that."""

    def __init__(self) -> None:
        self._use: dict[tuple[str, int], Tensor] = {}
        self._entropy: list[Tensor] = []

    def add(self, records: Sequence[Any], router_logits: Sequence[Tensor]) -> None:
        """Count the first choices of some routed half-steps; their logits (n, M + 1) stand in the same order."""
        for record, logits in zip(records, router_logits, strict=True):
            logits = logits.detach()
            use = torch.bincount(record.modules[:, 0], minlength=logits.shape[-1])
            key = (record.kind, record.step)
            self._use[key] = self._use[key] + use if key in self._use else use
            log_p = logits.log_softmax(-1)
            self._entropy.append(-(log_p.exp() * log_p.masked_fill(~torch.isfinite(log_p), 0)).sum(-1).mean())

    def take(self) -> dict[str, float]:
        """Mean router entropy (nats) and `use/<kind>/<step>/<module>` shares since the last call, SKIP by its name."""
        if not self._use:
            return {}
        result = {"router_entropy": torch.stack(self._entropy).mean().item()}
        for (kind, step), use in sorted(self._use.items()):
            shares = (use / use.sum()).tolist()
            names = [*map(str, range(len(shares) - 1)), "skip"]
            result.update({f"use/{kind}/{step}/{n}": s for n, s in zip(names, shares, strict=True) if s > 0})
        self._use, self._entropy = {}, []
        return result
