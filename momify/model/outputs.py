"""What a forward pass returns: transformers' usual fields, the routers' logits, a record of the routing."""

from dataclasses import dataclass, fields

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from .config import Kind

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What transformers calls the key-value cache in a call and its output: `cache` from 5.24 on."""


@dataclass(frozen=True)
class RoutingRecord:
    """What happened in one executed half-step, over the n = B*T tokens of a call (padding included)."""

    step: int
    kind: Kind
    modules: Tensor  # (n, K) int64, M for SKIP
    gates: Tensor  # (n, K), detached
    routed: bool
    """Whether there was a choice; the routed records stand in the order of `router_logits`."""
    skip: int
    """The entry of modules that stands for SKIP: M."""
    keeps_keys: bool
    """Whether the home module makes key and value of tokens that skip."""
    attended: bool
    """Whether the attention core ran (for all tokens, once one needs it); False for a feed-forward half."""
    patched: bool = False
    """Whether SKIP adds this step's patch; the record may then be of a half-step whose only choice is SKIP."""

    @property
    def rows(self) -> int:
        """Module applications: entries of modules that are not SKIP. (Waits for the device, as key_rows does.)"""
        return int((self.modules != self.skip).sum())

    @property
    def key_rows(self) -> int:
        """Tokens whose key and value the home module made as they skip or explore SKIP (2 D^2 MACs each)."""
        return int(((self.modules == self.skip) & (self.gates > 0)).sum()) if self.keeps_keys else 0

    @property
    def patch_rows(self) -> int:
        """Tokens with a share of SKIP, which the step's patch was computed for (2 D r MACs each); 0 without a patch."""
        return int(((self.modules == self.skip) & (self.gates > 0)).any(dim=1).sum()) if self.patched else 0


@dataclass
class MomModelOutput(BaseModelOutputWithPast):
    """Output of MomModel: transformers' fields, and the routing; see MomCausalLMOutput for the shapes."""

    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingRecord, ...] | None = None


@dataclass
class MomCausalLMOutput(CausalLMOutputWithPast):
    """Output of MomForCausalLM.

    Of transformers' fields: loss (), logits (B, T or what logits_to_keep leaves, vocabulary), hidden_states H + 1 times
    (B, T, D) before each step and after ln_f, attentions (B, N, T, S) per attention half-step, None where no token
    attended (all skipped).
    """

    router_logits: tuple[Tensor, ...] | None = None  # (n, M+1) per routed half-step, in execution order
    routing: tuple[RoutingRecord, ...] | None = None  # one record per executed half-step, in execution order
    loss_parts: Tensor | None = None  # what `head_loss` gives beside the loss


@dataclass
class MomClassifierOutput(SequenceClassifierOutputWithPast):
    """Output of MomForSequenceClassification: logits (B, labels); see MomCausalLMOutput for the other shapes."""

    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingRecord, ...] | None = None
