"""What a conversion takes away, in plain words and as rows of a table (the command line draws them)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import GPT2Config

from momify.amounts import amount, size
from momify.convert.homes import NOUNS, HomePlan
from momify.convert.importance import Importance
from momify.measure.cost import (
    attention_steps,
    dense_macs,
    kv_bytes_per_token,
    mom_macs,
    parameters,
    planned_usage,
)
from momify.model import MomConfig

COST_HEAD = ("", "before", "after", "ratio", "changed by")


@dataclass(frozen=True)
class Removals:
    """The texts: sentences, one row per layer or added step, and what it costs before and after."""

    lines: tuple[str, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    costs: tuple[tuple[str, ...], ...]  # under COST_HEAD


def removal_rows(plan: HomePlan, importance: Importance, source: GPT2Config, target: MomConfig) -> Removals:
    """Everything that `momify convert` says before it removes anything; costs with each token at its home."""
    lines = (
        _summary(plan, source, target),
        *(_reused(plan, kind) for kind in NOUNS if _reused(plan, kind)),
        *_stand_in_lines(source, target),
        *_depth_lines(plan),
        *_trial_lines(importance),
        *_loss_lines(plan, importance),
        *(["--init random: routers are drawn at random, so the start loses far more"] if plan.init == "random" else []),
        "--mha and --ffn set the pool: weights; --mha-steps, --ffn-steps and --depth set what runs: compute; "
        "--mha-steps (by default one per attention module) also sets the KV cache",
    )
    head = ("layer", "attention", importance.measure, "feed-forward", importance.measure)
    return Removals(lines, head, _layer_rows(plan, importance), _cost_rows(source, target))


def _summary(plan: HomePlan, source: GPT2Config, target: MomConfig) -> str:
    """Removes 6 of 12 attention modules (layers 0, 3, ...) and ...; 33% of block weights; ..."""
    removed = " and ".join(_removed(plan, kind) for kind in NOUNS)
    before, after = (_block_weights(config) for config in (source, target))
    steps, ran, ffn = len(plan.step_layers), attention_steps(target), len(plan.running_steps("ffn"))
    if not any(_gone(plan, kind) for kind in NOUNS):
        head = "removes no module"
    else:
        head = f"removes {removed}; {1 - after / before:.0%} of block weights"
    return f"{head}; attention runs at {ran} of {steps} steps, feed-forward at {ffn} of {steps}"


def _removed(plan: HomePlan, kind: str) -> str:
    """6 of 12 attention modules (layers 0, 3, 4)."""
    gone = _gone(plan, kind)
    where = f" (layer{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))})" if gone else ""
    return f"{len(gone) or 'none'} of {plan.num_layers} {NOUNS[kind]} modules{where}"


def _gone(plan: HomePlan, kind: str) -> list[int]:
    """Source layers whose module is not in the pool."""
    return sorted(set(range(plan.num_layers)) - set(plan.layers(kind)))


def _block_weights(config: GPT2Config | MomConfig) -> int:
    """Parameters of the modules alone, without embeddings, norms and routers."""
    counts = parameters(config)
    return counts.attention + counts.ffn


def _reused(plan: HomePlan, kind: str) -> str:
    """Which removed half-layers run another layer's module; empty if none."""
    pairs = []
    for step, layer in enumerate(plan.step_layers):
        home = plan.home_layer(kind, step)
        if layer is not None and home not in (None, layer):
            pairs.append(f"{layer} runs {home}'s")
    return f"{NOUNS[kind]} of removed layers that still runs: layer {', layer '.join(pairs)}" if pairs else ""


def _stand_in_lines(source: GPT2Config, target: MomConfig) -> list[str]:
    """What patches and step deltas there are, with their parameters and MACs; costs as in `_cost_rows`."""
    counts, length = parameters(target), source.n_positions
    macs = mom_macs(target, 1, length, planned_usage(target, 1, length))
    found = (
        ("patches", target.patch_rank, target.patched, counts.patches, macs.patches),
        ("changes to shared modules", target.step_rank, target.adapted, counts.deltas, macs.deltas),
    )
    lines = []
    for noun, rank, steps_of, numbers, spent in found:
        steps = " and ".join(f"{len(steps_of(kind))} {NOUNS[kind]}" for kind in NOUNS)
        if numbers:
            lines.append(
                f"{noun} of rank {rank} at {steps} steps: {numbers:,} parameters ({numbers / counts.total:.1%}), "
                f"{spent / macs.total:.1%} of the MACs"
            )
    return lines


def _depth_lines(plan: HomePlan) -> list[str]:
    """What a depth other than the source's changes."""
    kept = {layer for layer in plan.step_layers if layer is not None}
    dropped = [str(layer) for layer in range(plan.num_layers) if layer not in kept]
    added = [str(step) for step, layer in enumerate(plan.step_layers) if layer is None]
    lines = []
    if dropped:
        lines.append(f"--depth {len(plan.step_layers)} drops {len(dropped)} whole layers: {', '.join(dropped)}")
    if added:
        lines.append(f"--depth {len(plan.step_layers)} adds steps {', '.join(added)}, which skip until routers learn")
    return lines


