"""From measurements to report.json: one plain dict, described in docs/report-schema.md."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from momify.evaluate.perplexity import Perplexity
from momify.measure.cost import Parameters
from momify.measure.latency import Latency, Speed
from momify.measure.macs import MacCounts
from momify.measure.memory import Load, Memory
from momify.measure.routing import PoolUse, RoutingUse, StepUse
from momify.report.provenance import Provenance
from momify.report.words import Json, findings, verdict

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Measured:
    """What was measured on one model: the source, or the MoM made from it."""

    name: str
    parameters: Parameters
    memory: Memory
    """The source's is that of a MoM that leaves nothing out, so that its operators are the MoM's."""
    macs: MacCounts


@dataclass(frozen=True)
class Looks:
    """What is shown where it was looked at: speeds (one entry a batch size), routing, training curves, tasks."""

    latency: tuple[Latency, ...] = ()
    routing: RoutingUse | None = None
    training: Json | None = None
    tasks: list[Json] | None = None
    """What `momify eval` kept: summaries of momify.evaluate.compare."""


@dataclass(frozen=True)
class Text:
    """What was scored: paths or names of text, or what is held out of them. own: what the model's training looks at."""

    names: tuple[str, ...]
    held_out: bool
    own: bool

    def words(self, names: Iterable[str] | None = None) -> str:
        """Text held out of ...; the names as given unless others stand for them."""
        return ("text held out of " if self.held_out else "text of ") + ", ".join(names or self.names)

    def short(self) -> str:
        """The same without the folders of the machine that it lies on."""
        return self.words(Path(name).name if Path(name).exists() else name for name in self.names)


@dataclass(frozen=True)
class Quality:
    """Perplexity by one protocol: of the source, of the MoM as converted, of it trained; None where not measured.

    limited: a part of the text alone was scored. Raises ValueError where neither is known of the MoM.
    """

    text: Text
    source: Perplexity
    start: Perplexity | None
    trained: Perplexity | None = None
    limited: bool = False

    def __post_init__(self) -> None:
        if self.start is None and self.trained is None:
            raise ValueError("quality of the MoM is unknown: measure it as converted or trained")


def build_report(
    source: Measured, mom: Measured, quality: Quality, provenance: Provenance, looks: Looks | None = None
) -> Json:
    """The dict of report.json: plain JSON values, null for what was not measured or is not finite.

    The latencies hold the speeds of models named "source" and "mom". Raises ValueError where the two sides were
    not measured alike (dtype, input shape, protocol): such numbers must not stand beside each other.
    """
    _check_alike(source, mom, quality)
    looks = looks or Looks()
    report = _finite(
        {
            "schema_version": SCHEMA_VERSION,
            "source": source.name,
            "mom": mom.name,
            "parameters": _parameters(source, mom),
            "macs": _macs(source.macs, mom.macs),
            "memory": _memory(source.memory, mom.memory),
            "speed": _speed(looks.latency) if looks.latency else None,
            "perplexity": _perplexity(quality),
            "tasks": looks.tasks or None,
            "training": looks.training,
            "routing": None if looks.routing is None else _routing(looks.routing),
            "provenance": _provenance(provenance),
        }
    )
    return {"verdict": verdict(report), "findings": findings(report), **report}


def _check_alike(source: Measured, mom: Measured, quality: Quality) -> None:
    pairs = {
        "dtype": (source.memory.dtype, mom.memory.dtype),
        "memory input": tuple(
            [(load.phase, load.batch, load.tokens) for load in side.memory.loads] for side in (source, mom)
        ),
        "MAC input": ((source.macs.batch, source.macs.tokens), (mom.macs.batch, mom.macs.tokens)),
        "protocol": (quality.source.protocol, (quality.start or quality.source).protocol),
        "protocol after training": (quality.source.protocol, (quality.trained or quality.source).protocol),
    }
    for name, (before, after) in pairs.items():
        if before != after:
            raise ValueError(f"{name} is {before} for the source and {after} for the MoM: measure both alike")


def _parameters(source: Measured, mom: Measured) -> Json:
    sides = {"source": source.parameters, "mom": mom.parameters}
    return {side: {"total": found.total, **found.parts()} for side, found in sides.items()}


