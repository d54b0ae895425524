"""train/precision.py: bfloat16 where the machine computes it, and a word where it only imitates it."""

import io
import time

import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments

from momify.conversion import short_training
from momify.devices import best_device
from momify.pipeline import say_where, warn_of_slow_precision
from momify.recipe import parse_recipe
from momify.recipe_blocks import TrainBlock
from momify.screen import Screen
from momify.train import precision
from momify.train.fit import Place, training_arguments
from momify.train.precision import computes_bf16, precision_here


@pytest.fixture(params=[True, False], ids=["computed", "imitated"])
def computed(request, monkeypatch) -> bool:
    """A processor that computes bfloat16, or does not."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param)
    monkeypatch.setattr(precision, "best_device", lambda: torch.device("cpu"))
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
    if best_device().type == "cpu":
        place = Place(tmp_path, "phase 2", Console(file=io.StringIO()), 0, False, print)
        assert training_arguments(settings, place).bf16 == (wanted == "bf16")


@pytest.mark.parametrize("asked", ["null", "fp32", "bf16"])
def test_trials_on_the_processor_take_bfloat16_only_where_it_is_computed(computed, asked):
    text = f"source: {{model: gpt2}}\nmom: {{mha: 8, ffn: 12}}\ndata: {{train: a.txt}}\ntrain: {{precision: {asked}}}"
    assert short_training(parse_recipe(text, "x"), "trial", torch.device("cpu")).bf16 == (computed and asked != "fp32")


@pytest.mark.parametrize("asked", [None, "fp32", "bf16"])
def test_imitated_bfloat16_is_told(computed, asked, monkeypatch):
    monkeypatch.setattr("momify.pipeline.best_device", lambda: torch.device("cpu"))
    said = io.StringIO()
    warn_of_slow_precision(TrainBlock(precision=asked), Screen(Console(file=said, width=300)))
    assert ("imitates" in said.getvalue()) == (asked == "bf16" and not computed)


def test_an_unknown_accelerator_gets_float32():
    assert not computes_bf16("mps")


class SeenByEight(TrainingArguments):
    """Arguments on a machine of eight GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 8


def test_one_process_takes_one_gpu(monkeypatch, tmp_path) -> None:
    """Several would be nn.DataParallel: another model than is trained here, and eight batches a step."""
    monkeypatch.setattr("momify.train.fit.TrainingArguments", SeenByEight)
    place = Place(tmp_path, "phase 2", Console(file=io.StringIO()), 0, False, print)
    assert training_arguments(TrainBlock(batch_size=4), place).train_batch_size == 4


@pytest.mark.parametrize(("gpus", "told"), [(0, False), (1, False), (8, True)])
def test_gpus_that_stay_idle_are_told(gpus, told, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    said = io.StringIO()
    say_where(TrainBlock(precision="fp32"), Screen(Console(file=said, width=300)))
    assert ("torchrun --nproc-per-node 8" in said.getvalue()) == told
