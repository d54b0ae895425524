"""What a MoM costs once it is written as a GPT-2: the numbers, and the sentences for the screen and the card."""

from dataclasses import dataclass

from transformers import GPT2Config

from momify.amounts import amount, size
from momify.export.packing import Layer, is_patch
from momify.measure.cost import dense_macs, kv_bytes_per_token, mom_macs, parameters, planned_usage
from momify.model import HalfStep, MomConfig


@dataclass(frozen=True)
class Written:
    """A MoM without choices and the GPT-2 that it is written as; MACs of one sequence of all positions."""

    mom: MomConfig
    gpt2: GPT2Config
    layers: tuple[Layer, ...]
    source_layers: int | None = None
    """Layers of the GPT-2 that the MoM was made from, where that is known."""

    @property
    def source(self) -> GPT2Config | None:
        """The shape of the GPT-2 that the MoM was made from."""
        return self.source_layers and GPT2Config(**{**self.gpt2.to_dict(), "n_layer": self.source_layers})

    @property
    def halves(self) -> list[HalfStep]:
        """All that is run, in order."""
        return [half for layer in self.layers for half in layer.halves]

    @property
    def written_again(self) -> int:
        """Halves whose module an earlier half has already."""
        modules = [(half.kind, half.home) for half in self.halves if not is_patch(half)]
        return len(modules) - len(set(modules))

    @property
    def without_attention(self) -> int:
        """Layers whose attention is zeros."""
        return sum(layer.attention is None for layer in self.layers)

    @property
    def without_feed_forward(self) -> int:
        """Layers whose feed-forward is zeros."""
        return sum(layer.feed_forward is None for layer in self.layers)

    @property
    def macs(self) -> tuple[float, float]:
        """Multiply-adds of the MoM and of the GPT-2."""
        return _macs(self.mom, self.mom.n_positions), _macs(self.gpt2, self.mom.n_positions)

    @property
    def idle_macs(self) -> float:
        """Multiply-adds that the GPT-2 spends on halves of zeros."""
        macs, layers = dense_macs(self.gpt2, 1, self.mom.n_positions), len(self.layers)
        attention = (macs.projections + macs.attention) / layers
        return self.without_attention * attention + self.without_feed_forward * macs.ffn / layers

    @property
    def idle_cache(self) -> float:
        """Bytes of KV cache, per token in 16 bit, that the GPT-2 keeps for attentions of zeros."""
        return kv_bytes_per_token(self.gpt2) * self.without_attention / len(self.layers)

    def head(self) -> list[str]:
        """What the columns of `rows` are."""
        return ["", *(["source"] if self.source else []), "MoM", "GPT-2"]

    def rows(self) -> list[list[str]]:
        """What it costs as the source, where that is known, as a MoM, and as a GPT-2."""
        configs = [config for config in (self.source, self.mom, self.gpt2) if config]
        length = self.mom.n_positions
        return [
            ["parameters", *(amount(parameters(config).total) for config in configs)],
            [f"MACs, {length} tokens", *(amount(_macs(config, length)) for config in configs)],
            ["KV cache per token, 16 bit", *(size(kv_bytes_per_token(config)) for config in configs)],
        ]

    def changes(self) -> str:
        """The rows as one line."""
        _, *names = self.head()
        rows = [(what, ", ".join(map(" ".join, zip(names, numbers, strict=True)))) for what, *numbers in self.rows()]
        return "; ".join(f"{what}: {each}" for what, each in rows)

    def lines(self) -> list[str]:
        """Sentences: what it came to, and which part of that no half-step of the MoM asked for."""
        lines = [self._packed(), *self._zeros()]
        if again := self.written_again:
            lines.append(f"{again} halves run a module that an earlier one has: it is written again for each")
        if patches := sum(map(is_patch, self.halves)):
            rank = self.mom.patch_rank
            lines.append(f"{patches} patches of rank {rank} are feed-forward halves: each costs as much as a module")
        if self.source and self.macs[1] >= _macs(self.source, self.mom.n_positions):
            lines.append("as a plain GPT-2 it computes no less than its source did: --format mom keeps what was saved")
        return lines

    def _packed(self) -> str:
        attention = len(self.layers) - self.without_attention
        ran = f"{attention} attention and {len(self.halves) - attention} feed-forward halves"
        return f"{len(self.layers)} GPT-2 layers run {ran}, with the MoM's logits"

    def _zeros(self) -> list[str]:
        missing = (("attention", self.without_attention), ("feed-forward", self.without_feed_forward))
        empty = " and ".join(f"{count} {kind}" for kind, count in missing if count)
        if not empty:
            return []
        total, cache = self.macs[1], kv_bytes_per_token(self.gpt2)
        return [
            f"{empty} halves are zeros, which add nothing and are computed all the same: {amount(self.idle_macs)} of "
            f"the {amount(total)} MACs, {size(self.idle_cache)} of the {size(cache)} of KV cache"
        ]


def _macs(config: MomConfig | GPT2Config, tokens: int) -> float:
    """Multiply-adds of one sequence; `planned_usage` is exact where nothing chooses."""
    return mom_macs(config, 1, tokens, planned_usage(config, 1, tokens)).total
