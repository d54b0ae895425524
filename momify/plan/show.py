"""Plans as tables and sentences for a terminal."""

from momify.amounts import amount, percent, size
from momify.plan.figures import Figures
from momify.plan.make import Plan
from momify.plan.search import Candidate
from momify.recipe_blocks import TrainBlock

HEAD = ("", "source", "MoM", "change", "set by")
FLAGS = "pool: --mha --ffn; steps: --mha-steps --ffn-steps --depth; K: --top-k; small parts: --patch-rank --step-rank"
SEARCH_HEAD = ("mha", "ffn", "mha-steps", "ffn-steps", "K", "depth", "params", "KV", "FLOPs at most")


def comparison(source: Figures, mom: Figures) -> list[tuple[str, ...]]:
    """Rows under HEAD: every figure before and after, and what changes it (FLAGS)."""
    tokens, pool, steps = source.tokens, "pool", "steps, K"
    numbers = [
        ("parameters", amount, source.parameters["total"], mom.parameters["total"], pool),
        *((f"weights, {name}", size, source.weight_bytes[name], mom.weight_bytes[name], pool)
          for name in ("float32", "bfloat16")),
        ("KV cache per token, 16 bit", size, source.kv_bytes_per_token, mom.kv_bytes_per_token, "mha steps"),
        (f"KV cache, {tokens:,} tokens", size, source.kv_bytes, mom.kv_bytes, "mha steps"),
        *((f"activations at peak, batch {batch}", size, source.activations[batch], mom.activations[batch], "")
          for batch in source.activations),
        ("MACs per token", amount, source.macs / tokens, mom.macs / tokens, steps),
        (f"MACs, {tokens:,} tokens", amount, source.macs, mom.macs, steps),
        (f"FLOPs, {tokens:,} tokens", amount, source.flops, mom.flops, steps),
    ]  # fmt: skip
    if mom.macs_at_most > mom.macs:
        numbers.append(("FLOPs at most, whatever is routed", amount, source.flops, 2 * mom.macs_at_most, steps))
    return [(name, show(old), show(new), percent(old, new), flag) for name, show, old, new, flag in numbers]


def training_lines(plan: Plan, settings: TrainBlock) -> list[str]:
    """What training takes, in words, and how it would fit the device."""
    cost, speed, device = plan.training, plan.speed, _with_article(plan.speed.device)
    names = ("weights", "gradients", "optimizer", "teacher", "activations")
    parts = ", ".join(f"{name} {size(getattr(cost, name))}" for name in names)
    batch = settings.micro_batch or settings.batch_size
    lines = [f"training, per GPU: {size(cost.bytes)} at the peak with {batch} sequences at once ({parts})"]
    if plan.micro_batch is None:
        lines.append(
            f"does not fit {device}, not even one sequence at once; train.fsdp=true shards it over several "
            "(and trains by AdamW)"
        )
    elif plan.micro_batch < batch:
        lines.append(f"fits {device} with train.micro_batch={plan.micro_batch}, which changes no result")
    took = f"{duration(cost.seconds)} on {device} at {cost.flops_per_second / 1e12:.3g} TFLOP/s ({speed.words})"
    return [*lines, f"{settings.steps:,} training steps: at most {took}, {cost.flops:.3g} FLOPs"]


def _with_article(device: str) -> str:
    """An a100, a v100: names of GPUs are spelled out."""
    return f"{'an' if device[0] in 'aefhilmnorsx' else 'a'} {device}"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def search_rows(found: list[Candidate], source: Figures) -> list[tuple[str, ...]]:
    """Rows under SEARCH_HEAD, costs as parts of the source's."""
    return [
        (
            *map(str, (one.request.mha, one.request.ffn, one.request.mha_steps, one.request.ffn_steps)),
            str(one.request.modules_per_token),
            str(one.request.depth),
            f"{one.figures.parameters['total'] / source.parameters['total']:.2f}x",
            f"{one.figures.kv_bytes / source.kv_bytes:.2f}x",
            f"{one.figures.macs_at_most / source.macs:.2f}x",
        )
        for one in found
    ]
