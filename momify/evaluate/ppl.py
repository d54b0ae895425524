"""The task `ppl`: held-out perplexity by one protocol, per token, per word, and in bits per byte."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from momify.data.blocks import TokenData
from momify.evaluate.byte_lengths import byte_lengths
from momify.evaluate.contestant import Contestant
from momify.evaluate.fine_tune import device
from momify.evaluate.perplexity import Perplexity, Protocol, perplexity, windows
from momify.evaluate.results import Key, Score
from momify.evaluate.task import Baseline, Turn

_DECODED_AT_ONCE = 100_000  # tokens


@dataclass(frozen=True)
class Ppl:
    """Held-out text, as tokens of each contestant's own tokenizer, and the protocol.

    Block and stride in tokens; a stride below the block slides the window. At most `limit` windows' worth of tokens.
    """

    text: Callable[[PreTrainedTokenizerBase], TokenData]
    block: int
    stride: int
    limit: int | None = None
    batch: int = 16
    name: str = field(default="ppl", init=False)
    main: str = field(default="perplexity", init=False)
    shown: tuple[str, ...] = field(default=("perplexity", "word_perplexity", "bits_per_byte", "loss"), init=False)
    seeded: bool = field(default=False, init=False)
    higher_is_better: bool = field(default=False, init=False)

    @property
    def limited(self) -> bool:
        return self.limit is not None

    @property
    def protocol(self) -> Protocol:
        return Protocol(self.block, self.stride, self.batch)

    def check(self) -> None:
        """Raise MomifyError for a window that cannot be, before a model is loaded."""
        _ = self.protocol

    def tokens(self, one: Contestant) -> Tensor:
        """The tokens that are scored (N,)."""
        return self.text(one.tokenizer).valid_tensor(None if self.limit is None else self.limit * self.block)

    def key(self, one: Contestant) -> Key:
        """Weights, text (which names the tokenizer too), window."""
        window = {"limit": self.limit, "block": self.block, "stride": self.stride}
        return {"sha256": one.sha256, "data": self.text(one.tokenizer).sha256, **window}

    def work(self, one: Contestant) -> int:
        """Batches of windows."""
        return math.ceil(len(list(windows(len(self.tokens(one)), self.protocol))) / self.batch)

    def baselines(self) -> list[Baseline]:
        """None: the perplexity of a guess is the size of the vocabulary."""
        return []

    def score(self, one: Contestant, turn: Turn) -> Score:
        """The perplexity of the contestant."""
        tokens, table, done = self.tokens(one), byte_lengths(one.tokenizer), 0

        def watch(windows_done: int, _: int) -> None:
            nonlocal done
            turn.tick(windows_done // self.batch - done)
            done = windows_done // self.batch

        sizes = None if table is None else table[tokens]
        found = perplexity(one.load().to(device()), tokens, self.protocol, sizes, watch)
        found = replace(found, word_perplexity=per_word(found, count_words(one.tokenizer, tokens)))
        return to_score(found)


def count_words(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> int:
    """Words, which white space separates, in the text of tokens (N,)."""
    pieces = [
        tokenizer.decode(part.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in tokens.split(_DECODED_AT_ONCE)
    ]
    return len("".join(pieces).split())


def per_word(found: Perplexity, words: int) -> float | None:
    """exp of the loss per word: the mean loss of a token times tokens per word. None where there are no words."""
    if not words:
        return None
    exponent = found.loss * found.tokens / words
    return math.exp(exponent) if exponent < 700 else None


def to_score(found: Perplexity) -> Score:
    """A perplexity as a kept score; what is not finite becomes None."""
    metrics = {name: value for name, value in asdict(found).items() if name != "protocol"}
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
    return Score(finite, found.protocol)


def from_score(score: Score) -> Perplexity:
    """The perplexity that `to_score` kept; an infinite one comes back as such."""
    metrics = dict(score.metrics)
    for name in ("loss", "perplexity"):
        metrics[name] = math.inf if metrics[name] is None else metrics[name]
    return Perplexity(**metrics, protocol=score.protocol)
