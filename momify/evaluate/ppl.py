"""The task `ppl`: held-out perplexity by one protocol, in bits per byte too, and how far from the source.

A ratio of perplexities also pays a model for what its source has wrong: an overfitted source is easily beaten on text
that it has not seen (docs/log.md). The divergence is 0 for a model that predicts as its source does, and for no other.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from momify.data.blocks import TokenData
from momify.devices import best_device
from momify.evaluate.byte_lengths import byte_lengths
from momify.evaluate.contestant import Contestant
from momify.evaluate.perplexity import Perplexity, Protocol, check_block, perplexity, windows
from momify.evaluate.results import Key, Score
from momify.evaluate.task import Baseline, Turn

_DECODED_AT_ONCE = 100_000  # tokens
_SHOWN = ("perplexity", "word_perplexity", "bits_per_byte", "loss", "divergence", "agreement")
BESIDE = (
    "divergence: mean KL(source || model) in nats a scored token, 0 for the source itself; "
    "agreement: % of scored tokens with the same likeliest token"
)


@dataclass(frozen=True)
class Ppl:
    """Held-out text, as tokens of each contestant's own tokenizer, and the protocol.

    Block and stride in tokens; a stride below the block slides the window. At most `limit` windows' worth of tokens.
    Predictions of others that read the same tokens are compared with those of `reference`.
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
        return self.text(one.tokenizer).valid_tensor(None if self.limit is None else self.limit * self.block)

    def key(self, one: Contestant) -> Key:
        """Weights, text (which names the tokenizer too), window, and the weights compared with."""
        window = {"limit": self.limit, "block": self.block, "stride": self.stride}
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
            turn.tick(windows_done // protocol.batch - done)
            done = windows_done // protocol.batch

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
