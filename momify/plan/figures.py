"""What a conversion will cost, from the sizes alone: the same formulas that a report sets beside its measurements."""

from dataclasses import asdict, dataclass, replace

from momify.convert.homes import Alike, HomePlan, Request, check_request, choose_homes, with_step_rank
from momify.errors import MomifyError
from momify.measure.activations import Call, activation_bytes
from momify.measure.cost import (
    HalfStep,
    Pool,
    Shape,
    attention_steps,
    dense_macs,
    kv_bytes_per_token,
    mom_macs,
    parameters,
    planned_usage,
)

DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}
SERVED = 2  # bytes of a value while it serves: 16 bit


def planned_shape(dense: Shape, request: Request) -> Shape:
    """The shape of the MoM that `request` makes of a source. Raises MomifyError for what it cannot give."""
    check_request(request, dense.steps)
    request = with_step_rank(request, dense.width)
    for name, rank in (("patch_rank", request.patch_rank), ("step_rank", request.step_rank)):
        if not 0 <= rank <= dense.width:
            raise MomifyError(f"{name} is {rank}; use 0 (none) to {dense.width}, the source's width")
    return mom_shape(dense, choose_homes(Alike(dense.steps), request))


def mom_shape(dense: Shape, plan: HomePlan) -> Shape:
    """The shape of the MoM that `plan` makes of a source of shape `dense`."""
    return replace(
        dense,
        layer_norms=1,
        picks=plan.modules_per_token,
        mha=Pool(len(plan.mha_layers), plan.mha_homes, plan.mha_reach),
        ffn=Pool(len(plan.ffn_layers), plan.ffn_homes, plan.ffn_reach),
        patch_rank=plan.patch_rank,
        step_rank=plan.step_rank,
    )


@dataclass(frozen=True)
class Figures:
    """One model's costs. MACs of a sequence of `tokens` tokens: at the start, with each token at its home, and at most.

    `activations`: bytes at the peak of a prompt of that length, by batch size, in 16 bit.
    """

    tokens: int
    parameters: dict[str, int]
    weight_bytes: dict[str, int]
    kv_steps: int
    kv_bytes_per_token: int
    kv_bytes: int
    activations: dict[int, int]
    macs: float
    macs_at_most: float
    parts: dict[str, float]

    @property
    def flops(self) -> float:
        """Two per MAC."""
        return 2 * self.macs

    def to_dict(self) -> dict[str, object]:
        """For JSON, with what follows from it by division."""
        more = {
            "flops": self.flops,
            "macs_per_token": self.macs / self.tokens,
            "flops_per_token": self.flops / self.tokens,
        }
        return {**asdict(self), **more}


def figures_of(shape: Shape, tokens: int, batches: tuple[int, ...] = (1, 8)) -> Figures:
    """The figures of a dense model or a MoM for sequences of `tokens` tokens."""
    counts = parameters(shape)
    usage = planned_usage(shape, 1, tokens)
    macs = (dense_macs if shape.dense else mom_macs)(shape, 1, tokens, *([] if shape.dense else [usage]))
    kv = kv_bytes_per_token(shape, SERVED)
    return Figures(
        tokens=tokens,
        parameters={"total": counts.total, **counts.parts()},
        weight_bytes={name: size * counts.total for name, size in DTYPES.items()},
        kv_steps=attention_steps(shape),
        kv_bytes_per_token=kv,
        kv_bytes=kv * tokens,
        activations={
            batch: activation_bytes(shape, planned_usage(shape, batch, tokens), Call(batch, tokens, 0, SERVED))
            for batch in batches
        },
        macs=macs.total,
        macs_at_most=mom_macs(shape, 1, tokens, most_usage(shape, tokens)).total,
        parts=macs.parts(),
    )


def most_usage(shape: Shape, tokens: int) -> tuple[HalfStep, ...]:
    """What each half-step computes if every token runs as many modules as it may: the most that routing can cost."""
    usage = []
    for step in range(shape.steps):
        for kind in ("mha", "ffn"):
            pool = shape.pool(kind)
            picks = min(shape.picks, len(pool.reach[step]))
            modules = min(picks, len(pool.reach[step]) - pool.skips(step))
            queries = tokens if modules and kind == "mha" else 0
            skipped = tokens if modules < picks and shape.patched(kind, step) else 0
            usage.append(HalfStep(step, kind, modules * tokens, queries=queries, skipped=skipped))
    return tuple(usage)
