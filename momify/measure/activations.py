"""Bytes of activations at their peak, in closed form: what a forward pass holds beside weights and KV cache.

A forward pass is walked half-step by half-step. Each has moments at which much is alive at once; the largest, together
with the keys and values that the cache has taken up by then, is the peak. The moments are those of this project's
model with fused attention (no T x T matrix is ever held), without gradients. A GPT-2 counts as a MoM that leaves
nothing out, so that what differs is what was removed; transformers' own holds more.
Legend: n = B*T tokens of the call, S tokens in the cache before it, D width, I inner width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from momify.measure.cost import HalfStep, Shape, Sized, shape_of

# Tensors of n x I that an activation function holds at once, its input among them, where it is several operators.
ALIVE_IN_ACTIVATION = {"quick_gelu": 3}
ONE_OPERATOR = 2
KEPT_PER_PICK = 8  # bytes that a pick leaves until the pass ends, for the record: its module
KEPT_PER_ROW = 16  # of rows that were sorted: whose they are, and where they stand


@dataclass(frozen=True)
class Call:
    """One forward pass: `batch` sequences of `tokens` new tokens, `past` already in the cache; bytes of a value."""

    batch: int
    tokens: int
    past: int = 0
    bytes_per_value: int = 4

    @property
    def rows(self) -> int:
        """n = B*T."""
        return self.batch * self.tokens


def activation_bytes(config: Sized, usage: Sequence[HalfStep], call: Call) -> int:
    """Peak bytes beside weights and cache, with the routing in `usage`; the last token's logits included.

    The cache counts as it is at the end of the call: what a device must hold is weights + cache + this.
    """
    s, size = shape_of(config), call.bytes_per_value
    cached = kept = peak = 0
    added = {half.step for half in usage if half.queries or (half.kind == "mha" and half.skipped)}
    for half in usage:
        runs = s.pool(half.kind).runs(half.step)
        if not runs and not half.skipped:
            continue
        if half.kind == "mha" and runs:
            cached += 2 * call.rows * s.width * size
        kept += _kept(s, half, call)
        moment = _patch(s, half, call, half.step in added)
        if runs and half.kind == "mha":
            moment = max(moment, _attention(s, half, call))
        elif runs:
            moment = max(moment, _feed_forward(s, half, call, half.step in added))
        peak = max(peak, cached + kept + moment * size)
    return max(peak, cached + kept + _head(s, call) * size) - cached


def _standing(s: Shape, call: Call) -> int:
    """Values alive throughout: token embeddings, their sum with the positions', the step's input."""
    return 3 * call.rows * s.width


def _kept(s: Shape, half: HalfStep, call: Call) -> int:
    """Bytes that a half-step with a choice leaves for the record of the routing: float32 logits, and the picks."""
    pool = s.pool(half.kind)
    if not pool.routed(half.step):
        return 0
    logits = 4 * (pool.modules + 1)
    picks = KEPT_PER_PICK * min(s.picks, len(pool.reach[half.step]))
    return call.rows * (logits + picks) + (KEPT_PER_ROW * half.rows if _sorted(s, half) else 0)


def _attention(s: Shape, half: HalfStep, call: Call) -> int:
    """Values alive beside the cache: normalised input, then q, k, v, then attention's output and its projection.

    A cache that grows keeps a step's old keys and values until the new are there.
    """
    n, d = call.rows, s.width
    standing = _standing(s, call) + n * d
    joining = (3 * n + 2 * call.batch * call.past) * d
    projecting = n * d + _routed(s, half, call, 2 * d, n) if half.kept else _routed(s, half, call, 3 * d, half.rows)
    leaving = (4 * n * d + _routed(s, half, call, d, half.rows)) if half.queries else 0
    return standing + max(joining, projecting + _delta(s, half), leaving + _delta(s, half))


def _delta(s: Shape, half: HalfStep) -> int:
    """The rows between a delta's factors."""
    return half.rows * s.step_rank if s.adapted(half.kind, half.step) else 0


def _patch(s: Shape, half: HalfStep, call: Call, attended: bool) -> int:
    """What a half holds while the patch is computed and added: also the normalised input, and what the modules gave."""
    n, d = call.rows, s.width
    held = _standing(s, call) + (3 if attended and half.kind == "ffn" else 1) * n * d + (n * d if half.rows else 0)
    gathered = half.skipped * d if half.skipped < n else 0
    computing = 2 * gathered + half.skipped * s.patch_rank + n * d  # the rows, through both factors, put back
    adding = 2 * n * d if half.rows else 0
    return held + max(computing, adding) if half.skipped else 0


def _feed_forward(s: Shape, half: HalfStep, call: Call, attended: bool) -> int:
    """The normalised input, attention's output and its sum where it ran, and the inner activations of one group."""
    n, d = call.rows, s.width
    largest = half.rows if half.largest is None else half.largest
    alive = ALIVE_IN_ACTIVATION.get(s.activation, ONE_OPERATOR) * s.inner
    inner = max(alive, ONE_OPERATOR * s.inner + d) * largest  # input and output are there for the second product
    group = (half.rows * d if _sorted(s, half) else 0) + inner + _delta(s, half)
    held = (3 if attended else 1) * n * d
    return _standing(s, call) + held + max(group, _routed(s, half, call, d, half.rows))


def _routed(s: Shape, half: HalfStep, call: Call, out: int, rows: int) -> int:
    """Values of a routed product of `rows` rows, each `out` wide: gathered, of each module, put together, in order."""
    if not _sorted(s, half):
        return call.rows * out
    spread = call.rows * min(s.picks, len(s.pool(half.kind).reach[half.step]))
    summed = call.rows * out if spread > call.rows else 0
    return rows * s.width + (2 * rows + spread) * out + summed


def _head(s: Shape, call: Call) -> int:
    """The last LayerNorm's output, and logits for the last token of each sequence."""
    return _standing(s, call) + call.rows * s.width + call.batch * s.vocab


def _sorted(s: Shape, half: HalfStep) -> bool:
    """Whether the rows are put in order by module; with K = 1 there is no need to where all go one way."""
    several = s.picks > 1 and s.pool(half.kind).routed(half.step)
    return half.rows > 0 and (several or half.largest not in (None, half.rows))