def _macs(source: MacCounts, mom: MacCounts) -> Json:
    return {
        "batch": source.batch,
        "tokens": source.tokens,
        "inputs": len(mom.closed),
        "source": _mac_side(source),
        "mom": _mac_side(mom),
    }


def _mac_side(counts: MacCounts) -> Json:
    return {
        "macs": counts.mean.total,
        "flops": counts.mean.flops,
        "parts": counts.mean.parts(),
        "ways": {name: asdict(found) for name, found in counts.ways().items()},
        "largest_difference": counts.largest_difference,
        "agree": counts.agree,
        "unsupported": _unsupported(counts),
    }


def _unsupported(counts: MacCounts) -> list[Json]:
    """Operators that fvcore left out, each once, whichever input it came up in."""
    found = {op.name: op for count in counts.fvcore for op in count.unsupported}
    return [{"operator": name, "kind": op.kind, "arithmetic": op.arithmetic} for name, op in sorted(found.items())]


def _memory(source: Memory, mom: Memory) -> Json:
    return {
        "dtype": source.dtype,
        "method": source.method,
        "source": _memory_side(source),
        "mom": _memory_side(mom),
    }


def _memory_side(memory: Memory) -> Json:
    return {
        "weight_bytes": memory.weight_bytes,
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "kv_bytes_per_token_measured": memory.kv_bytes_per_token_measured,
        "kv_steps": memory.kv_steps,
        "loads": [_load(load) for load in memory.loads],
    }


def _load(load: Load) -> Json:
    parts = {name: asdict(getattr(load, name)) for name in ("weights", "kv", "activations", "total")}
    return {"phase": load.phase, "batch": load.batch, "tokens": load.tokens, **parts}


def _speed(latencies: Sequence[Latency]) -> Json:
    first = latencies[0]
    return {
        "device": first.device,
        "dtype": first.dtype,
        "threads": first.threads,
        "runs": [_one_speed(one.batch, one.protocol, one.speeds["source"], one.speeds["mom"]) for one in latencies],
    }


def _one_speed(batch: int, protocol: str, source: Speed, mom: Speed) -> Json:
    return {
        "batch": batch,
        "protocol": protocol,
        "source": asdict(source),
        "mom": asdict(mom),
        "prefill_ratio": mom.prefill.median / source.prefill.median,
        "decode_ratio": mom.decode.median / source.decode.median,
    }


def _perplexity(quality: Quality) -> Json:
    return {
        "text": quality.text.words(),
        "own_text": quality.text.own,
        "protocol": f"{quality.source.protocol}; {quality.text.short()}"
        + (", a part of it alone (limited)" if quality.limited else ""),
        "limited": quality.limited,
        "source": _one_perplexity(quality.source),
        "mom_start": None if quality.start is None else _one_perplexity(quality.start),
        "mom_trained": None if quality.trained is None else _one_perplexity(quality.trained),
    }


def _one_perplexity(found: Perplexity) -> Json:
    return {
        "perplexity": found.perplexity,
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
        "divergence": found.divergence,
        "agreement": found.agreement,
        "tokens": found.tokens,
        "scored": found.scored,
    }


def _routing(use: RoutingUse) -> Json:
    return {
        "tokens": use.tokens,
        "mha": _pool_use(use.mha),
        "ffn": _pool_use(use.ffn),
        "steps": [_step_use(step) for step in use.steps],
    }


def _pool_use(pool: PoolUse) -> Json:
    return {"loads": list(pool.loads), "imbalance": pool.imbalance, "dead": list(pool.dead)}


def _step_use(use: StepUse) -> Json:
    return {
        "step": use.step,
        "kind": use.kind,
        "home": use.home,
        "choices": use.choices,
        "shares": list(use.shares),
        "skip_share": use.skip_share,
        "entropy": use.entropy,
        "patched": use.patched,
    }


def _provenance(found: Provenance) -> Json:
    return {
        **asdict(found.origin),
        "commit": found.commit,
        "versions": dict(found.versions),
        "machine": dict(found.machine),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