def _trial_lines(importance: Importance) -> list[str]:
    """How far each way's choice was from the source after its short training."""
    if not importance.trials:
        return []
    came = ", ".join(f"{trial.method} {_nats(trial.divergence)}" for trial in importance.trials)
    return [
        f"chosen by {importance.method}: nats from the source's predictions after a trial on "
        f"{importance.trials[0].tokens:,} tokens each: {came}"
    ]


def _nats(distance: float | None) -> str:
    return "no number" if distance is None else f"{distance:.4f}"


def _loss_lines(plan: HomePlan, importance: Importance) -> list[str]:
    """The calibration loss before and after, where just this plan's removals were measured together."""
    gone = {(kind, layer) for kind in NOUNS for layer in range(plan.num_layers) if _is_gone(plan, kind, layer)}
    done: set[tuple[str, int]] = set()
    for removal in importance.removals:
        done.add((removal.kind, removal.layer))
        if done == gone and removal.loss is not None:
            return [
                f"calibration loss {importance.base_loss:.3f} -> {removal.loss:.3f} nats per token "
                f"with these left out, {_whose(importance)} ({importance.tokens:,} tokens, {importance.method})"
            ]
    return []


def _whose(importance: Importance) -> str:
    of = {"layerdrop": "of a copy that learned to do without", "fitted": "after the fit, on other text"}
    return of.get(importance.method, "before training")


def _is_gone(plan: HomePlan, kind: str, layer: int) -> bool:
    """Whether the source layer's own module is left out: not in the pool, or no step for it."""
    return layer not in plan.layers(kind) or layer not in plan.step_layers


def _layer_rows(plan: HomePlan, importance: Importance) -> tuple[tuple[str, ...], ...]:
    """One row per source layer, and per added step where it stands."""
    rows = []
    step_of = {layer: step for step, layer in enumerate(plan.step_layers) if layer is not None}
    added = {step for step, layer in enumerate(plan.step_layers) if layer is None}
    reached = 0
    for layer in range(plan.num_layers):
        step = step_of.get(layer)
        if step is not None:
            rows += [_added_row(plan, between) for between in range(reached, step) if between in added]
            reached = step + 1
        rows.append(_layer_row(plan, importance, layer, step))
    return tuple(rows + [_added_row(plan, step) for step in range(reached, len(plan.step_layers))])


def _layer_row(plan: HomePlan, importance: Importance, layer: int, step: int | None) -> tuple[str, ...]:
    cells = [str(layer)]
    for kind in NOUNS:
        cells += [_fate(plan, kind, layer, step), _signed(importance, kind, layer)]
    return tuple(cells)


def _signed(importance: Importance, kind: str, layer: int) -> str:
    """Loss increase of the removal; of leaving this one out alone where it stays."""
    return f"{importance.cost(kind, layer):+.4f}" if importance.tokens else "-"


def _fate(plan: HomePlan, kind: str, layer: int, step: int | None) -> str:
    """kept, removed, reuses 3, in the pool only; with a step's own change to the module, or a patch in its place."""
    in_pool = layer in plan.layers(kind)
    home = None if step is None else plan.home_layer(kind, step)
    changed = ", changed" if step in plan.adapted(kind) else ""
    if home == layer:
        return f"kept{changed}"
    if in_pool:
        return "in the pool, no step of its own"
    if home is not None:
        return f"removed, runs {home}'s{changed}"
    return "removed, patched" if step in plan.patched(kind) else "removed"


def _added_row(plan: HomePlan, step: int) -> tuple[str, ...]:
    runs = ["may run" if step in plan.running_steps(kind) else "skips" for kind in NOUNS]
    return ("+", f"added, {runs[0]}", "-", f"added, {runs[1]}", "-")


def _cost_rows(source: GPT2Config, target: MomConfig) -> tuple[tuple[str, ...], ...]:
    """Parameters, MACs and KV cache before and after, and the flag that changes each."""
    length = source.n_positions
    after = mom_macs(target, 1, length, planned_usage(target, 1, length)).total
    numbers: Sequence[tuple[str, Callable[[float], str], float, float, str]] = (
        ("parameters", amount, parameters(source).total, parameters(target).total, "--mha --ffn"),
        ("block weights", amount, _block_weights(source), _block_weights(target), "--mha --ffn"),
        (
            f"MACs, {length} tokens",
            amount,
            dense_macs(source, 1, length).total,
            after,
            "--mha-steps --ffn-steps --depth",
        ),
        (
            "KV cache per token, 16 bit",
            size,
            kv_bytes_per_token(source),
            kv_bytes_per_token(target),
            "--mha-steps",
        ),
    )
    return tuple((name, show(old), show(new), f"{new / old:.2f}x", flag) for name, show, old, new, flag in numbers)
