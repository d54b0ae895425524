"""What is wrong with a recipe, in one line: where, with the nearest known key, and never more of a value than fits."""

import difflib
import reprlib
from typing import Any

from pydantic import BaseModel, ValidationError


def first_mistake(error: ValidationError, whole: type[BaseModel]) -> str:
    """The first thing wrong with a `whole`, in one line, with the nearest known key where a name is unknown."""
    first = error.errors()[0]
    path = " ".join(".".join(str(part) for part in first["loc"]).split())[:200]
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1], whole)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        return f"unknown key '{path}'; " + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}")
    if first["type"] == "missing":
        return f"'{path}' is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "value_error" else f" (got {short(first['input'])})"
    return f"{path + ': ' if path else ''}{message}{value}"


def _keys_at(location: tuple[int | str, ...], whole: type[BaseModel]) -> list[str]:
    """The keys that the block at `location` knows."""
    block = whole
    for part in location:
        choices = [block.model_fields[str(part)].annotation] if str(part) in block.model_fields else []
        choices += [inner for choice in choices for inner in getattr(choice, "__args__", ())]
        block = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), block)
    return list(block.model_fields)


def short(value: Any) -> str:
    """A value as Python writes it, at most 60 characters of it."""
    try:
        text = reprlib.repr(value)  # never writes out all of a value: YAML's anchors can make one of any size
    except ValueError:  # a number of more digits than Python prints
        return f"a {type(value).__name__} that is too long to show"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: Exception) -> str:
    """The words of an error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]
