"""A GLUE task: fine-tune a classifier on its training set, score it on its dev set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from momify.devices import best_device
from momify.evaluate.batches import Batch, Ids, by_length, check_vocabulary, encode, end_of_text, join, pad, shuffled
from momify.evaluate.classifier import make_classifier
from momify.evaluate.contestant import Contestant
from momify.evaluate.fine_tune import FineTuning, autocast, fine_tune
from momify.evaluate.glue_baselines import glue_baselines
from momify.evaluate.glue_data import Example, GlueData
from momify.evaluate.glue_metrics import UNDEFINED, glue_metrics, is_undefined
from momify.evaluate.glue_tasks import GlueTask
from momify.evaluate.heads import keep_head
from momify.evaluate.learned import Learned
from momify.evaluate.results import Score
from momify.evaluate.split import Split
from momify.evaluate.task import Baseline, Turn

MAX_LENGTH = 128
BETWEEN = "\n"
"""Stands between the two sentences of a pair."""
_SCORED_AT_ONCE = 64


@dataclass(frozen=True)
class Glue(Learned):
    """One GLUE task with its data; at most `max_length` tokens an example, and never more than a model's positions."""

    spec: GlueTask
    data: GlueData
    settings: FineTuning
    max_length: int = MAX_LENGTH

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def main(self) -> str:
        return self.spec.metrics[0]

    @property
    def shown(self) -> tuple[str, ...]:
        return self.spec.metrics

    def _more(self) -> dict[str, Any]:
        return {"max_length": self.max_length, "between": BETWEEN}

    def work(self, one: Contestant) -> int:
        """Optimizer steps and scored batches."""
        scored = sum(-(-len(split.examples) // _SCORED_AT_ONCE) for split in self.data.dev.values())
        return self.settings.steps(len(self.data.train.examples)) + scored

    def baselines(self) -> list[Baseline]:
        """Majority class and guesses."""
        return glue_baselines(self.spec, self.data)

    def score(self, one: Contestant, turn: Turn) -> Score:
        """Fine-tune the contestant with `turn.seed` and score it; no dev example decides anything in training."""
        model = one.load()
        length = min(self.max_length, model.config.max_position_embeddings)
        model = make_classifier(model, self.spec.outputs, end_of_text(one.tokenizer), turn.seed).to(best_device())
        reader = _Reader(self.spec, one.tokenizer, length)
        set_seed(turn.seed)  # dropout; order and head have draws of their own
        train, dev = reader.read(self.data.train), {name: reader.read(split) for name, split in self.data.dev.items()}
        for encoded in (train, *dev.values()):  # before hours of training
            check_vocabulary(encoded.rows, model.config.vocab_size)
        fine_tune(model, self._steps(train, turn.seed), self.settings.steps(len(train.rows)), _loss, self.settings,
                  turn.tick)  # fmt: skip
        pairs = {suffix: self._predict(model, encoded, turn) for suffix, encoded in dev.items()}
        undefined = any("pearson" in self.main and is_undefined(predicted) for _, predicted in pairs.values())
        if turn.keep:
            keep_head(turn.keep, model, one.tokenizer)
        return Score(glue_metrics(self.spec, pairs), self._protocol(length), UNDEFINED if undefined else "")

    def _steps(self, train: "_Encoded", seed: int) -> Iterator[list[Batch]]:
        """Batches of all epochs, each shuffled anew by the seed."""
        for epoch in range(self.settings.epochs):
            for places in shuffled(train.lengths, self.settings.batch_size, f"{seed}/{epoch}"):
                yield [train.batch(places)]

    def _predict(self, model: PreTrainedModel, dev: "_Encoded", turn: Turn) -> tuple[list[float], list[float]]:
        """Labels and predictions of a set, in its order."""
        predicted = [0.0] * len(dev.rows)
        for places in by_length(dev.lengths, _SCORED_AT_ONCE):
            with torch.no_grad(), autocast(model, self.settings):
                batch = dev.batch(places).to(model.device)
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits  # (B, labels)
            found = logits[:, 0].float() if self.spec.regression else logits.argmax(dim=1)
            for place, value in zip(places, found.tolist(), strict=True):
                predicted[place] = value
            turn.tick(1)
        return dev.labels, predicted

    def _protocol(self, length: int) -> str:
        sets = ", ".join(split.counted() for split in self.data.dev.values())
        train = self.data.train.counted()
        return (
            f"dev set: {sets} examples; trained on {train}; {self.settings.describe()}, max length {length}, "
            "the last epoch's model scored"
        )


def _loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Summed cross-entropy, or squared error for a regression."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()  # (B, labels)
    if batch.labels.is_floating_point():
        return F.mse_loss(logits[:, 0], batch.labels, reduction="sum")
    return F.cross_entropy(logits, batch.labels, reduction="sum")


@dataclass(frozen=True)
class _Encoded:
    """A set as token ids and labels."""

    rows: list[Ids]
    labels: list[float]
    filler: int
    regression: bool

    @cached_property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def batch(self, places: Sequence[int]) -> Batch:
        """Examples by place, padded on the right; labels (B,) float for a regression, else int64."""
        ids, mask = pad([self.rows[place] for place in places], self.filler)
        kind = torch.float32 if self.regression else torch.int64
        return Batch(ids, mask, torch.tensor([self.labels[place] for place in places], dtype=kind))


@dataclass(frozen=True)
class _Reader:
    """Sentences to token ids, at most `length` of them."""

    spec: GlueTask
    tokenizer: PreTrainedTokenizerBase
    length: int

    def read(self, split: Split[Example]) -> _Encoded:
        """A set as a model reads it: one sentence, or two with a line feed between them."""
        examples = split.examples
        rows = encode(self.tokenizer, [example.texts[0] for example in examples])
        if len(self.spec.texts) == 2:
            between = encode(self.tokenizer, [BETWEEN])[0]
            seconds = encode(self.tokenizer, [example.texts[1] for example in examples])
            rows = [join(row, between, second, self.length) for row, second in zip(rows, seconds, strict=True)]
        rows = [row[: self.length] for row in rows]
        labels = [example.label for example in examples]
        return _Encoded(rows, labels, end_of_text(self.tokenizer), self.spec.regression)
