"""The rows that report.md and report.html both show, from the dict of report.json: each number once in words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from momify.amounts import amount, percent, size, three_figures
from momify.report.words import PHASES, Json, load_name, perplexity_percent, perplexity_text, quality_numbers

Show = Callable[[float], str]
MODELS = {"source": "source", "mom": "MoM"}
WAYS = {"closed_form": "closed form", "fvcore": "fvcore", "torch": "torch FlopCounterMode"}
OPERATORS = {"elementwise": "arithmetic, but no product", "movement": "no arithmetic", "unknown": "unknown"}
PARTS = {
    "embeddings": "embeddings", "head": "output head", "projections": "attention projections",
    "attention": "attention core", "ffn": "feed-forward", "norms": "norms", "routers": "routers",
    "patches": "patches of SKIP", "deltas": "step deltas",
    "weights": "weights", "kv": "KV cache", "activations": "activations",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One number before and after."""

    name: str
    show: Show
    before: float
    after: float

    def cells(self) -> list[str]:
        """Name, before, after, change in per cent."""
        return [self.name, self.show(self.before), self.show(self.after), percent(self.before, self.after)]


def change(name: str, show: Show, report: Json, block: str, key: str) -> Change:
    """The number `key` of both models in a block of the report."""
    return Change(name, show, *(report[block][side][key] for side in MODELS))


def size_rows(report: Json) -> list[Change]:
    """What a conversion is for: weights, arithmetic, cache."""
    dtype = report["memory"]["dtype"]
    return [
        change("Parameters", amount, report, "parameters", "total"),
        change(f"Weights, {dtype}", size, report, "memory", "weight_bytes"),
        change("MACs per input", amount, report, "macs", "macs"),
        change(f"KV cache per token, {dtype}", size, report, "memory", "kv_bytes_per_token"),
    ]


def part_rows(show: Show, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Change]:
    """By part of PARTS: the numbers of both models, where one of them has any."""
    names = PARTS if "projections" in before else {**PARTS, "attention": "attention"}  # of weights: all of it
    return {
        part: Change(names[part], show, before[part], after[part]) for part in before if before[part] or after[part]
    }


def quality_rows(perplexity: Json) -> list[list[str]]:
    """Model, perplexity, its change, loss, bits per byte, divergence, agreement; a MoM that was not trained is none."""
    names = {"source": "source", "mom_start": "MoM as converted", "mom_trained": "MoM, trained"}
    source = perplexity["source"]
    return [
        [name, perplexity_text(found), "" if key == "source" else perplexity_percent(source, found),
         *quality_numbers(found)]
        for key, name in names.items() if (found := perplexity[key]) is not None or key == "mom_start"
    ]  # fmt: skip


def load_rows(memory: Json) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Load, model, and for each part the bytes measured and those by formula."""
    return [
        (load_name(load), name, [_beside(load[part]) for part in ("weights", "kv", "activations", "total")])
        for pair in zip(memory["source"]["loads"], memory["mom"]["loads"], strict=True)
        for name, load in zip(MODELS.values(), pair, strict=True)
    ]


def _beside(found: Json) -> tuple[str, str]:
    off = (found["formula"] - found["measured"]) / found["measured"] if found["measured"] else 0
    return size(found["measured"]), size(found["formula"]) if abs(off) >= 0.005 else "the same"


@dataclass(frozen=True)
class SpeedRow:
    """One phase at one batch size: the spread of each model over the rounds, and the ratio of their medians."""

    name: str
    spreads: Mapping[str, Json]
    ratio: float


def speed_rows(speed: Json) -> list[SpeedRow]:
    """One a batch size and phase."""
    return [
        SpeedRow(f"{label}, batch {run['batch']}", {side: run[side][phase] for side in MODELS}, run[f"{phase}_ratio"])
        for run in speed["runs"]
        for phase, label in PHASES.items()
    ]


def rate(value: float) -> str:
    """Tokens per second: three figures, or all of them with their commas."""
    return f"{value:,.0f}" if value >= 1000 else three_figures(value)


def rate_range(spread: Json) -> str:
    """Slowest to fastest round."""
    return " to ".join(rate(spread[end]) for end in ("low", "high"))


def way_rows(macs: Json) -> list[list[str]]:
    """Model and way of counting, inputs, mean, least, most, deviation."""
    return [
        [f"{name}, {label}", str(found["inputs"]), f"{found['mean']:,.0f}",
         *(amount(found[key]) for key in ("low", "high", "deviation"))]
        for side, name in MODELS.items()
        for way, label in WAYS.items() if (found := macs[side]["ways"].get(way))
    ]  # fmt: skip


def operator_lines(side: Json) -> dict[str, str]:
    """By kind of OPERATORS: what fvcore left out of one model's count."""
    listed = {
        kind: [op["operator"].removeprefix("aten::") for op in side["unsupported"] if op["kind"] == kind]
        for kind in OPERATORS
    }
    return {kind: ", ".join(names) for kind, names in listed.items() if names}


def fact_rows(provenance: Json) -> list[list[str]]:
    """Where the numbers come from."""
    facts = {
        "source": provenance["source"],
        "its SHA-256": provenance["source_sha256"],
        "seed": provenance["seed"],
        "commit": provenance["commit"] or "not from a checkout",
    }
    return [
        [str(name), str(value)]
        for part in (facts, provenance["versions"], provenance["machine"])
        for name, value in part.items()
    ]
