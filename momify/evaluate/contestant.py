"""Who is scored: a model by its role, its weights' hash, and how to load it when its turn comes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from momify.data.blocks import tokenizer_hash


@dataclass(frozen=True)
class Contestant:
    """One model to be scored: its role (source, start, mom, or a name of the user's), its weights, its tokenizer.

    `load` gives a causal language model in float32 that is the caller's to change: each call loads it anew.
    """

    role: str
    sha256: str
    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Hash of all that decides what ids a text gets."""
        return tokenizer_hash(self.tokenizer)
