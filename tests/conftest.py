"""Fixtures for the whole suite: tiny models, fixed seeds, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, at import of huggingface_hub

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def tiny_gpt2(**changes: object) -> GPT2LMHeadModel:
    """A random GPT-2 (4 layers, width 32, 61 tokens) with parameters large enough to tell layers apart."""
    settings: dict = {
        "vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 4, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model = GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "ln_" in name:
                parameter.normal_(mean=1.0, std=0.2)
            elif "wte" not in name and "wpe" not in name:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def make_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """`tiny_gpt2`, for tests that vary the config."""
    return tiny_gpt2


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data beside the checkout; a test that needs it skips where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not here")
    return SHARED / "data"
