"""The documentation agrees with the code."""

import re
from pathlib import Path

import pytest

from momify import recipe_blocks as blocks
from momify.cli import app

ROOT = Path(__file__).parents[1]
BLOCKS = {
    "run": blocks.RunBlock, "source": blocks.SourceBlock, "source.scratch": blocks.Scratch, "mom": blocks.MomBlock,
    "data": blocks.DataBlock, "train": blocks.TrainBlock, "eval": blocks.EvalBlock,
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_recipe_page_lists_every_key_with_its_default_and_meaning(name: str) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
    fields = BLOCKS[name].model_fields
    assert list(rows) == list(fields)
    for key, field in fields.items():
        meaning = " ".join((field.description or "").split())
        assert meaning, f"{name}.{key} needs a line on what it does"
        default = "required" if field.is_required() else "null" if field.default is None else f"`{field.default}`"
        assert rows[key] == f"{default} | {meaning}", f"docs/recipes.md is behind at {name}.{key}"


def test_readme_has_the_two_commands_and_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -e . && momify demo" in readme
    assert "pip install -e '.[dev]' && pytest -n 2 --dist loadfile" in readme
    for command in app.registered_commands:
        assert f"momify {command.name or command.callback.__name__}" in readme


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -q -e '.[dev]' && pytest -n 2 --dist loadfile" in script


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def test_links_to_a_section_lead_to_one() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, section in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            assert section in anchors(page.parent / target if target else page), f"{page.name}: {target}#{section}"
