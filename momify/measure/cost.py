"""What a model costs, in closed form and from its config alone (design section 4); no weights, no torch.

A dense GPT-2 is the special case of a MoM whose step s has one choice, module s.
A multiply-add is one MAC and two FLOPs.
Everything here takes a config, or the `Shape` that it comes down to: `momify plan` has no config of a MoM yet.
Legend: B batch, T tokens, n = B*T, D width, I inner width, V vocabulary, M modules of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias

from momify.errors import MomifyError

if TYPE_CHECKING:  # it imports torch, which `momify plan` does without
    from transformers import PreTrainedConfig

Kind = Literal["mha", "ffn"]
KINDS: tuple[Kind, Kind] = ("mha", "ffn")


@dataclass(frozen=True)
class Pool:
    """The modules of one kind and what each step may choose from them; the choice `modules` is SKIP."""

    modules: int
    homes: tuple[int, ...]
    reach: tuple[tuple[int, ...], ...]

    def runs(self, step: int) -> bool:
        """Whether the step may choose any module at all; if not, it costs no more than its patch."""
        return any(choice != self.modules for choice in self.reach[step])

    def skips(self, step: int) -> bool:
        """Whether the step may choose SKIP."""
        return self.modules in self.reach[step]

    def shares(self, step: int) -> bool:
        """Whether the step is fixed to a module that is also the home of another step."""
        home = self.homes[step]
        return not self.routed(step) and self.runs(step) and self.homes.count(home) > 1

    def routed(self, step: int) -> bool:
        """Whether the step has a router: more than one choice."""
        return len(self.reach[step]) > 1

    @classmethod
    def fixed(cls, modules: int) -> Pool:
        """The pool of a dense model: module s is step s, and there is no choice."""
        return cls(modules, tuple(range(modules)), tuple((module,) for module in range(modules)))


@dataclass(frozen=True)
class Shape:
    """The sizes that parameters, MACs and memory follow from."""

    width: int
    inner: int
    vocab: int
    positions: int
    tied: bool
    layer_norms: int
    picks: int
    router_hidden: int
    mha: Pool
    ffn: Pool
    activation: str = "gelu_new"
    patch_rank: int = 0
    step_rank: int = 0

    def pool(self, kind: Kind) -> Pool:
        """The pool of one kind."""
        return self.mha if kind == "mha" else self.ffn

    def patched(self, kind: Kind, step: int) -> bool:
        """Whether SKIP adds a patch at the step."""
        return self.patch_rank > 0 and self.pool(kind).skips(step)

    def adapted(self, kind: Kind, step: int) -> bool:
        """Whether the step changes its module by a delta."""
        return self.step_rank > 0 and self.pool(kind).shares(step)

    @property
    def dense(self) -> bool:
        """Whether this is a GPT-2: each of its layers has LayerNorms of its own."""
        return self.layer_norms > 1

    @property
    def steps(self) -> int:
        """Rounds of assembly H; the layers of a dense model."""
        return len(self.mha.homes)


Sized: TypeAlias = "PreTrainedConfig | Shape"
"""What everything here is computed from."""


@dataclass(frozen=True)
class HalfStep:
    """What one half-step computed: `rows` pairs of token and module (a token with two modules counts twice).

    `kept`: tokens that skipped and whose key and value were computed all the same.
    `queries`: tokens that attention's core ran for. `largest`: rows of the busiest module (None: all of them).
    `skipped`: tokens that got the step's patch, by a share of SKIP; 0 where there is no patch.
    """

    step: int
    kind: Kind
    rows: int
    kept: int = 0
    queries: int = 0
    largest: int | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one forward pass, by part."""

    projections: float = 0
    attention: float = 0
    ffn: float = 0
    patches: float = 0
    deltas: float = 0
    routers: float = 0
    head: float = 0

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts().values())

    @property
    def flops(self) -> float:
        """Two per multiply-add."""
        return 2 * self.total

    def parts(self) -> dict[str, float]:
        """The parts by name, in the order of the forward pass."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part; a tied head counts in the embeddings only."""

    embeddings: int
    attention: int
    ffn: int
    patches: int
    deltas: int
    norms: int
    routers: int
    head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def shape_of(config: Sized) -> Shape:
    """The `Shape` of a GPT2Config or MomConfig; one that is given is given back.

    Raises MomifyError for any other model type.
    """
    if isinstance(config, Shape):
        return config
    if config.model_type == "gpt2":
        return _dense_shape(config)
    if config.model_type == "mom":
        return _mom_shape(config)
    raise MomifyError(f"model_type '{config.model_type}' has no cost formula here: give a gpt2 or mom config")


def _dense_shape(config: PreTrainedConfig) -> Shape:
    pool = Pool.fixed(config.n_layer)
    return Shape(
        width=config.n_embd,
        inner=config.n_inner or 4 * config.n_embd,
        vocab=config.vocab_size,
        positions=config.n_positions,
        tied=config.tie_word_embeddings,
        layer_norms=2 * config.n_layer + 1,
        picks=1,
        router_hidden=0,
        mha=pool,
        ffn=pool,
        activation=config.activation_function,
    )


def _mom_shape(config: PreTrainedConfig) -> Shape:
    return Shape(
        width=config.hidden_size,
        inner=config.intermediate_size,
        vocab=config.vocab_size,
        positions=config.n_positions,
        tied=config.tie_word_embeddings,
        layer_norms=1,  # the others have no parameters: their affine part lies in the modules
        picks=config.modules_per_token,
        router_hidden=config.router_hidden,
        mha=Pool(config.num_mha_modules, tuple(config.mha_homes), tuple(map(tuple, config.mha_reach))),
        ffn=Pool(config.num_ffn_modules, tuple(config.ffn_homes), tuple(map(tuple, config.ffn_reach))),
        activation=config.activation_function,
        patch_rank=config.patch_rank,
        step_rank=config.step_rank,
    )


