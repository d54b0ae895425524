"""`block.key=value` behind a recipe, and `key=value` of an option: set in nested dicts, values read as YAML."""

import re
from itertools import accumulate
from typing import Any

import yaml

from momify.errors import MomifyError

# What PyYAML raises for a wrong scalar of a named type (`!!bool perhaps`), besides its own errors.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError, IndexError, TypeError, OverflowError)

_DEEPEST = 100  # brackets within brackets; a thousand take PyYAML seconds before Python's own limit ends it


def read_yaml(text: str) -> Any:
    """What YAML `text` says, in plain Python objects. Raises one of NOT_YAML."""
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(accumulate(steps), default=0) > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} brackets within each other")
    return yaml.safe_load(text)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set `block.key=value` in nested dicts; the value is read as YAML. Raises MomifyError for one of another form."""
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise MomifyError(f"override {override!r:.80} is not of the form block.key=value, as in train.steps=100")
    try:
        parsed = read_yaml(value)
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
