"""routes.html in a real browser: colours, hovering, holding, filters, the keyboard; foreign text stays text."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from momify.measure.paths import HalfPath, Paths
from momify.report.routes import Traced, most_divided, render_routes, routes_data

Visits = Callable[..., Any]
TOKENS = ["def", " main", "(", "</script><script>alert(1)</script>", "\n    ", "<b>&", "'\""]


def one(*modules: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    return tuple(((module, 1.0),) for module in modules)


HALVES = (
    HalfPath(0, "mha", 0, True, one(0, 0, 0, 0, 0, 0, 0)),
    HalfPath(0, "ffn", 1, False, one(1, 0, 2, 1, 0, 3, 3)),  # of 3 modules: 3 is SKIP
    HalfPath(1, "mha", 0, False, one(0, 1, 2, 0, 0, 0, 0), patched=True),  # of 2: 2 is SKIP
    HalfPath(2, "ffn", 2, False, tuple(((2, 0.75), (0, 0.25)) for _ in TOKENS)),
)
LOSSES = (None, 1.5, 2.25, 0.5, 1.0, 3.0, 0.75)
RISES = {("mha", 0): 0.5, ("mha", 1): -0.125, ("ffn", 0): 0.0001}
TRACED = Traced("a/<model>", TOKENS, {"mha": 2, "ffn": 3}, Paths(HALVES, LOSSES), RISES)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "routes.html"
    path.write_text(render_routes(TRACED), encoding="utf-8")
    return path


def test_the_data_of_the_page() -> None:
    data = routes_data(TRACED)
    assert data["modules"] == {"mha": 2, "ffn": 3}
    assert data["losses"] == [None, 1.5, 2.25, 0.5, 1.0, 3.0, 0.75]
    assert data["halves"][3]["picks"][0] == [[2, 0.75], [0, 0.25]]
    assert data["rises"] == {"mha/0": 0.5, "mha/1": -0.125, "ffn/0": 0.0001}
    assert data["first"] == most_divided(HALVES) == 1


def test_foreign_text_stays_text() -> None:
    html = render_routes(TRACED)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, flags=re.DOTALL)
    assert len(scripts) == 2
    assert json.loads(scripts[0]) == json.loads(json.dumps(routes_data(TRACED)))
    assert "<b>" not in html
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in html
    assert not re.search(r"url\(|@import|https?://| on\w+=", html)


def test_a_name_cannot_leave_the_data() -> None:
    odd = Traced("m", ["x"], {"</script><i>": 1}, Paths((HALVES[0],), (None,)))
    assert "</script><i>" not in render_routes(odd)


def modules_shown(page: Any) -> list[str]:
    return page.locator(".token").evaluate_all("tokens => tokens.map(t => t.dataset.module)")


def dimmed(page: Any) -> list[int]:
    return page.locator(".token").evaluate_all("ts => ts.flatMap((t, i) => t.classList.contains('dim') ? [i] : [])")


def path_rows(page: Any) -> list[list[str]]:
    rows = page.locator("#path tbody tr").all()
    return [[cell.inner_text().strip() for cell in row.locator("th, td").all()] for row in rows]


def test_tokens_are_coloured_by_module(visit: Visits, page: Path) -> None:
    with visit(page) as seen:
        assert modules_shown(seen.page) == ["1", "0", "2", "1", "0", "SKIP", "SKIP"]
        colours = seen.page.locator(".token").evaluate_all("ts => ts.map(t => getComputedStyle(t).backgroundColor)")
        assert colours[0] == colours[3] != colours[1] == colours[4] != colours[2]
        assert seen.page.locator(".token").nth(3).inner_text() == TOKENS[3]
        assert seen.page.locator("h1").inner_text() == "a/<model>"
        seen.page.locator("[data-half='2']").click()
        assert modules_shown(seen.page) == ["0", "1", "SKIP", "0", "0", "0", "0"]
        seen.check_quiet(page)


def test_hovering_shows_a_path_and_a_click_holds_it(visit: Visits, page: Path) -> None:
    with visit(page) as seen:
        tokens, head = seen.page.locator(".token"), seen.page.locator("#path h2")
        assert head.inner_text() == "Token def"
        tokens.nth(2).hover()
        assert head.inner_text() == "Token ("
        assert "3 of 7; loss 2.25 nats" in seen.page.locator("#path").inner_text()
        assert path_rows(seen.page) == [
            ["0", "0fixed", "2"],
            ["1", "SKIP + patch", "skips always"],
            ["2", "skips always", "20.75 00.25"],
        ]
        for token in (3, 5):
            tokens.nth(token).hover()
            assert head.inner_text() == f"Token {TOKENS[token]}"
        seen.page.locator("h1").hover()
        assert head.inner_text() == "Token def"
        tokens.nth(2).click()
        seen.page.locator("h1").hover()
        assert head.inner_text() == "Token ("
        tokens.nth(2).click()
        tokens.nth(1).hover()
        assert head.inner_text() == "Token  main"
        seen.check_quiet(page)


def test_filters(visit: Visits, page: Path) -> None:
    with visit(page) as seen:
        chip = "[data-filter='{}']".format
        assert [seen.page.locator(f"{chip(m)} .count").inner_text() for m in range(4)] == ["2", "2", "1", "2"]
        seen.page.locator(chip(0)).click()
        assert dimmed(seen.page) == [0, 2, 3, 5, 6]
        assert seen.page.locator(chip(0)).get_attribute("aria-pressed") == "true"
        seen.page.locator(chip(3)).click()
        assert dimmed(seen.page) == [0, 2, 3]
        seen.page.locator("#anywhere").check()
        assert dimmed(seen.page) == []  # all took module 0 at step 2, with a gate of 0.25
        seen.page.locator("#anywhere").uncheck()
        seen.page.locator(chip(0)).click()
        assert dimmed(seen.page) == [0, 1, 2, 3, 4]
        seen.page.locator("[data-half='0']").click()  # the other kind has other modules
        assert dimmed(seen.page) == []
        seen.check_quiet(page)


def test_what_the_loss_becomes_without_a_module(visit: Visits, page: Path) -> None:
    with visit(page) as seen:
        assert seen.page.locator("[data-filter='0'] .rise").inner_text() == "0.000"
        seen.page.locator("[data-half='2']").click()
        rises = [seen.page.locator(f"[data-filter='{m}'] .rise") for m in range(3)]
        assert [rise.inner_text() for rise in rises[:2]] == ["+0.500", "\N{MINUS SIGN}0.125"]
        assert rises[2].count() == 0


def test_by_keyboard_alone(visit: Visits, page: Path) -> None:
    with visit(page) as seen:
        keys, head = seen.page.keyboard, seen.page.locator("#path h2")

        def focused() -> str:
            return seen.page.evaluate("document.activeElement.textContent")

        for _ in range(30):  # Tab through the chips to the text, which is one stop
            keys.press("Tab")
            if seen.page.evaluate("document.activeElement.className").startswith("token"):
                break
        assert focused() == "def"
        keys.press("ArrowRight")
        keys.press("ArrowRight")
        assert (focused(), head.inner_text()) == ("(", "Token (")
        keys.press("Enter")
        keys.press("ArrowLeft")
        assert (focused(), head.inner_text()) == (" main", "Token (")
        keys.press("Escape")
        assert head.inner_text() == "Token  main"
        keys.press("ArrowDown")
        assert modules_shown(seen.page)[1] == "1"
        assert seen.page.locator("[data-half='2']").get_attribute("aria-checked") == "true"
        assert focused() == " main"
        keys.press("End")
        assert focused() == TOKENS[-1]
        keys.press("ArrowRight")
        assert focused() == TOKENS[-1]
        seen.page.locator("[data-filter='0']").focus()
        keys.press("Enter")
        assert dimmed(seen.page) == [1, 2]
        assert seen.page.evaluate("document.activeElement.dataset.filter") == "0"
        keys.press("Space")
        assert dimmed(seen.page) == []
        seen.check_quiet(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1200, 900), (390, 844)], ids=["desk", "phone"])
def test_light_and_dark_large_and_small(visit: Visits, page: Path, size: tuple[int, int], scheme: str) -> None:
    with visit(page, size, scheme) as seen:
        width = seen.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1]
        lightness = "getComputedStyle({}).{}.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
        token = "document.querySelector('.token.hue')"
        paint, ink = (seen.page.evaluate(lightness.format(token, what)) for what in ("backgroundColor", "color"))
        assert (paint > ink) == (scheme == "light")
        assert abs(paint - ink) > 300
        seen.check_quiet(page)


def test_a_text_of_one_token(visit: Visits, tmp_path: Path) -> None:
    path = tmp_path / "one.html"
    halves = tuple(HalfPath(h.step, h.kind, h.home, h.fixed, h.picks[:1]) for h in HALVES)
    path.write_text(render_routes(Traced("m", ["x"], {"mha": 2, "ffn": 3}, Paths(halves, (None,)))), encoding="utf-8")
    with visit(path) as seen:
        assert "predicted by nothing" in seen.page.locator("#path").inner_text()
        seen.check_quiet(path)
