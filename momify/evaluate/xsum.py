"""The task `xsum`: learn to go on from a document with its summary, write summaries by beam search, score by ROUGE."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from momify.devices import best_device
from momify.errors import MomifyError
from momify.evaluate.batches import Batch, Ids, by_length, check_vocabulary, encode, end_of_text, pad, shuffled
from momify.evaluate.contestant import Contestant
from momify.evaluate.fine_tune import FineTuning, autocast, fine_tune
from momify.evaluate.heads import keep_head
from momify.evaluate.learned import Learned
from momify.evaluate.results import Score
from momify.evaluate.rouge import MAIN, TYPES, rouge, rouge_baselines
from momify.evaluate.task import Baseline, Turn
from momify.evaluate.xsum_data import Pair, XsumData

PROMPT = "\nTL;DR:"
_MICRO_TOKENS = 4_096  # padded tokens of a forward pass in training: as many as 32 examples of GLUE have at most
_DECODED_AT_ONCE = 16


@dataclass(frozen=True)
class Decoding:
    """How a summary is written."""

    beams: int = 4
    max_new_tokens: int = 60
    no_repeat_ngram: int = 3

    def describe(self) -> str:
        """The part of a protocol line that tells of it."""
        return (
            f"beams {self.beams}, at most {self.max_new_tokens} new tokens, "
            f"no {self.no_repeat_ngram}-gram twice in a summary, length penalty 1"
        )


@dataclass(frozen=True)
class Xsum(Learned):
    """XSUM with its data. `max_length` tokens of document, prompt and summary at most (None: the model's positions)."""

    data: XsumData
    settings: FineTuning
    decoding: Decoding = Decoding()
    max_length: int | None = None
    name: str = field(default="xsum", init=False)
    main: str = field(default=MAIN, init=False)
    shown: tuple[str, ...] = field(default=(MAIN, *TYPES), init=False)

    def _more(self) -> dict[str, Any]:
        return {**asdict(self.decoding), "max_length": self.max_length, "prompt": PROMPT}

    def check_fit(self, one: Contestant) -> None:
        """Raise MomifyError where prompt and summary alone are too long, as far as the positions are known."""
        super().check_fit(one)
        if lengths := [length for length in (self.max_length, one.positions) if length]:
            Reader(one.tokenizer, min(lengths), self.decoding.max_new_tokens)

    def work(self, one: Contestant) -> int:
        """Optimizer steps, and batches of summaries."""
        batches = -(-len(self.data.scored.examples) // _DECODED_AT_ONCE)
        return self.settings.steps(len(self.data.train.examples)) + batches

    def baselines(self) -> list[Baseline]:
        """The document's beginning, and one of its sentences."""
        return rouge_baselines(self.data)

    def score(self, one: Contestant, turn: Turn) -> Score:
        """Fine-tune the contestant with `turn.seed`, let it write a summary of each document, score them."""
        model = one.load().to(best_device())
        positions = model.config.max_position_embeddings
        reader = Reader(one.tokenizer, min(self.max_length or positions, positions), self.decoding.max_new_tokens)
        set_seed(turn.seed)
        use_cache, model.config.use_cache = model.config.use_cache, False
        rows = reader.training(self.data.train.examples)
        prompts = reader.prompts([pair.document for pair in self.data.scored.examples])
        check_vocabulary([*(ids for ids, _ in rows), *prompts], model.config.vocab_size)  # before hours of training
        fine_tune(model, self._steps(rows, reader, turn.seed), self.settings.steps(len(rows)), summary_loss,
                  self.settings, turn.tick)  # fmt: skip
        model.config.use_cache = use_cache
        summaries = self.write(model, reader, prompts, turn)
        if turn.keep:
            keep_head(turn.keep, model, one.tokenizer)
        references = [pair.summary for pair in self.data.scored.examples]
        return Score(rouge(references, summaries), self._protocol(reader.length))

    def write(self, model: PreTrainedModel, reader: "Reader", prompts: list[Ids], turn: Turn) -> list[str]:
        """What follows each prompt, in order."""
        written = [""] * len(prompts)
        for places in by_length([len(prompt) for prompt in prompts], _DECODED_AT_ONCE):
            with torch.no_grad(), autocast(model, self.settings):
                found = decode_batch(model, [prompts[place] for place in places], reader.end, self.decoding)
            for place, ids in zip(places, found, strict=True):
                written[place] = reader.tokenizer.decode(ids, skip_special_tokens=True).strip()
            turn.tick(1)
        return written

    def _steps(self, rows: list[tuple[Ids, int]], reader: "Reader", seed: int) -> Iterator[list[Batch]]:
        """Micro-batches of every optimizer step of all epochs."""
        lengths = [len(ids) for ids, _ in rows]
        for epoch in range(self.settings.epochs):
            for places in shuffled(lengths, self.settings.batch_size, f"{seed}/{epoch}"):
                size = max(1, _MICRO_TOKENS // max(lengths[place] for place in places))
                groups = [places[at : at + size] for at in range(0, len(places), size)]
                yield [training_batch([rows[place] for place in group], reader.end) for group in groups]

    def _protocol(self, length: int) -> str:
        return (
            f"{self.data.split} split: {self.data.scored.counted()} pairs; trained on {self.data.train.counted()}; "
            f"{self.settings.describe()}, max length {length}, loss on the summary alone, the last epoch's model "
            f"scored; {self.decoding.describe()}; F-measures of rouge-score, stemmed; {MAIN} is their mean"
        )


@dataclass(frozen=True)
class Reader:
    """Pairs to token ids: document, PROMPT, summary, end; the document loses its end so that all fits `length`.

    Room for `new` tokens of a summary is always left. Raises MomifyError where nothing of a document would fit.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    new: int

    def __post_init__(self) -> None:
        if self.length < self.new + len(self.between) + 1:
            raise MomifyError(
                f"xsum needs {self.new} positions for a summary and {len(self.between)} for its prompt, and there are "
                f"{self.length}; raise eval.max_length, or take a model with more positions"
            )

    @property
    def end(self) -> int:
        """The token that ends a summary, and pads."""
        return end_of_text(self.tokenizer)

    @cached_property
    def between(self) -> Ids:
        """What asks for a summary."""
        return encode(self.tokenizer, [PROMPT])[0]

    def prompt(self, document: Ids) -> Ids:
        """What a summary is to follow."""
        return [*document[: self.length - self.new - len(self.between)], *self.between]

    def prompts(self, documents: Sequence[str]) -> list[Ids]:
        """What a summary of each document is to follow."""
        return [self.prompt(document) for document in encode(self.tokenizer, documents)]

    def training(self, pairs: Sequence[Pair]) -> list[tuple[Ids, int]]:
        """Each pair's ids and how many of them, at the end, are to be learned."""
        documents = encode(self.tokenizer, [pair.document for pair in pairs])
        summaries = encode(self.tokenizer, [" " + pair.summary.strip() for pair in pairs])
        rows = []
        for document, summary in zip(documents, summaries, strict=True):
            target = [*summary[: self.new - 1], self.end]
            rows.append(([*self.prompt(document), *target], len(target)))
        return rows


def training_batch(rows: Sequence[tuple[Ids, int]], filler: int) -> Batch:
    """Rows padded on the left, so that what is learned stands at the end: labels (B, S), -100 where nothing is."""
    ids, mask = pad([ids for ids, _ in rows], filler, left=True)
    longest = max(count for _, count in rows)
    labels = torch.full((len(rows), longest), -100)
    for place, (row, count) in enumerate(rows):
        labels[place, longest - count :] = torch.tensor(row[-count:])
    return Batch(ids, mask, labels)


def summary_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Summed cross-entropy over the labels; logits are made for their positions alone."""
    count = batch.labels.shape[1]
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp_min(0)  # left padding shifts nothing
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=count + 1,
    ).logits[:, :-1]  # (B, S, V): each place's prediction of the next token
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100, reduction="sum")


class NoRepeatInSummary(LogitsProcessor):
    """No n-gram twice among the tokens from `start` on; generate's own switch would forbid the document's too."""

    def __init__(self, size: int, start: int) -> None:
        self.rule, self.start = NoRepeatNGramLogitsProcessor(size), start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.rule(input_ids[:, self.start :], scores)


def decode_batch(model: PreTrainedModel, prompts: Sequence[Ids], end: int, how: Decoding) -> list[Ids]:
    """The ids that follow each prompt, by beam search; prompts are padded on the left."""
    ids, mask = pad(prompts, end, left=True)
    found = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=how.max_new_tokens,
        num_beams=how.beams,
        logits_processor=LogitsProcessorList([NoRepeatInSummary(how.no_repeat_ngram, ids.shape[1])]),
        length_penalty=1.0,
        early_stopping=how.beams > 1,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return [row[ids.shape[1] :].tolist() for row in found]
