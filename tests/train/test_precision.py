"""train/precision.py: bfloat16 where the machine computes it, and a word where it only imitates it."""

import io
import time

import pytest
import torch
from rich.console import Console

from momify.conversion import short_training
from momify.pipeline import warn_of_slow_precision
from momify.recipe import parse_recipe
from momify.recipe_blocks import TrainBlock
from momify.screen import Screen
from momify.train import precision
from momify.train.fit import Place, training_arguments
from momify.train.precision import computes_bf16, precision_here, training_device


@pytest.fixture(params=[True, False], ids=["computed", "imitated"])
def computed(request, monkeypatch) -> bool:
    """A processor that computes bfloat16, or does not."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param)
    monkeypatch.setattr(precision, "training_device", lambda: "cpu")
    return request.param


def seconds(dtype: torch.dtype) -> float:
    """CPU seconds of the quickest of five products of two matrices."""
    left, right = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    found = []
    for _ in range(5):
        start = time.process_time()
        left @ right
        found.append(time.process_time() - start)
    return min(found)


def test_what_is_called_computed_is_not_many_times_slower_than_float32():
    slower = seconds(torch.bfloat16) / seconds(torch.float32)
    assert (slower < 3) == computes_bf16("cpu"), f"{slower:.1f} times"  # measured without AVX-512: 12 to 16


@pytest.mark.parametrize("asked", [None, "fp32", "bf16"])
def test_the_machine_decides_where_nothing_is_said(computed, asked, tmp_path):
    settings = TrainBlock(precision=asked)
    wanted = asked or ("bf16" if computed else "fp32")
    assert precision_here(settings) == wanted
    if training_device() == "cpu":
        place = Place(tmp_path, "phase 2", Console(file=io.StringIO()), 0, False, print)
        assert training_arguments(settings, place).bf16 == (wanted == "bf16")


@pytest.mark.parametrize("asked", ["null", "fp32", "bf16"])
def test_trials_on_the_processor_take_bfloat16_only_where_it_is_computed(computed, asked):
    text = f"source: {{model: gpt2}}\nmom: {{mha: 8, ffn: 12}}\ndata: {{train: a.txt}}\ntrain: {{precision: {asked}}}"
    assert short_training(parse_recipe(text, "x"), "trial").bf16 == (computed and asked != "fp32")


@pytest.mark.parametrize("asked", [None, "fp32", "bf16"])
def test_imitated_bfloat16_is_told(computed, asked, monkeypatch):
    monkeypatch.setattr("momify.pipeline.training_device", lambda: "cpu")
    said = io.StringIO()
    warn_of_slow_precision(TrainBlock(precision=asked), Screen(Console(file=said, width=300)))
    assert ("imitates" in said.getvalue()) == (asked == "bf16" and not computed)


def test_an_unknown_accelerator_gets_float32():
    assert not computes_bf16("mps")
