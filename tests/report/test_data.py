"""report.json: its numbers against the models themselves, plain JSON, and refusal of unlike sides."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from momify.files import write_json
from momify.model.cache import ROOM
from momify.report.data import build_report
from momify.report.markdown import render_markdown
from momify.report.words import verdict

Parts = dict[str, Any]
SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "report-schema.md"


def test_numbers_by_hand(parts: Parts) -> None:
    """Dense: D 32, I 128, V 61, 48 positions, 4 layers, T 12; MoM: 2 + 3 modules, attention in 2 steps."""
    report = build_report(**parts)
    assert report["schema_version"] == 3
    attention, ffn, rest = 4 * 32 * 32 + 4 * 32, 2 * 32 * 128 + 128 + 32, (61 + 48) * 32 + 64
    routers = 33 * 3 + 2 * 33 * 4
    patches, deltas = 5 * (2 * 32 * 2 + 32), 2 * 3 * (32 + 128) + 128 + 32
    assert report["parameters"]["source"]["total"] == 4 * (attention + ffn + 4 * 32) + rest
    assert report["parameters"]["mom"]["total"] == 2 * attention + 3 * ffn + rest + routers + patches + deltas
    assert report["parameters"]["mom"]["patches"] == patches
    assert report["parameters"]["mom"]["deltas"] == deltas
    dense = 12 * (4 * (4 * 32 * 32 + 2 * 12 * 32 + 2 * 32 * 128) + 32 * 61)
    assert report["macs"]["source"]["macs"] == dense
    assert report["macs"]["source"]["flops"] == 2 * dense
    same = {"mean": dense, "low": dense, "high": dense, "deviation": 0}
    assert report["macs"]["source"]["ways"] == {
        "closed_form": {"inputs": 3, **same},
        "fvcore": {"inputs": 2, **same},
        "torch": {"inputs": 2, **same},
    }
    assert report["macs"]["inputs"] == 3
    assert report["macs"]["mom"]["agree"]
    assert report["macs"]["mom"]["parts"]["deltas"] == 12 * 2 * 3 * (32 + 128)
    skipping = 2 * 12 + sum(12 * half["skip_share"] for half in report["routing"]["steps"] if half["choices"] > 1)
    assert report["macs"]["mom"]["parts"]["patches"] == pytest.approx(skipping * 2 * 32 * 2)
    assert [(half["step"], half["kind"]) for half in report["routing"]["steps"] if half["patched"]] == [
        (1, "mha"), (1, "ffn"), (2, "mha"), (3, "mha"), (3, "ffn"),
    ]  # fmt: skip
    routed = report["macs"]["mom"]["ways"]["closed_form"]
    assert routed["low"] <= report["macs"]["mom"]["macs"] == routed["mean"] <= routed["high"]
    assert sum(report["macs"]["mom"]["parts"].values()) == pytest.approx(report["macs"]["mom"]["macs"])
    memory = report["memory"]
    assert (memory["source"]["kv_bytes_per_token"], memory["mom"]["kv_bytes_per_token"]) == (4 * 256, 2 * 256)
    assert memory["mom"]["kv_bytes_per_token_measured"] == 2 * 256
    assert memory["mom"]["kv_steps"] == 2
    loads = memory["mom"]["loads"]
    assert [(load["phase"], load["batch"], load["tokens"]) for load in loads] == [
        ("prompt", 1, 12), ("decode", 1, 12), ("prompt", 3, 12), ("decode", 3, 12),
    ]  # fmt: skip
    assert loads[2]["kv"] == {"measured": 3 * 12 * 512, "formula": 3 * 12 * 512}
    assert loads[3]["kv"] == {"measured": 3 * (13 + ROOM) * 512, "formula": 3 * 13 * 512}
    assert loads[3]["total"]["measured"] == sum(loads[3][part]["measured"] for part in ("weights", "kv", "activations"))
    assert memory["mom"]["weight_bytes"] == 4 * report["parameters"]["mom"]["total"]
    assert [report["perplexity"][key]["perplexity"] for key in ("source", "mom_start", "mom_trained")] == [12, 15, 12.6]
    assert [(run["batch"], run["protocol"][:7]) for run in report["speed"]["runs"]] == [(1, "batch 1"), (3, "batch 3")]
    speed = report["speed"]["runs"][1]
    assert speed["decode_ratio"] == speed["mom"]["decode"]["median"] / speed["source"]["decode"]["median"]
    assert len(report["routing"]["steps"]) == 8
    assert report["verdict"] == verdict(report)


def test_it_is_json_as_it_stands(parts: Parts, tmp_path: Path) -> None:
    report = build_report(**parts)
    write_json(tmp_path / "report.json", report)  # refuses NaN and infinity
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_what_is_not_finite_becomes_null(parts: Parts, tmp_path: Path) -> None:
    start = replace(parts["quality"].start, perplexity=math.inf, loss=math.nan)
    report = build_report(**{**parts, "quality": replace(parts["quality"], start=start, trained=None)})
    write_json(tmp_path / "report.json", report)
    assert report["perplexity"]["mom_start"]["perplexity"] is None
    assert report["perplexity"]["mom_start"]["loss"] is None
    assert report["perplexity"]["mom_trained"] is None


def test_what_was_not_measured_is_null(parts: Parts) -> None:
    report = build_report(parts["source"], parts["mom"], parts["quality"], parts["provenance"])
    assert report["speed"] is None
    assert report["training"] is None
    assert report["tasks"] is None
    assert report["routing"] is None


def test_sides_that_were_not_measured_alike(parts: Parts) -> None:
    mom, quality = parts["mom"], parts["quality"]
    unlike = [
        ({"mom": replace(mom, memory=replace(mom.memory, dtype="bfloat16"))}, "dtype is float32"),
        ({"mom": replace(mom, macs=replace(mom.macs, tokens=13))}, "MAC input"),
        ({"mom": replace(mom, memory=replace(mom.memory, loads=mom.memory.loads[:2]))}, "memory input"),
        ({"quality": replace(quality, start=replace(quality.start, protocol="block 8"))}, "protocol is"),
        ({"quality": replace(quality, trained=replace(quality.trained, protocol="block 8"))}, "after training"),
    ]
    for change, words in unlike:
        with pytest.raises(ValueError, match=words):
            build_report(**{**parts, **change})


OPEN_ENDED = (  # documented as a whole: their keys are names
    "provenance.recipe", "provenance.versions", "provenance.machine",
    "tasks[].models", "tasks[].differences", "tasks[].baselines[].metrics",
)  # fmt: skip


def leaves(value: Any, path: str = "") -> set[str]:
    """Dotted paths of all values; those of a list of objects stand behind []."""
    if isinstance(value, dict) and path not in OPEN_ENDED:
        return {leaf for name, item in value.items() for leaf in leaves(item, f"{path}.{name}".lstrip("."))}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return leaves(value[0], f"{path}[]")
    return {path}


def test_the_documentation_names_every_key_and_no_other(parts: Parts) -> None:
    sides = re.compile(r"(?<=\.)(source|mom|mom_start|mom_trained)(?=\.)")
    found = {sides.sub("SIDE", leaf) for leaf in leaves(build_report(**parts))}
    rows = re.findall(r"^\| `([^`]+)`", SCHEMA.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == found


def test_step_zero_may_be_unknown_once_it_is_trained(parts: dict[str, Any]) -> None:
    found = parts["quality"]
    report = build_report(**{**parts, "quality": replace(found, start=None)})
    assert report["perplexity"]["mom_start"] is None
    assert "not measured" in render_markdown(report)
    assert "did not lower" not in verdict(report)
    with pytest.raises(ValueError, match="unknown"):
        replace(found, start=None, trained=None)
