"""ROUGE-1, 2 and L by rouge-score, times 100, and what they are without a model."""

import random
import re
from collections.abc import Sequence
from statistics import mean

from momify.evaluate.task import Baseline
from momify.evaluate.xsum_data import XsumData

TYPES = ("rouge1", "rouge2", "rougeL")
MAIN = "rouge"
"""The mean of the three."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def rouge(references: Sequence[str], summaries: Sequence[str]) -> dict[str, float]:
    """Mean F-measures over the pairs, words stemmed; the main one, their mean, first."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(TYPES), use_stemmer=True)
    scores = [scorer.score(reference, found) for reference, found in zip(references, summaries, strict=True)]
    each = {kind: 100 * mean(score[kind].fmeasure for score in scores) for kind in TYPES}
    return {MAIN: mean(each.values()), **each}


def rouge_baselines(data: XsumData) -> list[Baseline]:
    """The document's first words, as many as training summaries have on average; and one of its sentences by chance."""
    words = round(mean(len(pair.summary.split()) for pair in data.train.examples))
    references = [pair.summary for pair in data.scored.examples]
    documents = [pair.document for pair in data.scored.examples]
    draw = random.Random(0)
    leads = [" ".join(document.split()[:words]) for document in documents]
    drawn = [draw.choice([s for s in _SENTENCE.split(document) if s.strip()]) for document in documents]
    return [
        Baseline("lead", f"the document's first {words} words", rouge(references, leads)),
        Baseline("random", "a sentence of the document, drawn with seed 0", rouge(references, drawn)),
    ]
