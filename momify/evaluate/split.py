"""One split of a task's data: its examples, and of how many they are a part."""

import random
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

Example = TypeVar("Example")


@dataclass(frozen=True)
class Split(Generic[Example]):
    """Examples to train or to score on, out of how many."""

    examples: tuple[Example, ...]
    whole: int

    @property
    def limited(self) -> bool:
        """Whether some were left out."""
        return len(self.examples) < self.whole

    def limit(self, most: int | None) -> "Split[Example]":
        """At most so many examples, drawn by a fixed seed (some files are sorted), in the file's order."""
        if most is None or most >= len(self.examples):
            return self
        chosen = sorted(random.Random(0).sample(range(len(self.examples)), most))
        return replace(self, examples=tuple(self.examples[place] for place in chosen))

    def counted(self) -> str:
        """1,000 of 3,668 (limited)."""
        return f"{len(self.examples):,}" + (f" of {self.whole:,} (limited)" if self.limited else "")
