"""Compress a GPT-2-style checkpoint into a Mixture-of-Modules model, with numbers that can be trusted.

`import momify` is cheap and makes model_type "mom" known to transformers' Auto classes: at once where they are loaded
already, else as soon as they are (a post-import hook, so that `momify --help` need not load torch).
"""

import importlib
import sys
from typing import Any

from momify.import_hook import when_imported

_MODEL_NAMES = ("MomConfig", "MomForCausalLM", "MomForSequenceClassification", "MomModel")
_HOOKED = (
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    # what the model imports, and what imports that: where one of these is asked for first
    "transformers.activations",
    "transformers.cache_utils",
    "transformers.configuration_utils",
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.modeling_outputs",
    "transformers.modeling_utils",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.trainer",
)
__all__ = [*_MODEL_NAMES, "MomifyError"]


def _register(loaded: Any) -> None:
    """Import momify.model, which registers itself; later, where transformers is still in the middle of its own imports.

    `from transformers import PreTrainedModel` loads configuration_auto before PreTrainedModel is there: importing the
    model at that moment fails, and fails the user's import with it. The outer module's own hook follows.
    """
    under_way = [name for name in _HOOKED if name != loaded.__name__ and _initializing(name)]
    if not under_way and "momify.model" not in sys.modules:
        importlib.import_module("momify.model")


def _initializing(name: str) -> bool:
    """Whether that module is being imported right now."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


when_imported(_HOOKED, _register)


def __getattr__(name: str) -> Any:
    if name in _MODEL_NAMES:
        return getattr(importlib.import_module("momify.model"), name)
    if name == "MomifyError":
        return importlib.import_module("momify.errors").MomifyError
    raise AttributeError(f"module 'momify' has no attribute '{name}'")
