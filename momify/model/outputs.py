"""What a forward pass returns: transformers' usual fields, the routers' logits, a record of the routing."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .config import Kind


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

    @property
    def rows(self) -> int:
        """Module applications: entries of modules that are not SKIP. (Waits for the device, as key_rows does.)"""
        return int((self.modules != self.skip).sum())

    @property
    def key_rows(self) -> int:
        """Tokens whose key and value the home module made as they skip or explore SKIP (2 D^2 MACs each)."""
        return int(((self.modules == self.skip) & (self.gates > 0)).sum()) if self.keeps_keys else 0


@dataclass
class MomModelOutput(ModelOutput):
    """Output of MomModel; see MomCausalLMOutput for the shapes."""

    last_hidden_state: Tensor | None = None  # (B, T, D)
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingRecord, ...] | None = None


@dataclass
class MomCausalLMOutput(ModelOutput):
    """Output of MomForCausalLM."""

    loss: Tensor | None = None  # ()
    logits: Tensor | None = None  # (B, T or what logits_to_keep leaves, vocabulary)
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # H + 1 times (B, T, D): before each step, and after ln_f
    attentions: tuple[Tensor, ...] | None = None  # (B, N, T, S) per attention half-step
    router_logits: tuple[Tensor, ...] | None = None  # (n, M+1) per routed half-step, in execution order
    routing: tuple[RoutingRecord, ...] | None = None  # one record per executed half-step, in execution order
    loss_parts: Tensor | None = None  # what `head_loss` gives beside the loss


@dataclass
class MomClassifierOutput(ModelOutput):
    """Output of MomForSequenceClassification; see MomCausalLMOutput for the shapes."""

    loss: Tensor | None = None  # ()
    logits: Tensor | None = None  # (B, labels)
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingRecord, ...] | None = None
