"""Bytes against what safetensors and a real cache hold."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import GPT2LMHeadModel

from momify.measure.memory import measure_memory
from momify.model import MomForCausalLM

MakeGpt2 = Callable[..., GPT2LMHeadModel]
MakeMom = Callable[..., MomForCausalLM]


def bytes_on_disk(folder: Path) -> int:
    """Tensor bytes of model.safetensors, the header not counted."""
    size = {"F32": 4, "BF16": 2}
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a dict)
        return sum(torch.Size(s.get_shape()).numel() * size[s.get_dtype()] for s in slices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_what_the_file_holds(
    make_gpt2: MakeGpt2, make_mom: MakeMom, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    for model in (
        make_gpt2(tie_word_embeddings=tied).to(dtype),
        make_mom(tie_word_embeddings=tied).to(dtype),
    ):
        model.save_pretrained(tmp_path)
        found = measure_memory(model)
        assert found.weight_bytes == bytes_on_disk(tmp_path)
        assert found.dtype == str(dtype).removeprefix("torch.")
        assert found.kv_bytes_per_token_measured is None


def test_dense_cache(make_gpt2: MakeGpt2) -> None:
    found = measure_memory(make_gpt2(), torch.randint(0, 61, (3, 9)))
    assert found.kv_bytes_per_token == found.kv_bytes_per_token_measured == 4 * 2 * 32 * 4
    assert found.kv_steps == 4
    half = measure_memory(make_gpt2().to(torch.bfloat16), torch.randint(0, 61, (3, 9)))
    assert half.kv_bytes_per_token == half.kv_bytes_per_token_measured == 4 * 2 * 32 * 2


@pytest.mark.parametrize(
    ("changes", "steps", "extra"),
    [
        ({}, 4, 0),
        ({"mha_homes": [0, 3, 1, 3], "mha_reach": [[0], [3], [0, 1, 3], [3]]}, 2, 0),
        # a byte a token says for each step where tokens can skip which of them are masked
        ({"skipped_keys": "masked"}, 4, 4),
        (
            {"mha_homes": [0, 1, 1, 1], "mha_reach": [[0], [1, 2], [1], [1, 3]], "skipped_keys": "masked"},
            4,
            1,
        ),
        # without attention two numbers a token keep the length
        ({"mha_homes": [3] * 4, "mha_reach": [[3]] * 4}, 0, 8),
    ],
)
def test_mom_cache(make_mom: MakeMom, changes: dict, steps: int, extra: int) -> None:
    found = measure_memory(make_mom(**changes), torch.randint(0, 61, (3, 9)))
    assert found.kv_steps == steps
    assert found.kv_bytes_per_token == steps * 2 * 32 * 4
    assert found.kv_bytes_per_token_measured == found.kv_bytes_per_token + extra
