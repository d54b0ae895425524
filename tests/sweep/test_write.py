"""sweep/write.py: the three files say what the rows say."""

import csv
from xml.etree import ElementTree

from momify.sweep.cells import Scored
from momify.sweep.write import HEIGHT, WIDTH, as_csv, as_markdown, as_svg, conclusions

SVG = "{http://www.w3.org/2000/svg}"


def row(mha: int, ffn: int, before: float, after: float) -> Scored:
    return Scored(mha, ffn, 0, 1000 * (mha + ffn), 10 * (mha + 2 * ffn), 64 * mha, 4096, 2.0, before, after,
                  "block 32, <b>", f"runs/s/{mha}x{ffn}-seed0")  # fmt: skip


ROWS = [row(4, 4, 2.0, 2.25), row(4, 2, 3.0, 2.75), row(2, 4, 2.5, 2.4375), row(1, 4, 4.0, 3.25)]


def test_csv_reads_back_to_the_last_digit() -> None:
    rows = list(csv.DictReader(as_csv(ROWS).splitlines()))
    assert [(int(r["mha"]), float(r["loss_after"]), r["protocol"]) for r in rows] == [
        (one.mha, one.loss_after, one.protocol) for one in ROWS
    ]


def test_points_of_the_plot_are_the_losses() -> None:
    """The curves' pixels are worked back to modules and nats by the axis marks that stand beside them."""
    root = ElementTree.fromstring(as_svg("<script>alert(1)</script> & co", ROWS, 4))
    assert root.find(f"{SVG}title").text == "<script>alert(1)</script> & co"
    assert not root.findall(f".//{SVG}script")
    trained, converted = (g for g in root.findall(f"{SVG}g") if g.findall(f".//{SVG}polyline"))
    for panel, losses in ((trained, ("loss_after", 2.25)), (converted, ("loss_before", 2.0))):
        texts = [(text.text, float(text.get("x")), float(text.get("y")), text.get("text-anchor"))
                 for text in panel.findall(f"{SVG}text")]  # fmt: skip
        up = [(float(name), y - 4) for name, x, y, anchor in texts if anchor == "end" and x < 0]
        across = {x: int(name) for name, x, _, anchor in texts if anchor == "middle"}
        (low, y_low), (high, y_high) = up[0], up[-1]
        for line, kind in zip(panel.findall(f".//{SVG}polyline"), ("mha", "ffn"), strict=True):
            for pair in line.get("points").split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= WIDTH
                assert 0 <= y <= HEIGHT
                kept = across[x]
                loss = low + (y - y_low) / (y_high - y_low) * (high - low)
                pool = (kept, 4) if kind == "mha" else (4, kept)
                assert abs(loss - next(getattr(r, losses[0]) for r in ROWS if (r.mha, r.ffn) == pool)) < 0.01


def test_full_grid_draws_the_other_curves_faintly() -> None:
    more = [*ROWS, row(2, 2, 3.5, 3.0), row(1, 2, 5.0, 4.0)]
    text = as_svg("t", more, 4)
    assert "attention kept, 2 feed-forward" in text
    assert text.count('opacity="0.45"') == 3 * 3  # in two panels and the legend: one attention, two feed-forward curves
    assert 'opacity="0.45"' not in as_svg("t", ROWS, 4)


def test_whole_pool_alone_still_gives_files() -> None:
    ElementTree.fromstring(as_svg("t", ROWS[:1], 4))
    assert conclusions(ROWS[:1], 4) == ["only one kind of module was removed, so there is nothing to compare"]


def test_page_has_a_row_a_cell_and_the_protocol() -> None:
    page = as_markdown("t", ROWS, 4)
    assert "| 4 | 2 | 6.00 k | 80 | 256 | 3.0000 | 2.7500 | +0.5000 | +0.2500 |" in page
    assert "| 4 | 4 | 8.00 k | 120 | 256 | 2.0000 | 2.2500 | - | - |" in page
    assert "block 32" in page
    assert "2 modules removed: attention adds +0.1875 nats" in page
