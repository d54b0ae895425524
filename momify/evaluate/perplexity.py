"""Perplexity by the windowed protocol of the transformers docs; the protocol travels with the number."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from momify.errors import MomifyError

Progress = Callable[[int, int], None]  # windows done, windows in all


@dataclass(frozen=True)
class Protocol:
    """How text is cut into windows: `block` tokens each, `stride` tokens apart, `batch` windows at a time.

    Raises MomifyError for a block below 2 tokens, a stride outside 1..block, or a batch below 1.
    """

    block: int = 1024
    stride: int = 1024
    batch: int = 8

    def __post_init__(self) -> None:
        if self.block < 2:
            raise MomifyError(f"block {self.block} is too short: a window needs 2 tokens or more")
        if not 1 <= self.stride <= self.block:
            raise MomifyError(f"stride {self.stride} must lie in 1..{self.block} (the block): choose one")
        if self.batch < 1:
            raise MomifyError(f"batch {self.batch} must be at least 1 window: choose a larger one")

    def describe(self, tokens: int, dtype: torch.dtype, size: int | None = None) -> str:
        """One line that says what was measured, to stand beside the number; `size`: bytes of text in the tokens."""
        scored = "first token of a window unscored"
        if self.stride < self.block:
            scored = "every token but the first scored once"
        name = str(dtype).removeprefix("torch.")
        text = f"{tokens:,} tokens" if size is None else f"{tokens:,} tokens of {size:,} bytes"
        return f"block {self.block}, stride {self.stride}, {text}, {name}, {scored}"


@dataclass(frozen=True)
class Perplexity:
    """The mean loss (nats per scored token), what follows from it, and the protocol it was measured by."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    scored: int
    windows: int
    protocol: str
    word_perplexity: float | None = None
    """exp of the loss per word that white space separates: comparable between vocabularies."""
    divergence: float | None = None
    """How far predictions are from those of a reference: the mean KL(reference || model) per scored token, in nats."""
    agreement: float | None = None
    """Percent of the scored tokens for which both have the same likeliest token."""


@dataclass(frozen=True)
class Window:
    """Tokens `begin`..`end` of the text; the predictions of tokens `first`..`end` are scored."""

    begin: int
    first: int
    end: int


def windows(tokens: int, protocol: Protocol) -> Iterator[Window]:
    """The windows over `tokens` tokens of text, the last one shorter where it ends early.

    A window's first token has no prediction; it is scored by the window before where the two overlap.
    """
    scored_up_to = 0
    for begin in range(0, tokens, protocol.stride):
        end = min(begin + protocol.block, tokens)
        first = max(scored_up_to, begin + 1)
        if first < end:
            yield Window(begin, first, end)
        scored_up_to = end
        if end == tokens:
            return


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    protocol: Protocol,
    token_bytes: Tensor | None = None,
    progress: Progress | None = None,
    reference: PreTrainedModel | None = None,
) -> Perplexity:
    """Perplexity of a causal `model` on `tokens` (N,) int64; `token_bytes` (N,) gives bits per byte.

    `token_bytes` holds how many bytes of text each token stands for; those of the scored tokens count.
    `reference`, a model of the same vocabulary on the same device, gives divergence and agreement.
    Models are left in the mode (train, eval) they came in.
    Raises MomifyError for a text or block that does not fit the model, and for a reference of another vocabulary.
    """
    _check_fit(model, tokens, protocol, token_bytes)
    _check_reference(model, reference)
    plan = list(windows(len(tokens), protocol))
    sums, scored, size, done = _Sums(), 0, 0, 0
    with _evaluating(model, reference):
        for group in _batches(plan, protocol.batch):
            _add_group(sums, model, reference, tokens, group)
            scored += sum(w.end - w.first for w in group)
            if token_bytes is not None:
                size += sum(int(token_bytes[w.first : w.end].sum()) for w in group)
            done += len(group)
            if progress is not None:
                progress(done, len(plan))
    loss, compared = sums.nll / scored, reference is not None
    return Perplexity(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,  # exp overflows a float just above
        bits_per_byte=sums.nll / math.log(2) / size if size else None,
        tokens=len(tokens),
        scored=scored,
        windows=len(plan),
        protocol=protocol.describe(len(tokens), model.dtype, None if token_bytes is None else int(token_bytes.sum())),
        divergence=sums.divergence / scored if compared else None,
        agreement=100 * sums.same / scored if compared else None,
    )


@dataclass
class _Sums:
    """Over the scored tokens so far; in float64, as a million small terms want it."""

    nll: float = 0.0
    divergence: float = 0.0
    same: int = 0


@contextmanager
def _evaluating(*models: PreTrainedModel | None) -> Iterator[None]:
    """Dropout off; afterwards each model is in the mode it came in."""
    modes = [(model, model.training) for model in models if model is not None]
    try:
        for model, _ in modes:
            model.eval()
        yield
    finally:
        for model, training in modes:
            model.train(training)


def _batches(plan: list[Window], batch: int) -> Iterator[list[Window]]:
    """Groups of at most `batch` windows of one length (only the last is shorter): nothing is padded."""
    group: list[Window] = []
    for window in plan:
        same_length = not group or window.end - window.begin == group[0].end - group[0].begin
        if group and (len(group) == batch or not same_length):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


@torch.no_grad()
def _add_group(
    sums: _Sums, model: PreTrainedModel, reference: PreTrainedModel | None, tokens: Tensor, group: list[Window]
) -> None:
    """Add the scored tokens of some windows of one length."""
    inputs = torch.stack([tokens[w.begin : w.end] for w in group]).to(model.device)  # (B, T)
    logits = model(input_ids=inputs, use_cache=False).logits  # (B, T, V)
    theirs = None if reference is None else reference(input_ids=inputs, use_cache=False).logits
    for row, window in enumerate(group):
        first = window.first - window.begin
        log_p = logits[row, first - 1 : -1].float().log_softmax(-1)  # (n, V)
        sums.nll += F.nll_loss(log_p, inputs[row, first:], reduction="none").double().sum().item()
        if theirs is not None:
            log_q = theirs[row, first - 1 : -1].float().log_softmax(-1)
            apart = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)  # (n,)
            sums.divergence += apart.clamp_min(0).double().sum().item()  # below 0 by rounding
            sums.same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def _check_reference(model: PreTrainedModel, reference: PreTrainedModel | None) -> None:
    """Refuse predictions that cannot be compared one by one."""
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        ours, theirs = model.config.vocab_size, reference.config.vocab_size
        raise MomifyError(f"{ours} entries of vocabulary cannot be compared with a reference's {theirs}: name another")


def check_block(block: int, positions: int) -> None:
    """Raise MomifyError for windows of more tokens than a model has positions."""
    if block > positions:
        raise MomifyError(f"block {block} is longer than the model's {positions} positions: shorten it")


def _check_fit(model: PreTrainedModel, tokens: Tensor, protocol: Protocol, sizes: Tensor | None) -> None:
    """Refuse what would otherwise end in an index error, or in a number that means nothing."""
    positions, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if tokens.dim() != 1 or len(tokens) < 2:
        raise MomifyError(f"tokens of shape {tuple(tokens.shape)} cannot be scored: give a row of 2 or more")
    check_block(protocol.block, positions)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise MomifyError(f"token ids {low}..{high} do not fit {vocab} entries: use the model's own tokenizer")
    if sizes is not None and sizes.shape != tokens.shape:
        raise MomifyError(f"token_bytes has shape {tuple(sizes.shape)}, not {tuple(tokens.shape)}: one per token")