def parameters(config: Sized) -> Parameters:
    """Parameters of the causal LM that `config` describes: they follow from the pool; the steps add small parts."""
    s = shape_of(config)
    routed = [(pool, step) for pool in (s.mha, s.ffn) for step in range(s.steps) if pool.routed(step)]
    patched = sum(s.patched(kind, step) for kind in KINDS for step in range(s.steps))
    adapted = [kind for kind in KINDS for step in range(s.steps) if s.adapted(kind, step)]
    return Parameters(
        embeddings=(s.vocab + s.positions) * s.width,
        attention=s.mha.modules * (4 * s.width**2 + 4 * s.width),
        ffn=s.ffn.modules * (2 * s.width * s.inner + s.inner + s.width),
        patches=patched * (2 * s.width * s.patch_rank + s.width),
        deltas=sum(s.step_rank * (inside + out) + out for kind in adapted for inside, out in matrices(s, kind)),
        norms=s.layer_norms * 2 * s.width,
        routers=sum(_router_parameters(s, pool) for pool, _ in routed),
        head=0 if s.tied else s.vocab * s.width,
    )


def matrices(s: Shape, kind: Kind) -> tuple[tuple[int, int], tuple[int, int]]:
    """(in, out) of the two matrices that a module consists of."""
    if kind == "mha":
        return (s.width, 3 * s.width), (s.width, s.width)
    return (s.width, s.inner), (s.inner, s.width)


def _router_parameters(s: Shape, pool: Pool) -> int:
    """A router is D -> M+1, or D -> R -> M+1, with biases."""
    choices = pool.modules + 1
    if s.router_hidden == 0:
        return s.width * choices + choices
    return s.width * s.router_hidden + s.router_hidden + s.router_hidden * choices + choices


def attention_steps(config: Sized) -> int:
    """Steps whose attention may run: each holds keys and values in the cache."""
    s = shape_of(config)
    return sum(s.mha.runs(step) for step in range(s.steps))


def kv_bytes_per_token(config: Sized, bytes_per_value: int = 2) -> int:
    """KV cache per token and sequence in bytes: 2 D values for each step that may run attention."""
    return 2 * shape_of(config).width * bytes_per_value * attention_steps(config)


def planned_usage(config: Sized, batch: int, tokens: int) -> tuple[HalfStep, ...]:
    """What each half-step computes if each token takes its home: exact for fixed routing, else a guess.

    With K > 1 a token takes its home and K - 1 of the other modules that it may choose.
    """
    s, n = shape_of(config), batch * tokens
    usage = []
    for step in range(s.steps):
        for kind in KINDS:
            pool = s.pool(kind)
            picks = min(s.picks, len(pool.reach[step]))
            modules = planned_modules(pool, step, picks)
            queries = n if modules and kind == "mha" else 0
            skipped = n if modules < picks and s.patched(kind, step) else 0
            usage.append(HalfStep(step, kind, modules * n, queries=queries, skipped=skipped))
    return tuple(usage)


def planned_modules(pool: Pool, step: int, picks: int) -> int:
    """Modules among the `picks` of a token that takes its home first; the other pick, if there is one, is SKIP."""
    if pool.homes[step] == pool.modules:
        picks -= 1
    return min(picks, len(pool.reach[step]) - pool.skips(step))


def dense_macs(config: Sized, batch: int, tokens: int) -> Macs:
    """MACs of a dense GPT-2 on B x T tokens without cache, the head on every token (design section 4)."""
    return _macs(shape_of(config), batch, tokens, planned_usage(config, batch, tokens))


def mom_macs(config: Sized, batch: int, tokens: int, usage: Sequence[HalfStep]) -> Macs:
    """MACs of a MoM on B x T tokens without cache, with the routing that was realised (`routing.realised`).

    `planned_usage` gives the `usage` of fixed routing.
    """
    return _macs(shape_of(config), batch, tokens, usage)


def _macs(s: Shape, batch: int, tokens: int, usage: Sequence[HalfStep]) -> Macs:
    n, square = batch * tokens, s.width**2
    mha = [half for half in usage if half.kind == "mha"]
    ffn = [half for half in usage if half.kind == "ffn"]
    return Macs(
        projections=sum(4 * square * half.rows + 2 * square * half.kept for half in mha),
        attention=sum(2 * tokens * s.width * half.queries for half in mha),
        ffn=sum(2 * s.width * s.inner * half.rows for half in ffn),
        patches=sum(2 * s.width * s.patch_rank * half.skipped for half in usage),
        deltas=sum(_delta_macs(s, half) for half in usage),
        routers=sum(_router_macs(s, half) * n for half in usage),
        head=s.width * s.vocab * n,
    )


def _delta_macs(s: Shape, half: HalfStep) -> int:
    """r (in + out) for each row of both matrices, where the step has a delta."""
    if not s.adapted(half.kind, half.step):
        return 0
    return half.rows * sum(s.step_rank * (inside + out) for inside, out in matrices(s, half.kind))


def _router_macs(s: Shape, half: HalfStep) -> int:
    """Per token: D (M+1), or D R + R (M+1); nothing where there is no choice."""
    pool = s.pool(half.kind)
    if not pool.routed(half.step):
        return 0
    choices = pool.modules + 1
    if s.router_hidden == 0:
        return s.width * choices
    return s.width * s.router_hidden + s.router_hidden * choices
