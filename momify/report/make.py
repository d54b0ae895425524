"""Measure a MoM beside its source and write report.json, report.md and report.html."""

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from momify.data.blocks import TokenData
from momify.devices import device_for
from momify.errors import MomifyError
from momify.evaluate.perplexity import Perplexity
from momify.files import read_json, write_json, write_text
from momify.measure.cost import kv_bytes_per_token, parameters
from momify.measure.latency import Latency, Timing, measure_latency
from momify.measure.macs import count_macs
from momify.measure.memory import measure_memory, weight_bytes
from momify.measure.routing import collect
from momify.recipe_blocks import DataBlock
from momify.report.data import SCHEMA_VERSION, Looks, Measured, Quality, Text, build_report
from momify.report.html import render_html
from momify.report.markdown import render_markdown
from momify.report.provenance import Origin, collect_provenance
from momify.screen import Progress

INPUTS = 32  # held-out blocks whose MACs are taken all three ways: routing depends on the text
SAME = 2  # blocks for a dense model, which does the same whatever the text
LARGE = 8  # sequences of the large batch
ROOM = 2 << 30  # bytes on a GPU beside weights and cache: the large batch's activations


@dataclass(frozen=True)
class Pair:
    """The two models that a report sets side by side, by name.

    whole: the source as a MoM that leaves nothing out, by whose memory and speed the MoM's are judged: what differs
    then is what was removed, and not that transformers writes the same network in other operators.
    """

    source_name: str
    source: PreTrainedModel
    whole: PreTrainedModel
    mom_name: str
    mom: PreTrainedModel

    @property
    def bytes(self) -> int:
        """Of the weights of both that are timed, and of the source's cache for the large batch."""
        config = self.source.config
        cache = LARGE * config.max_position_embeddings * kv_bytes_per_token(config, self.whole.dtype.itemsize)
        return weight_bytes(self.whole) + weight_bytes(self.mom) + cache

    def to(self, device: torch.device) -> None:
        """Move both that are timed to a device."""
        self.whole.to(device)
        self.mom.to(device)


def measure_pair(
    pair: Pair, data: TokenData, quality: Quality, origin: Origin, looks: Looks, progress: Progress
) -> dict[str, Any]:
    """report.json's dict: both models measured on the same held-out blocks, in one run; `looks` has the training.

    MACs are counted on the CPU, as counters do not see a GPU's kernels; memory and speed are those of the GPU where
    there is one with room for both, and the models stay there.
    """
    inputs = held_out_blocks(data)
    batches = [torch.cat(inputs[:count]) for count in sorted({1, min(LARGE, len(inputs))})]
    parts = 6
    macs = []
    for index, (model, counted) in enumerate(((pair.source, SAME), (pair.mom, INPUTS))):
        progress(index, parts)
        macs.append(count_macs(model, inputs, counted))
    progress(2, parts)
    looks = replace(looks, routing=collect(pair.mom, inputs))
    pair.to(device_for(pair.bytes + ROOM))
    memory = []
    for index, model in enumerate((pair.whole, pair.mom)):
        progress(3 + index, parts)
        memory.append(measure_memory(model, batches))
    memory[0] = replace(memory[0], weight_bytes=weight_bytes(pair.source))  # of the checkpoint, LayerNorms and all
    measured = [
        Measured(name, parameters(model.config), *found)
        for name, model, *found in zip(
            (pair.source_name, pair.mom_name), (pair.source, pair.mom), memory, macs, strict=True
        )
    ]
    progress(5, parts)
    looks = replace(looks, latency=tuple(time_pair(pair, batch) for batch in batches))
    progress(parts, parts)
    return build_report(*measured, quality, collect_provenance(origin), looks)


def held_out_blocks(data: TokenData) -> list[Tensor]:
    """At most INPUTS held-out blocks (1, T), all of one length."""
    tokens = data.valid_tensor(INPUTS * data.block_length)
    length = min(data.block_length, len(tokens))
    return [tokens[start : start + length].unsqueeze(0) for start in range(0, len(tokens) - length + 1, length)]


def time_pair(pair: Pair, batch: Tensor) -> Latency:
    """Both models on the prompts `batch` (B, T), cut to leave positions for at most 64 decoded tokens."""
    positions = pair.source.config.max_position_embeddings
    decode = max(1, min(64, positions // 4))
    prompt = max(1, min(batch.shape[1], positions - decode))
    return measure_latency({"source": pair.whole, "mom": pair.mom}, batch[:, :prompt], Timing(decode))


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json, report.md and report.html in `folder`, each whole or not at all."""
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report))


def read_report(path: Path) -> dict[str, Any]:
    """The report that `write_report` left in `path`, of this version or an older one.

    Raises MomifyError for what momify did not write: what cannot be shown is no report.
    """
    try:
        report = read_json(path)
        version, known = report["schema_version"], isinstance(report["provenance"], dict)
        if version == SCHEMA_VERSION:
            render_markdown(report)
    except (LookupError, TypeError, AttributeError, ValueError, MomifyError):
        known = False
    if not (known and isinstance(version, int) and 0 < version <= SCHEMA_VERSION):
        raise MomifyError(f"{path} is no report of momify; momify report makes it anew")
    return report


def quality_of(scored: dict[str, Perplexity], trained: bool, held_out: int, text: Text) -> Quality:
    """Perplexities by role (source, start, mom) as a report wants them; held_out: tokens that there are to score."""
    limited = scored["source"].tokens < held_out
    if not trained:
        return Quality(text, scored["source"], scored["mom"], limited=limited)
    return Quality(text, scored["source"], scored.get("start"), scored["mom"], limited)


def text_of(data: DataBlock, own: DataBlock) -> Text:
    """What is scored of `data`; own: the text that the model was made with."""
    return Text(tuple(data.valid or data.train), data.valid is None, data == own)


def command_line() -> str:
    """The command as typed, without the folder that momify lies in, for a shell to read again."""
    return shlex.join(["momify", *sys.argv[1:]])
