"""The recipe of `momify demo`, which travels inside the package."""

from importlib.resources import files

from momify.recipe import Recipe, parse_recipe


def demo_recipe(overrides: list[str] | None = None) -> Recipe:
    """The demo's recipe with `block.key=value` overrides. Raises MomifyError for a wrong one."""
    text = files("momify.demo").joinpath("demo.yaml").read_text(encoding="utf-8")
    return parse_recipe(text, "demo.yaml", overrides)
