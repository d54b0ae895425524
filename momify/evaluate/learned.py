"""What GLUE and XSUM have in common as tasks: a model learns from the data, as `settings` say, before it is scored."""

from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar

from momify.evaluate.batches import end_of_text
from momify.evaluate.contestant import Contestant
from momify.evaluate.fine_tune import FineTuning
from momify.evaluate.glue_data import GlueData
from momify.evaluate.results import Key
from momify.evaluate.xsum_data import XsumData


class Learned:
    """A part of `Task`: the seed of the fine-tuning changes the score, and more is better."""

    data: GlueData | XsumData
    settings: FineTuning
    seeded: ClassVar[bool] = True
    higher_is_better: ClassVar[bool] = True

    @property
    def limited(self) -> bool:
        """Whether a part of the data was left out."""
        return self.data.limited

    def check_fit(self, one: Contestant) -> None:
        """Raise MomifyError for a tokenizer without the token that pads."""
        end_of_text(one.tokenizer)

    def incomparable(self, first: Contestant, other: Contestant) -> None:
        """Nothing: all are scored on the same examples, whatever their tokens."""

    @cached_property
    def _data_hash(self) -> str:
        return self.data.sha256

    def key(self, one: Contestant) -> Key:
        """Weights, tokenizer, data, how it is learned, and what else the task's score depends on."""
        who = {"sha256": one.sha256, "tokenizer": one.tokenizer_sha256, "data": self._data_hash}
        return {**who, **asdict(self.settings), **self._more()}

    def _more(self) -> dict[str, Any]:
        """The settings that are the task's own."""
        raise NotImplementedError
