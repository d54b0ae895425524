"""Measure a MoM beside its source and write report.json and report.md."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from momify.data.blocks import TokenData
from momify.evaluate.perplexity import Perplexity
from momify.files import write_json, write_text
from momify.measure.cost import parameters
from momify.measure.latency import Timing, measure_latency
from momify.measure.macs import count_macs
from momify.measure.memory import measure_memory
from momify.measure.routing import collect
from momify.report.data import Measured, Quality, build_report
from momify.report.markdown import render_markdown
from momify.report.provenance import Origin, collect_provenance
from momify.screen import Progress

INPUTS = 32  # held-out blocks whose MACs are taken: routing depends on the text
COUNTED = 2  # of them, those on which the slow counters run too


@dataclass(frozen=True)
class Pair:
    """The two models that a report sets side by side, by name."""

    source_name: str
    source: PreTrainedModel
    mom_name: str
    mom: PreTrainedModel


def measure_pair(pair: Pair, data: TokenData, quality: Quality, origin: Origin, progress: Progress) -> dict[str, Any]:
    """report.json's dict: both models measured on the same held-out blocks, in one run."""
    inputs = held_out_blocks(data)
    measured = []
    for index, (name, model) in enumerate(((pair.source_name, pair.source), (pair.mom_name, pair.mom))):
        progress(index, 4)
        counts = count_macs(model, inputs, COUNTED)
        measured.append(Measured(name, parameters(model.config), measure_memory(model, inputs[0]), counts))
    progress(2, 4)
    latency = measure_latency({"source": pair.source, "mom": pair.mom}, timing_for(pair.source))
    progress(3, 4)
    routing = collect(pair.mom, inputs)
    progress(4, 4)
    return build_report(*measured, quality, collect_provenance(origin), latency, routing)


def held_out_blocks(data: TokenData) -> list[Tensor]:
    """At most INPUTS held-out blocks (1, T), all of one length."""
    tokens = data.valid_tensor(INPUTS * data.block_length)
    length = min(data.block_length, len(tokens))
    return [tokens[start : start + length].unsqueeze(0) for start in range(0, len(tokens) - length + 1, length)]


def timing_for(model: PreTrainedModel) -> Timing:
    """Three quarters of the positions as prompt, at most 64 tokens decoded."""
    positions = min(1024, model.config.max_position_embeddings)
    decode = max(1, min(64, positions // 4))
    return Timing(prompt=max(1, positions - decode), decode=decode)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json and report.md in `folder`, each whole or not at all."""
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", render_markdown(report))


def quality_of(scored: dict[str, Perplexity], trained: bool) -> Quality:
    """Perplexities by role (source, start, mom) as a report wants them."""
    if not trained:
        return Quality(scored["source"], scored["mom"])
    return Quality(scored["source"], scored.get("start", scored["mom"]), scored["mom"])


def command_line() -> str:
    """The command as typed, without the folder that momify lies in."""
    return " ".join(["momify", *sys.argv[1:]])
