"""Bytes of activations at their peak, in closed form: what a forward pass holds beside weights and KV cache.

A forward pass is walked half-step by half-step. Each has moments at which much is alive at once; the largest, together
with the keys and values that the cache has taken up by then, is the peak. The moments are those of this project's
model and of transformers' GPT-2 with fused attention (no T x T matrix is ever held), without gradients.
Legend: n = B*T tokens of the call, S tokens in the cache before it, D width, I inner width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from momify.measure.cost import HalfStep, Shape, Sized, shape_of

# Tensors of n x I that the activation function holds at once, its input among them. gelu_new is written out in
# single operators (transformers' activations.py), the others are one operator each.
ALIVE_IN_ACTIVATION = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3}
ONE_OPERATOR = 2
KEPT_PER_PICK = 12  # bytes that a pick leaves until the pass ends: module (int64) and gate (float32)


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
    attended = {half.step for half in usage if half.queries}
    for half in usage:
        pool = s.pool(half.kind)
        if not pool.runs(half.step):
            continue
        if half.kind == "mha":
            cached += 2 * call.rows * s.width * size
        kept += _kept(s, half, call)
        if half.kind == "mha":
            moment = _attention(s, half, call)
        else:
            moment = _feed_forward(s, half, call, half.step in attended)
        peak = max(peak, cached + kept + moment * size)
    return max(peak, cached + kept + _head(s, call) * size) - cached


def _standing(s: Shape, call: Call) -> int:
    """Values alive throughout: token embeddings, the positions' (or, in a MoM, the sum of both), the step's input."""
    positions = call.tokens if s.dense else call.rows
    return (2 * call.rows + positions) * s.width


def _kept(s: Shape, half: HalfStep, call: Call) -> int:
    """Bytes that a half-step leaves for the record of the routing: float32 logits, modules and gates."""
    if s.dense:
        return 0
    pool = s.pool(half.kind)
    choices = len(pool.reach[half.step])
    logits = 4 * (pool.modules + 1) if pool.routed(half.step) else 0
    return call.rows * (logits + KEPT_PER_PICK * min(s.picks, choices))


def _attention(s: Shape, half: HalfStep, call: Call) -> int:
    """Values alive beside the cache: normalised input and q, k, v stand; then grouping, joining keys, projecting out.

    A cache grows by copying: while the keys of a step are joined, the old ones are still there.
    """
    n, d = call.rows, s.width
    gathered, largest = _gathered(half)
    standing = _standing(s, call) + (1 + 3) * n * d
    joining = call.batch * call.past * d
    keys = 2 * n * d if half.kept else 0  # of tokens that skip, made apart and then added
    out = n * d if half.queries else 0
    projecting, leaving = (gathered + 3 * largest) * d, keys + 2 * out + (gathered + largest) * d
    return standing + max(joining, projecting, 2 * keys, leaving)


def _feed_forward(s: Shape, half: HalfStep, call: Call, attended: bool) -> int:
    """The normalised input, attention's output and its sum where it ran, and the inner activations of one group."""
    n, d = call.rows, s.width
    gathered, largest = _gathered(half)
    inner = ALIVE_IN_ACTIVATION.get(s.activation, ONE_OPERATOR) * s.inner * (largest or half.rows)
    grouped = gathered * d + (n * d if gathered else 0)
    return _standing(s, call) + (3 if attended else 1) * n * d + grouped + inner


def _head(s: Shape, call: Call) -> int:
    """The last LayerNorm's output, and logits for the last token of each sequence."""
    return _standing(s, call) + call.rows * s.width + call.batch * s.vocab


def _gathered(half: HalfStep) -> tuple[int, int]:
    """Rows that are copied together by module, and those of the largest group; none if all go one way."""
    if half.largest is None or half.largest == half.rows:
        return 0, 0
    return half.rows, half.largest
