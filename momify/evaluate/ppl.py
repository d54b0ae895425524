"""The task `ppl`: held-out perplexity by one protocol, in bits per byte too, and how far from the source.

A ratio of perplexities also pays a model for what its source has wrong: an overfitted source is easily beaten on text
that it has not seen (docs/log.md). The divergence is 0 for a model that predicts as its source does, and for no other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from momify.data.blocks import TokenData
from momify.devices import best_device
from momify.evaluate.byte_lengths import byte_lengths
from momify.evaluate.contestant import Contestant
from momify.evaluate.perplexity import Perplexity, Protocol, check_block, perplexity, windows
from momify.evaluate.results import Key, Score
from momify.evaluate.task import Baseline, Incomparable, Turn

_FORM = 2  # part of the key: raise it when what a score holds changes
_SHOWN = ("perplexity", "word_perplexity", "bits_per_byte", "loss", "divergence", "agreement")
_PER_TOKEN, _PER_TEXT = ("perplexity", "loss"), ("word_perplexity", "bits_per_byte")
BESIDE = (
    "divergence: mean KL(source || model) in nats a scored token, 0 for the source itself; "
    "agreement: % of scored tokens with the same likeliest token"
)


@dataclass(frozen=True)
class Ppl:
    """Held-out text, as tokens of each contestant's own tokenizer, and the protocol.

    Block and stride in tokens; a stride below the block slides the window. At most `limit` windows' worth of tokens; a
    limit that leaves nothing out is none (`among`). Predictions of others that read the same tokens are compared with
    those of `reference`.
    """

    text: Callable[[PreTrainedTokenizerBase], TokenData]
    block: int
    stride: int
    limit: int | None = None
    batch: int = 16
    reference: Contestant | None = None
    name: str = field(default="ppl", init=False)
    main: str = field(default="perplexity", init=False)
    shown: tuple[str, ...] = field(default=_SHOWN, init=False)
    seeded: bool = field(default=False, init=False)
    higher_is_better: bool = field(default=False, init=False)

    @property
    def limited(self) -> bool:
        return self.limit is not None

    def among(self, contestants: Sequence[Contestant]) -> "Ppl":
        """The task as these take part in it: the others compared with the source, and no limit if it limits nobody."""
        reference = next((one for one in contestants if one.role == "source"), None)
        limits = [self._limit(one) for one in contestants]
        return replace(self, reference=reference, limit=next((limit for limit in limits if limit is not None), None))

    def _limit(self, one: Contestant) -> int | None:
        """The limit where the contestant's text is longer."""
        whole = self.limit is None or self.limit * self.block >= len(self.text(one.tokenizer).valid)
        return None if whole else self.limit

    def protocol(self, compared: bool = False) -> Protocol:
        """The windows; half as many at once where two models' logits are held."""
        return Protocol(self.block, self.stride, max(1, self.batch // 2) if compared else self.batch)

    def check(self) -> None:
        """Raise MomifyError for a window that cannot be, before a model is loaded."""
        self.protocol()

    def check_fit(self, one: Contestant) -> None:
        """Raise MomifyError for a window longer than the contestant's positions, where those are known."""
        if one.positions:
            check_block(self.block, one.positions)

    def compared(self, one: Contestant) -> bool:
        """Whether the reference is another model that reads the same tokens."""
        other = self.reference
        if other is None or other.sha256 == one.sha256:
            return False
        return self.text(other.tokenizer).sha256 == self.text(one.tokenizer).sha256

    def tokens(self, one: Contestant) -> Tensor:
        """The tokens that are scored (N,)."""
        limit = self._limit(one)
        return self.text(one.tokenizer).valid_tensor(None if limit is None else limit * self.block)

    def incomparable(self, first: Contestant, other: Contestant) -> Incomparable | None:
        """What is per token where tokens differ; everything where they stand for another stretch of text."""
        ours, theirs = self.tokens(first), self.tokens(other)
        if torch.equal(ours, theirs):
            return None
        if documents(first.tokenizer, ours) == documents(other.tokenizer, theirs):
            return Incomparable(_PER_TOKEN, "other tokens of the same text")
        return Incomparable(
            (*_PER_TOKEN, *_PER_TEXT), "another stretch of text; score a whole one, --data FILE without a limit"
        )

    def key(self, one: Contestant) -> Key:
        """Weights, text (which names the tokenizer too), window, and the weights compared with."""
        window = {"limit": self._limit(one), "block": self.block, "stride": self.stride, "form": _FORM}
        beside = {"reference": self.reference.sha256} if self.compared(one) else {}
        return {"sha256": one.sha256, "data": self.text(one.tokenizer).sha256, **window, **beside}

    def work(self, one: Contestant) -> int:
        """Batches of windows."""
        protocol = self.protocol(self.compared(one))
        return math.ceil(len(list(windows(len(self.tokens(one)), protocol))) / protocol.batch)

    def baselines(self) -> list[Baseline]:
        """None: the perplexity of a guess is the size of the vocabulary."""
        return []

    def score(self, one: Contestant, turn: Turn) -> Score:
        """The perplexity of the contestant, and where it is compared, how far it is from the reference."""
        tokens, table, done = self.tokens(one), byte_lengths(one.tokenizer), 0
        protocol = self.protocol(self.compared(one))

        def watch(windows_done: int, _: int) -> None:
            nonlocal done
            turn.tick(math.ceil(windows_done / protocol.batch) - done)
            done = math.ceil(windows_done / protocol.batch)

        sizes = None if table is None else table[tokens]
        model = one.load().to(best_device())
        found = perplexity(model, tokens, protocol, sizes, watch, self._reference_of(one, model))
        found = replace(found, word_perplexity=per_word(found, count_words(one.tokenizer, tokens)))
        return to_score(found)

    def _reference_of(self, one: Contestant, model: PreTrainedModel) -> PreTrainedModel | None:
        """What to compare a loaded contestant with; a vocabulary padded to another length cannot be."""
        if not self.compared(one):
            return None
        reference = self.reference.load()
        return reference.to(best_device()) if reference.config.vocab_size == model.config.vocab_size else None


def count_words(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> int:
    """Words, which white space or the end of a document separates, in the text of tokens (N,)."""
    return sum(len(text.split()) for text in documents(tokenizer, tokens))


def documents(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> list[str]:
    """The texts that special tokens separate in tokens (N,)."""
    special = set(tokenizer.all_special_ids)
    rows = [list(row) for ends, row in groupby(tokens.tolist(), special.__contains__) if not ends]
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]


def per_word(found: Perplexity, words: int) -> float | None:
    """exp of the loss per word: the mean loss of a token times tokens per word. None where there are no words."""
    if not words:
        return None
    exponent = found.loss * found.tokens / words
    return math.exp(exponent) if exponent < 700 else None


def to_score(found: Perplexity) -> Score:
    """A perplexity as a kept score; what is not finite becomes None, what was not compared is left out."""
    compared = found.divergence is not None
    left_out = {"protocol"} if compared else {"protocol", "divergence", "agreement"}
    metrics = {name: value for name, value in asdict(found).items() if name not in left_out}
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
    return Score(finite, found.protocol, BESIDE if compared else "")


def from_score(score: Score) -> Perplexity:
    """The perplexity that `to_score` kept; an infinite one comes back as such."""
    metrics = dict(score.metrics)
    for name in ("loss", "perplexity"):
        metrics[name] = math.inf if metrics[name] is None else metrics[name]
    return Perplexity(**metrics, protocol=score.protocol)
