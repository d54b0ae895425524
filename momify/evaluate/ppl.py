"""The task `ppl`: held-out perplexity of several models by one protocol, kept by the hash of what was scored."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from momify.data.blocks import TokenData
from momify.errors import MomifyError
from momify.evaluate.byte_lengths import byte_lengths
from momify.evaluate.perplexity import Perplexity, Progress, Protocol, perplexity
from momify.files import read_json, write_json


@dataclass(frozen=True)
class Contestant:
    """One model to be scored: its role (source, start, mom), its weights' hash, and how to load it when needed."""

    role: str
    sha256: str
    load: Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class PplSettings:
    """The text and the protocol: block and stride in tokens, at most `limit` held-out tokens (None: all)."""

    data: TokenData
    block: int
    stride: int
    limit: int | None = None
    batch: int = 16


def score(
    contestants: list[Contestant],
    tokenizer: PreTrainedTokenizerBase,
    settings: PplSettings,
    results: Path,
    progress: Progress | None = None,
) -> dict[str, Perplexity]:
    """Perplexity of each contestant by role; `results` (a JSON file) keeps them, so that a killed evaluation goes on.

    A kept number is used again only for the same weights, text and protocol.
    """
    kept = read_results(results)
    scored: dict[str, Perplexity] = {}
    for one in contestants:
        key = {"sha256": one.sha256, "data": settings.data.sha256, "limit": settings.limit,
               "block": settings.block, "stride": settings.stride}  # fmt: skip
        entry = kept.get(one.role)
        if entry is None or entry["key"] != key:
            entry = {"key": key, "result": asdict(_score(one, tokenizer, settings, progress))}
            kept = {**kept, one.role: entry}
            write_json(results, {"task": "ppl", "models": kept})
        scored[one.role] = Perplexity(**entry["result"])
    return scored


def read_results(path: Path) -> dict[str, Any]:
    """The kept results by role, empty where there are none. Raises MomifyError for a damaged file."""
    if not path.exists():
        return {}
    try:
        kept = read_json(path)["models"]
        for entry in kept.values():
            _check_entry(entry)
        return kept
    except (KeyError, TypeError, AttributeError):
        raise MomifyError(f"{path} is not a result file of momify eval; remove it, the scores are made again") from None


def _check_entry(entry: Any) -> None:
    """Raise TypeError or KeyError for a kept result that is not one."""
    result = Perplexity(**entry["result"])
    numbers = (result.loss, result.perplexity, result.tokens, result.scored, result.windows)
    if not isinstance(entry["key"], dict) or not isinstance(result.protocol, str):
        raise TypeError("not a result")
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise TypeError("not a number")


def _score(
    one: Contestant, tokenizer: PreTrainedTokenizerBase, settings: PplSettings, progress: Progress | None
) -> Perplexity:
    tokens = settings.data.valid_tensor(settings.limit)
    table = byte_lengths(tokenizer)
    protocol = Protocol(settings.block, settings.stride, settings.batch)
    return perplexity(one.load(), tokens, protocol, None if table is None else table[tokens], progress)
