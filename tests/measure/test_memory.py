"""Bytes against what safetensors and a real cache hold, and closed forms against what was alive."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import GPT2LMHeadModel, PreTrainedModel

from momify.convert.source import open_source
from momify.measure.activations import Call, activation_bytes
from momify.measure.cost import planned_usage
from momify.measure.memory import Load, measure_memory
from momify.model import MomForCausalLM
from momify.model.cache import ROOM
from momify.pipeline import whole_mom

MakeGpt2 = Callable[..., GPT2LMHeadModel]
MakeMom = Callable[..., MomForCausalLM]


def prompts(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randint(0, 61, shape) for shape in shapes]


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
        assert found.loads == ()
        for load in measure_memory(model, prompts((1, 5))).loads:
            assert load.weights.measured == load.weights.formula == found.weight_bytes


def test_dense_cache(make_gpt2: MakeGpt2) -> None:
    found = measure_memory(make_gpt2(), prompts((3, 9)))
    assert found.kv_bytes_per_token == found.kv_bytes_per_token_measured == 4 * 2 * 32 * 4
    assert found.kv_steps == 4
    half = measure_memory(make_gpt2().to(torch.bfloat16), prompts((3, 9)))
    assert half.kv_bytes_per_token == half.kv_bytes_per_token_measured == 4 * 2 * 32 * 2


NO_ATTENTION = {"mha_homes": [3] * 4, "mha_reach": [[3]] * 4}


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
        (NO_ATTENTION, 0, 8),
    ],
)
def test_mom_cache(make_mom: MakeMom, changes: dict, steps: int, extra: int) -> None:
    found = measure_memory(make_mom(**changes), prompts((3, 9)))
    assert found.kv_steps == steps
    assert found.kv_bytes_per_token == steps * 2 * 32 * 4
    assert found.kv_bytes_per_token_measured == found.kv_bytes_per_token + extra
    prompt, decode = found.loads
    assert prompt.kv.measured == 27 * found.kv_bytes_per_token_measured
    room = 3 * ROOM * steps * 2 * 32 * 4  # a MoM's cache grows in pieces
    assert decode.kv.measured == 30 * found.kv_bytes_per_token_measured + room


SHAPES = ((1, 40), (8, 40))  # a whole number of cache lines each


def check(loads: tuple[Load, ...], tolerance: float) -> None:
    """Formula and measurement of each load, prompt and decode, small and large."""
    assert [(load.phase, load.batch, load.tokens) for load in loads] == [
        (phase, *shape) for shape in SHAPES for phase in ("prompt", "decode")
    ]
    for load in loads:
        assert load.activations.formula == pytest.approx(load.activations.measured, rel=tolerance), load
        assert load.total.measured == load.weights.measured + load.kv.measured + load.activations.measured


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_inner": 8}, {"activation_function": "gelu"}, {"activation_function": "quick_gelu"},
     {"tie_word_embeddings": False}],
    ids=str,
)  # fmt: skip
def test_activations_of_a_source(make_gpt2: MakeGpt2, changes: dict, tmp_path: Path) -> None:
    """A source runs as a MoM that leaves nothing out: the formula of its own config has what is alive then."""
    make_gpt2(**changes).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    loads = measure_memory(whole_mom(source), prompts(*SHAPES)).loads
    check(loads, 0.005)
    for load in loads:
        past = load.tokens if load.phase == "decode" else 0
        call = Call(load.batch, 1 if past else load.tokens, past)
        usage = planned_usage(source.config, 1, call.rows)
        assert activation_bytes(source.config, usage, call) == load.activations.formula


FIXED = {"mha_homes": [0, 3, 1, 2], "mha_reach": [[0], [3], [1], [2]], "ffn_homes": [0, 1, 4, 3],
         "ffn_reach": [[0], [1], [4], [3]]}  # fmt: skip
SHARED = {"mha_homes": [1, 3, 1, 3], "mha_reach": [[1], [3], [1], [3]], "ffn_homes": [0, 4, 0, 4],
          "ffn_reach": [[0], [4], [0], [4]]}  # fmt: skip
PATCHES_ONLY = {"mha_homes": [3] * 4, "mha_reach": [[3]] * 4, "ffn_homes": [4] * 4, "ffn_reach": [[4]] * 4,
                "patch_rank": 16}  # fmt: skip
LATE_ATTENTION = {  # the peak comes before the cache is full
    "mha_homes": [3, 3, 3, 0], "mha_reach": [[3], [3], [3], [0]], "intermediate_size": 256,
    "ffn_homes": [0, 1, 2, 4], "ffn_reach": [[0], [1], [2], [4]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        (FIXED, 0.005),
        ({**FIXED, "patch_rank": 4}, 0.005),
        ({**SHARED, "patch_rank": 4, "step_rank": 6}, 0.005),
        (LATE_ATTENTION, 0.03),
        (NO_ATTENTION, 0.12),
        (PATCHES_ONLY, 0.005),
        ({"patch_rank": 16, "intermediate_size": 8}, 0.12),
        ({}, 0.12),
        ({"intermediate_size": 8}, 0.12),
        ({"modules_per_token": 2}, 0.12),
        ({"skipped_keys": "masked"}, 0.2),  # the masks, one bool for each pair of tokens, are not in the formula
    ],
    ids=str,
)
def test_activations_of_a_mom(make_mom: MakeMom, changes: dict, tolerance: float) -> None:
    check(measure_memory(make_mom(**changes), prompts(*SHAPES)).loads, tolerance)


def test_what_a_module_less_saves(make_gpt2: MakeGpt2, make_mom: MakeMom) -> None:
    """The point of it all, in bytes that were really alive: fewer attention steps, less cache; same activations."""
    dense = measure_memory(make_gpt2(n_inner=96), prompts((8, 40))).loads[0]
    mom = measure_memory(make_mom(**FIXED), prompts((8, 40))).loads[0]
    assert mom.kv.measured == dense.kv.measured * 3 // 4
    assert mom.weights.measured < dense.weights.measured


def test_a_prompt_as_long_as_the_positions_leaves_one_for_the_next_token(make_mom: MakeMom) -> None:
    assert [load.tokens for load in measure_memory(make_mom(), prompts((1, 48))).loads] == [47, 47]


def test_measuring_leaves_the_model_as_it_was(make_mom: MakeMom) -> None:
    model: PreTrainedModel = make_mom(router_explore=0.5).train()
    first, second = (measure_memory(model, prompts((2, 9))).loads for _ in range(2))
    assert model.training
    assert [load.kv for load in first] == [load.kv for load in second]


@pytest.mark.gpu
def test_the_cuda_allocator(make_gpt2: MakeGpt2) -> None:
    found = measure_memory(make_gpt2().to("cuda"), [ids.cuda() for ids in prompts((8, 40))])
    assert found.method == "the CUDA allocator's peak"
    for load in found.loads:
        assert load.activations.measured >= 0.8 * load.activations.formula
