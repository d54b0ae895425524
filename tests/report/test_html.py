"""report.html: numbers that are the report's, foreign strings that stay text, and how it behaves in a real browser."""

import copy
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from momify.amounts import amount
from momify.report.data import build_report
from momify.report.html import render_html

Parts = dict[str, Any]
Visits = Callable[..., Any]
DESK, PHONE = (1200, 900), (390, 844)
HOSTILE = "</script></style><script>alert('x')</script><img src='https://example.org/x.png' onerror='alert(1)'> & \"r\""


class Outline(HTMLParser):
    """Elements that are opened and not closed, attributes that load something, and the text."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "action") and value]
        if tag not in self.VOID and tag != "polyline":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "polyline":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def test_numbers_are_the_reports(parts: Parts) -> None:
    report = build_report(**parts)
    found = outline(render_html(report))
    for side in ("source", "mom"):
        assert amount(report["parameters"][side]["total"]) in found.text
        assert f"{report['macs'][side]['ways']['fvcore']['mean']:,.0f}" in found.text
    for finding in report["findings"]:
        assert finding["text"].replace("->", "→") in found.text
    assert report["perplexity"]["protocol"] in found.text
    assert report["provenance"]["source_sha256"] in found.text
    assert found.tags.count("polyline") == 4  # held out, training, distillation, hidden states


def test_losses_of_spliced_blocks_are_not_taken_for_those_of_text_as_it_stands(parts: Parts) -> None:
    name = "training, on 4 pieces of text a block"
    assert name not in render_html(build_report(**parts))
    report = build_report(**parts)
    report["training"] = {**report["training"], "splice": 4}
    assert name in render_html(report)


def test_the_sources_level_is_drawn_among_curves_of_the_same_text_alone(parts: Parts) -> None:
    level = "source, held out (dashed)"
    report = build_report(**parts)
    assert level in render_html(report)
    report["perplexity"]["limited"] = True
    assert "source, held out (limited) (dashed)" in render_html(report)
    report["perplexity"]["own_text"] = False
    assert "source, held out" not in render_html(report)


def test_a_tile_is_coloured_as_its_finding_is(with_speed: Callable[[float, float], Parts]) -> None:
    """Within 2% of the source's speed is neither gain nor loss, on the page as in the findings."""
    html = render_html(build_report(**with_speed(1.01, 0.95)))
    assert html.count('<div class="change plain">1.01x') == 3  # the tile, and the row of either batch
    assert html.count('<div class="change bad">0.95x') == 3


def test_patches_are_named_where_they_are(parts: Parts) -> None:
    report = build_report(**parts)
    text = outline(render_html(report)).text
    assert "steps that only skip: 1, 3; SKIP adds a patch at 1, 2, 3" in text
    assert "patches of SKIP" in text
    assert "step deltas" in text
    for half in report["routing"]["steps"]:
        half["patched"] = False
    assert "adds a patch" not in outline(render_html(report)).text


def test_it_is_one_file(parts: Parts) -> None:
    html = render_html(build_report(**parts))
    assert all(link.startswith(("#", "data:")) for link in outline(html).loads)
    assert not re.search(r"url\(|@import|https?://", html)
    assert len(html) < 150_000


def test_what_was_not_measured_is_left_out(parts: Parts) -> None:
    report = build_report(parts["source"], parts["mom"], parts["quality"], parts["provenance"])
    found = outline(render_html(report))
    for heading in ("Speed", "Training", "Routing"):
        assert f"\n{heading}\n" not in found.text
    assert "None" not in found.text


def test_disagreement_cannot_be_overlooked(parts: Parts) -> None:
    report = copy.deepcopy(build_report(**parts))
    assert 'class="alarm"' not in render_html(report)
    report["macs"]["mom"] |= {"agree": False, "largest_difference": 0.034}
    html = render_html(report)
    assert html.count('class="alarm"') == 2
    assert "MoM: the three counts DO NOT AGREE; the widest gap is 3.40%." in html


def hostile(report: dict) -> dict:
    """Foreign text wherever it can come from."""
    report = copy.deepcopy(report)
    report["source"] = report["mom"] = report["provenance"]["source"] = HOSTILE
    report["perplexity"]["protocol"] = report["memory"]["method"] = report["speed"]["device"] = HOSTILE
    report["findings"][0]["text"] = HOSTILE
    report["macs"]["mom"]["unsupported"] = [{"operator": HOSTILE, "kind": "unknown", "arithmetic": True}]
    report["provenance"] |= {"command": HOSTILE, "recipe": {"a": HOSTILE}}
    report["provenance"]["machine"] = {HOSTILE: HOSTILE}
    report["speed"]["runs"][0]["protocol"] = HOSTILE
    rte = report["tasks"][0]
    rte["task"] = rte["models"]["mom"]["notes"][0] = rte["baselines"][0]["how"] = HOSTILE
    rte["models"][HOSTILE] = rte["models"]["mom"]
    return report


def test_foreign_strings_stay_text(parts: Parts) -> None:
    plain, odd = (outline(render_html(r)) for r in (build_report(**parts), hostile(build_report(**parts))))
    assert "img" not in odd.tags
    assert odd.tags.count("script") == plain.tags.count("script") == 1
    assert odd.text.count("<script>alert('x')</script>") > 8


@pytest.fixture
def page(parts: Parts, tmp_path: Path) -> Path:
    """The page of a report with hostile strings in it, on disk."""
    path = tmp_path / "report.html"
    path.write_text(render_html(hostile(build_report(**parts))), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_in_a_browser(visit: Visits, page: Path, size: tuple[int, int], scheme: str) -> None:
    with visit(page, size, scheme) as seen:
        assert seen.page.locator("h1").inner_text().startswith("</script></style><script>alert")
        width = seen.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1]  # nothing sticks out sideways
        colours = "getComputedStyle(document.body).{}.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
        paper, ink = (seen.page.evaluate(colours.format(what)) for what in ("backgroundColor", "color"))
        assert (paper > ink) == (scheme == "light")
        assert abs(paper - ink) > 450
        seen.check_quiet(page)


def test_pointing_at_a_cell_reads_it_out(visit: Visits, parts: Parts, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_html(build_report(**parts)), encoding="utf-8")
    with visit(path) as seen:
        figure = seen.page.locator(".map").first
        readout = figure.locator(".readout")
        assert readout.inner_text() == "Point at a cell to read it."
        figure.locator("td.cell").first.hover()
        assert readout.inner_text() == "Step 0, attention: 100.0% of the tokens take module 0, its home"
        seen.page.locator("h1").hover()
        assert readout.inner_text() == "Point at a cell to read it."
        seen.check_quiet(path)


def test_on_paper(visit: Visits, page: Path) -> None:
    """Printed it is light even for who has a dark screen, without what only a screen can use."""
    with visit(page, scheme="dark") as seen:
        seen.page.emulate_media(media="print", color_scheme="dark")
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not seen.page.locator("nav").is_visible()
        assert seen.page.pdf(format="A4")[:5] == b"%PDF-"


def test_an_attack_that_got_through_would_be_stopped(visit: Visits, parts: Parts, tmp_path: Path) -> None:
    """The policy in the page: a foreign script does not run, a foreign picture is not fetched."""
    html = render_html(build_report(**parts))
    attack = '<script>document.title = "taken"</script><img src="https://example.org/x.png">'
    path = tmp_path / "attacked.html"
    path.write_text(html.replace("</main>", attack + "</main>"), encoding="utf-8")
    with visit(path) as seen:
        assert seen.page.title() != "taken"
        assert all("Content Security Policy" in line for line in seen.complaints)
        assert len(seen.complaints) == 2
