"""report/make.py: where the two models are measured, and that a conversion is credited with what it removed alone."""

import copy
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from momify.data.blocks import TokenData
from momify.errors import MomifyError
from momify.measure.latency import Timing, measure_latency
from momify.report import make
from momify.report.data import Looks, build_report
from momify.report.make import Pair, command_line, measure_pair, read_report, write_report
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


def test_the_source_as_a_mom_is_the_same_network(pair) -> None:
    ids = torch.randint(0, 61, (2, 16))
    ours, own = pair.whole(input_ids=ids).logits, pair.source(input_ids=ids).logits
    assert (ours - own).abs().max() <= 1e-4
    assert pair.whole.model.mha_router is pair.whole.model.ffn_router is None


def test_who_removes_nothing_saves_nothing(pair, data, parts, monkeypatch) -> None:
    """The MoM's operators are no merit of a conversion: the source is timed and weighed with the same."""
    timed = {}

    def watch(models: dict, *rest: Any) -> Any:
        timed.update(models)
        return measure_latency(models, *rest)

    monkeypatch.setattr(make, "measure_latency", watch)
    report = measured(replace(pair, mom=copy.deepcopy(pair.whole)), data, parts)
    assert report["memory"]["source"]["loads"] == report["memory"]["mom"]["loads"]
    assert timed["source"] is pair.whole
    texts = [line["text"] for line in report["findings"] if line["text"].startswith("Memory at its peak")]
    assert len(texts) == 2
    assert all(": nothing saved, " in text for text in texts)
    norms = 4 * 2 * 2 * 32  # weights and biases of four layers' LayerNorms, which lie in the modules
    totals = [report["parameters"][side]["total"] for side in ("source", "mom")]
    assert totals[0] - totals[1] == norms
    assert report["memory"]["source"]["weight_bytes"] == 4 * totals[0]
    assert report["macs"]["source"]["macs"] == report["macs"]["mom"]["macs"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_speed_and_memory_are_the_gpus_and_all_ways_of_counting_macs_agree_still(pair, data, parts) -> None:
    report = measured(pair, data, parts)
    assert report["speed"]["device"] == torch.cuda.get_device_name()
    assert report["memory"]["method"] == "the CUDA allocator's peak"
    assert pair.whole.device.type == pair.mom.device.type == "cuda"
    assert report["macs"]["source"]["agree"]
    assert report["macs"]["mom"]["agree"]  # counters see nothing of a GPU's kernels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_models_without_room_on_the_gpu_are_measured_on_the_processor(pair, data, parts, monkeypatch) -> None:
    monkeypatch.setattr(make, "ROOM", 1 << 50)
    assert measured(pair, data, parts)["speed"]["device"] == "cpu"


def test_the_command_can_be_pasted(monkeypatch) -> None:
    typed = ["report", "my run", "--data", "it's.txt"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/momify", *typed])
    assert shlex.split(command_line()) == ["momify", *typed]


def test_a_report_is_read_as_it_was_written(parts, tmp_path) -> None:
    report = build_report(**parts)
    write_report(report, tmp_path)
    assert read_report(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "7", "{", '{"provenance": null}', '{"schema_version": 3, "provenance": {}}',
     '{"schema_version": "3", "provenance": {}}', '{"schema_version": 99, "provenance": {}}'],
)  # fmt: skip
def test_what_is_no_report(tmp_path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(MomifyError, match=r"report\.json is no report of momify; momify report makes it anew"):
        read_report(path)


def test_an_older_report_is_one_still(tmp_path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"schema_version": 2, "provenance": {"mom_sha256": "a"}}')
    assert read_report(path)["schema_version"] == 2


@pytest.fixture
def converted(there, momify) -> Path:
    """The folder of a run that removed nothing."""
    assert momify("convert", "src", "--mha", 4, "--ffn", 4, "--calibration", "text.txt", "--name", "c").code == 0
    return there / "runs/c"


def test_a_report_on_other_text_names_it_and_so_does_the_card(there, converted, momify) -> None:
    other = there / "deep/other text.txt"
    other.parent.mkdir()
    other.write_text("Some other text. " * 200)
    told = momify("report", "c", "--data", other, "--limit", 4)
    assert told.code == 0, told.err
    report = json.loads((converted / "report.json").read_text())
    assert report["perplexity"]["text"] == f"text of {other}"
    assert not report["perplexity"]["own_text"]
    assert report["perplexity"]["protocol"].endswith("; text of other text.txt, a part of it alone (limited)")
    assert "(other text)" in report["verdict"]
    assert momify("export", "c").code == 0
    card = (converted / "export/README.md").read_text()
    assert "text of other text.txt" in card
    assert "held-out" not in card
    assert str(there) not in card
    (converted / "report.json").write_text("[]")
    told = momify("export", "c")
    assert (told.code, told.err.count("\n")) == (2, 1), told.err
    assert "is no report of momify" in told.err


def test_models_that_read_other_tokens_are_not_set_side_by_side(converted, momify) -> None:
    path = converted / "model/tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(found))
    told = momify("report", "c", "--limit", 2)
    assert (told.code, told.err.count("\n")) == (2, 1), told.err
    assert "tokenizer and its source's differ" in told.err
