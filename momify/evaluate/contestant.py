"""Who is scored: a model by its role, its weights' hash, and how to load it when its turn comes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from momify.data.blocks import tokenizer_hash
from momify.errors import MomifyError
from momify.files import read_json


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

    @cached_property
    def positions(self) -> int | None:
        """The model's positions, by the config.json beside its tokenizer, so that no weights need be loaded.

        None where that does not tell; what is wrong with it is found, and said, when the model is loaded.
        """
        if not self.tokenizer.name_or_path:  # it comes from no folder
            return None
        try:
            config = read_json(Path(self.tokenizer.name_or_path) / "config.json")
        except MomifyError:
            return None
        found = config.get("n_positions", config.get("max_position_embeddings")) if isinstance(config, dict) else None
        return found if isinstance(found, int) else None
