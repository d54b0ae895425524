"""Tiny MoM models whose routers really choose."""

from collections.abc import Callable

import pytest
import torch

from momify.model import MomConfig, MomForCausalLM


def tiny_mom(**changes: object) -> MomForCausalLM:
    """A random MoM (3 + 4 modules, 4 steps, width 32, 61 tokens) with routers that depend on the token."""
    settings: dict = {
        "vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4,
        "intermediate_size": 96, "num_mha_modules": 3, "num_ffn_modules": 4, "num_steps": 4,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model = MomForCausalLM(MomConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_(std=0.5)
            elif "wte" not in name and "ln_f" not in name:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def make_mom() -> Callable[..., MomForCausalLM]:
    """`tiny_mom`, for tests that vary the config."""
    return tiny_mom
