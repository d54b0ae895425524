"""`block.key=value` behind a recipe, and `key=value` of an option: set in nested dicts, values read as YAML."""

from typing import Any

import yaml

from momify.errors import MomifyError

# What PyYAML raises for a wrong scalar of a named type (`!!bool perhaps`), besides its own errors.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError, IndexError, TypeError, OverflowError)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set `block.key=value` in nested dicts; the value is read as YAML. Raises MomifyError for one of another form."""
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise MomifyError(f"override {override!r:.80} is not of the form block.key=value, as in train.steps=100")
    try:
        parsed = yaml.safe_load(value)
    except NOT_YAML:
        raise MomifyError(f"override {override!r:.80}: the value is not valid YAML") from None
    place = data
    for key in keys[:-1]:
        inner = place.get(key)
        place[key] = place = dict(inner) if isinstance(inner, dict) else {}
    place[keys[-1]] = parsed


def read_settings(settings: list[str]) -> dict[str, Any]:
    """`key=value` options as a dict; values are read as YAML. Raises MomifyError for one of another form."""
    data: dict[str, Any] = {}
    for setting in settings:
        apply_override(data, f"eval.{setting.removeprefix('eval.')}")
    return data.get("eval", {})
