"""report.md: tables that are tables, numbers that are the report's, foreign strings that stay text."""

import copy
import re
from typing import Any

import pytest

from momify.amounts import amount, size
from momify.report.data import build_report
from momify.report.markdown import escape, fenced, render_markdown

Parts = dict[str, Any]
HOSTILE = "a|b\n| x <script>alert(1)</script> [l](u) ![i](u) `c` *d* _e_ # f $g$ & \\|"


def tables(text: str) -> list[list[list[str]]]:
    """Tables of cells; a pipe with a backslash before it does not end a cell."""
    found, current = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            current.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif current:
            found.append(current)
            current = []
    return found


def test_tables_are_rectangular_and_hold_the_numbers(parts: Parts) -> None:
    report = build_report(**parts)
    text = render_markdown(report)
    for table in tables(text):
        assert {len(row) for row in table} == {len(table[0])}
        assert set(table[1]) <= {"---", "---:"}
    rows = {row[0]: row[1:] for table in tables(text)[:-1] for row in table}  # the last one is the provenance
    assert rows["KV cache per token, float32"] == ["1.00 KiB", "512 B", "-50.0%"]
    assert rows["source"][:2] == ["12.00", ""]
    assert rows["MoM as converted"][:2] == ["15.00", "+25.0%"]
    assert rows["MoM, trained"] == ["12.60", "+5.0%", "2.5000", "1.2500", "0.2024", "83.1%"]
    assert rows["source"][-2:] == ["", ""]
    assert rows["routers"][2] == "new"
    macs = report["macs"]["source"]["macs"]
    short = amount(macs)
    assert rows["source, fvcore"] == ["2", f"{macs:,.0f}", short, short, "0"]
    load = report["memory"]["mom"]["loads"][3]["total"]
    assert rows["batch 3, decoding after 12, MoM"][-1] == f"{size(load['measured'])} ({size(load['formula'])})"
    assert rows["batch 3, prompt of 12, MoM"][1].endswith(" KiB (the same)")
    assert "generating, batch 3" in rows
    assert "4 steps, 512 tokens; held-out loss meanwhile 2.700 (step 2) -> 2.600 (step 4) nats per token." in text
    assert "The three counts of the MoM agree (largest difference 0.00%)." in text
    assert "Protocol: block 16, stride 16" in text
    for heading in ("Perplexity", "MACs", "Memory", "Speed", "Routing", "Provenance"):
        assert f"\n## {heading}\n" in text


def test_only_routed_steps_are_listed(parts: Parts) -> None:
    steps = next(table for table in tables(render_markdown(build_report(**parts))) if table[0][0] == "step")
    assert [row[0] for row in steps[2:]] == ["1, feed-forward", "2, attention", "3, feed-forward"]


def test_patches_are_named_where_they_are(parts: Parts) -> None:
    report = build_report(**parts)
    found = render_markdown(report)
    assert "SKIP of attention adds a patch at 1, 2, 3. SKIP of feed-forward adds a patch at 1, 3." in found
    assert re.search(r"\| patches of SKIP \| 0 \| [\d.]+ k \| new \|", found)
    for half in report["routing"]["steps"]:
        half["patched"] = False
    assert "adds a patch" not in render_markdown(report)


def test_parts_that_were_not_measured_are_left_out(parts: Parts) -> None:
    text = render_markdown(build_report(parts["source"], parts["mom"], parts["quality"], parts["provenance"]))
    assert "## Speed" not in text
    assert "## Routing" not in text
    assert "None" not in text


def test_disagreement_cannot_be_overlooked(parts: Parts) -> None:
    report = copy.deepcopy(build_report(**parts))
    report["macs"]["mom"] |= {"agree": False, "largest_difference": 0.034}
    report["macs"]["mom"]["unsupported"] = [{"operator": "momify::odd", "kind": "unknown", "arithmetic": True}]
    text = render_markdown(report)
    assert "**The three counts of the MoM DO NOT AGREE (largest difference 3.40%).**" in text
    assert "**fvcore cannot count momify::odd, which may hold products.**" in text


def test_numbers_that_are_missing(parts: Parts) -> None:
    report = copy.deepcopy(build_report(**parts))
    report["perplexity"]["mom_trained"] = None
    nothing = dict.fromkeys(("perplexity", "loss", "bits_per_byte", "divergence", "agreement"))
    report["perplexity"]["mom_start"] |= nothing
    report["provenance"]["commit"] = None
    rows = {row[0]: row[1:] for table in tables(render_markdown(report)) for row in table}
    assert rows["MoM as converted"] == ["not finite", *[""] * 5]
    assert "MoM, trained" not in rows
    assert rows["commit"] == ["not from a checkout"]


@pytest.mark.parametrize("place", ["source", "protocol", "machine", "command", "recipe", "operator"])
def test_foreign_strings_stay_text(parts: Parts, place: str) -> None:
    report = copy.deepcopy(build_report(**parts))
    provenance = report["provenance"]
    plain = len(tables(render_markdown(report)))
    if place == "source":
        report["source"] = provenance["source"] = HOSTILE
    elif place == "protocol":
        report["perplexity"]["protocol"] = HOSTILE
    elif place == "machine":
        provenance["machine"][HOSTILE] = HOSTILE
    elif place == "operator":
        report["macs"]["mom"]["unsupported"] = [{"operator": HOSTILE, "kind": "unknown", "arithmetic": True}]
    else:
        provenance[place] = HOSTILE.replace("`c`", "```` \n````") if place == "command" else {"a": HOSTILE}
    text = render_markdown(report)
    outside = re.sub(r"^(`{3,})[a-z]*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)[\[`]|(?<![\\*])\*(?!\*)", outside)
    assert len(tables(outside)) == plain
    for table in tables(outside):
        assert {len(row) for row in table} == {len(table[0])}


def test_escape_and_fence() -> None:
    assert escape("a | b\nc") == r"a \| b c"
    assert escape("<b> & [x](y)") == r"&lt;b> &amp; \[x\](y)"
    assert escape("> 9 -> 4") == "&gt; 9 -> 4"
    assert escape("\\|") == r"\\\|"
    assert fenced("x ``` y") == "````\nx ``` y\n````"
    assert fenced("x") == "```\nx\n```"
