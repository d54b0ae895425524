"""Compress a GPT-2-style checkpoint into a Mixture-of-Modules model, with numbers that can be trusted.

`import momify` is cheap and makes model_type "mom" known to transformers' Auto classes: at once where they are loaded
already, else as soon as they are (a post-import hook, so that `momify --help` need not load torch).
"""

import importlib
import sys
from typing import Any

from wrapt import when_imported

_MODEL_NAMES = ("MomConfig", "MomForCausalLM", "MomForSequenceClassification", "MomModel")
__all__ = [*_MODEL_NAMES, "MomifyError"]


@when_imported("transformers.models.auto.configuration_auto")
@when_imported("transformers.models.auto.modeling_auto")
def _register(auto: Any) -> None:
    if "momify.model" not in sys.modules:  # while it is being imported, it registers itself at its end
        importlib.import_module("momify.model")


def __getattr__(name: str) -> Any:
    if name in _MODEL_NAMES:
        return getattr(importlib.import_module("momify.model"), name)
    if name == "MomifyError":
        return importlib.import_module("momify.errors").MomifyError
    raise AttributeError(f"module 'momify' has no attribute '{name}'")
