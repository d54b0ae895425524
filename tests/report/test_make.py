"""report/make.py: where the two models are measured."""

from typing import Any

import numpy as np
import pytest
import torch

from momify.data.blocks import TokenData
from momify.measure.latency import Timing
from momify.report import make
from momify.report.data import Looks
from momify.report.make import Pair, measure_pair
from momify.report.provenance import Origin

USUAL = (make.INPUTS, make.SAME, make.LARGE, Timing(1).rounds, Timing(1).warmup)  # before tests shorten them


def test_reports_measure_as_much_as_the_docs_say() -> None:
    assert USUAL == (32, 2, 8, 5, 1)


@pytest.fixture
def data() -> TokenData:
    """Five blocks of random tokens."""
    tokens = np.random.default_rng(0).integers(0, 61, 5 * 16).astype(np.uint16)
    return TokenData(tokens, tokens, 16, "text")


def measured(pair: Pair, data: TokenData, parts: dict[str, Any]) -> dict[str, Any]:
    origin = Origin("source", "a", 0, {}, "momify report", "b")
    return measure_pair(pair, data, parts["quality"], origin, Looks(), lambda done, total: None)


def test_a_machine_without_a_gpu_measures_all_on_its_processor(pair, data, parts, monkeypatch) -> None:
    monkeypatch.setattr(make, "INPUTS", 4)
    monkeypatch.setattr(make, "LARGE", 3)
    report = measured(pair, data, parts)
    assert report["speed"]["device"] == "cpu"
    assert [run["batch"] for run in report["speed"]["runs"]] == [1, make.LARGE]
    assert [report["macs"][side]["ways"]["fvcore"]["inputs"] for side in ("source", "mom")] == [make.SAME, make.INPUTS]
    assert "operator by operator" in report["memory"]["method"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_speed_and_memory_are_the_gpus_and_all_ways_of_counting_macs_agree_still(pair, data, parts) -> None:
    report = measured(pair, data, parts)
    assert report["speed"]["device"] == torch.cuda.get_device_name()
    assert report["memory"]["method"] == "the CUDA allocator's peak"
    assert pair.source.device.type == pair.mom.device.type == "cuda"
    assert report["macs"]["source"]["agree"]
    assert report["macs"]["mom"]["agree"]  # counters see nothing of a GPU's kernels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_models_without_room_on_the_gpu_are_measured_on_the_processor(pair, data, parts, monkeypatch) -> None:
    monkeypatch.setattr(make, "ROOM", 1 << 50)
    assert measured(pair, data, parts)["speed"]["device"] == "cpu"
