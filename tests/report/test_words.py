"""Numbers in words, and a verdict that also says what did not get better."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from momify.amounts import amount, percent, size
from momify.report.data import build_report
from momify.report.words import findings, verdict

Parts = dict[str, Any]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (512, "512"), (999, "999"), (1000, "1.00 k"), (9994, "9.99 k"), (9996, "10.0 k"),
        (99_960, "100 k"), (774_030_080, "774 M"), (999_600, "1.00 M"), (0.887e12, "887 G"), (1.774e12, "1.77 T"),
    ],
)  # fmt: skip
def test_amount(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (184_320, "180 KiB"),
        (1536, "1.50 KiB"),
        (3 << 30, "3.00 GiB"),
        (1023.7, "1.00 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (2**30 - 1, "1.00 GiB"),
    ],
)
def test_size(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(100, 58, "-42.0%"), (12, 12.6, "+5.0%"), (3, 3, "0.0%"), (1e6, 1e6 - 1, "0.0%"), (0, 5, "new"), (0, 0, "0.0%")],
)
def test_percent(before: float, after: float, text: str) -> None:
    assert percent(before, after) == text


def test_the_line_of_a_success(with_speed: Callable[[float, float], Parts]) -> None:
    report = build_report(**with_speed(1.5, 1.2))
    before, after = (report["parameters"][side]["total"] for side in ("source", "mom"))
    line = verdict(report)
    assert line.startswith(f"parameters {before / 1e3:.1f} k -> {after / 1e3:.1f} k (-")
    assert "KV cache per token 1.00 KiB -> 512 B (-50.0%)" in line
    assert line.endswith("perplexity 12.00 -> 12.60 (+5.0%)")
    assert ";" not in line
    assert "\n" not in line


def test_what_is_not_faster_is_said(with_speed: Callable[[float, float], Parts]) -> None:
    assert verdict(build_report(**with_speed(1.5, 0.93))).endswith(
        "; decode at batch 1 is not faster (0.93x); decode at batch 3 is not faster (0.93x)"
    )
    line = verdict(build_report(**with_speed(1.01, 0.93)))
    assert "; prefill at batch 1 is not faster (1.01x); decode at batch 1 is not faster (0.93x); prefill" in line


def test_findings_say_what_is_saved_and_what_is_not(with_speed: Callable[[float, float], Parts]) -> None:
    found = {line["text"].partition(":")[0]: line for line in build_report(**with_speed(1.5, 0.93))["findings"]}
    assert found["KV cache"] == {"tone": "good", "text": "KV cache: 50% saved, 1.00 KiB -> 512 B per token."}
    assert found["Reading a prompt"]["tone"] == "good"
    assert found["Generating"]["tone"] == "bad"
    assert found["Generating"]["text"].endswith("not faster at batch 1 (0.93x), not faster at batch 3 (0.93x).")
    loads = [line for name, line in found.items() if name.startswith("Memory at its peak, batch 3")]
    assert [line["text"].partition(":")[2].split()[1] for line in loads] == ["saved,", "saved,"]
    quality = next(line for name, line in found.items() if name.startswith("Perplexity"))
    assert quality == {
        "tone": "bad",
        "text": "Perplexity 12.00 -> 12.60 (+5.0%). Its predictions are 0.202 nats per "
        "token from the source's; both expect the same token 83% of the time.",
    }


def test_what_was_not_compared_with_the_source_has_no_sentence_on_it(parts: Parts) -> None:
    quality = parts["quality"]
    alone = replace(quality, trained=replace(quality.trained, divergence=None, agreement=None))
    texts = [line["text"] for line in build_report(**{**parts, "quality": alone})["findings"]]
    assert "Perplexity 12.00 -> 12.60 (+5.0%)." in texts


def changed(parts: Parts, path: str, value: object) -> dict:
    report = copy.deepcopy(build_report(**parts))
    *way, last = path.split(".")
    inner = report
    for key in way:
        inner = inner[key]
    inner[last] = value
    return report


def test_what_saves_nothing_is_said(parts: Parts) -> None:
    dense = build_report(**parts)
    for path, name in (
        ("parameters.{}.total", "parameters"),
        ("macs.{}.macs", "MACs"),
        ("memory.{}.kv_bytes_per_token", "KV cache per token"),
    ):
        outer, _, inner = path.split(".")
        same = changed(parts, path.format("mom"), dense[outer]["source"][inner])
        assert f"; {name}: nothing saved" in verdict(same)
        assert "(0.0%)" in verdict(same)


def test_what_rounds_to_nothing_is_no_saving(parts: Parts) -> None:
    before = build_report(**parts)["parameters"]["source"]["total"]
    for after, words in ((before * 0.997, "less than 1% saved"), (before - 1, "nothing saved")):
        report = changed(parts, "parameters.mom.total", after)
        weights = next(line for line in findings(report) if line["text"].startswith("Weights"))
        assert weights["tone"] == "plain"
        assert weights["text"].startswith(f"Weights: {words}, ")
        assert f"; parameters: {words}" in verdict(report)


def test_as_fast_as_the_source_is_neither_good_nor_bad(with_speed: Callable[[float, float], Parts]) -> None:
    tones = [line["tone"] for line in build_report(**with_speed(1.0, 0.99))["findings"] if "faster" in line["text"]]
    assert tones == ["plain", "plain"]


def test_other_text_is_said(parts: Parts) -> None:
    quality = parts["quality"]
    other = replace(quality, text=replace(quality.text, own=False))
    assert "perplexity 12.00 -> 12.60 (+5.0%) (other text)" in verdict(build_report(**{**parts, "quality": other}))


def test_training_in_vain_is_said(parts: Parts) -> None:
    quality = parts["quality"]
    worse = replace(quality, trained=replace(quality.trained, perplexity=15.5))
    assert "; training did not lower perplexity (15.00 before it)" in verdict(
        build_report(**{**parts, "quality": worse})
    )


def test_not_trained_yet(parts: Parts) -> None:
    quality = replace(parts["quality"], trained=None)
    line = verdict(build_report(**{**parts, "quality": quality}))
    assert "perplexity 12.00 -> 15.00 (+25.0%), not trained yet" in line


def test_a_ruined_model_is_called_so(parts: Parts) -> None:
    quality = replace(parts["quality"], trained=replace(parts["quality"].trained, perplexity=math.nan))
    assert "perplexity 12.00 -> not finite" in verdict(build_report(**{**parts, "quality": quality}))


def test_counts_that_disagree_are_said(parts: Parts) -> None:
    assert "agree" not in verdict(build_report(**parts))
    line = verdict(changed(parts, "macs.mom.agree", False))
    assert "; the three MAC counts of the MoM do not agree" in line


def test_findings_of_the_routing(parts: Parts) -> None:
    def texts(report: dict) -> list[str]:
        return [line["text"] for line in findings(report) if line["text"].startswith(("Routing", "Modules"))]

    report = build_report(**parts)
    assert len(texts(report)) == 1
    assert "at the 3 half-steps that choose" in texts(report)[0]
    for half in report["routing"]["steps"]:
        half["shares"] = [float(choice == half["home"]) for choice in range(len(half["shares"]))]
    report["routing"]["mha"]["dead"] = [1]
    assert texts(report) == [
        "Routing: every token takes its step's home at all 3 half-steps that could choose.",
        "Modules that no token ran: attention 1.",
    ]
    halves = {(half["step"], half["kind"]): half for half in report["routing"]["steps"]}
    halves[2, "mha"] |= {"shares": [0.25, 0.5, 0.25], "skip_share": 0.25, "home": 1}
    assert "16.7% of the tokens leave their step's home" in texts(report)[0]
    report["routing"] = None
    assert texts(report) == []
