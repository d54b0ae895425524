"""Run or patch, token by token: what a router can win over leaving half-layers out for good, before any training.

Every module is kept; a half-step's SKIP has a patch (`mom.patch_rank`), fitted on the residuals that the compressed
model has there. For each pair of shares of attention and feed-forward work that is skipped: whole half-layers (static),
random tokens, those that a fitted router picks (momify/convert/routers.py), the tokens whose skipping costs least
(oracle: not to be had, as it runs the module, and the source, to know). "own": a patch stands in for its own module and
nothing else is fitted; otherwise patches and what runs aim at the source's residual. Ratios are perplexities over the
source's on held-out blocks, float32.

    python benchmarks/routing.py --source builtin:demo --data builtin:demo
    python benchmarks/routing.py --train 300

With --train: recovery of models of equal MACs, static and routed, from the same source on the same batches.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from routed_training import train_table
from torch import Tensor

from momify.convert.assemble import assemble, network_of
from momify.convert.homes import Request, choose_homes
from momify.convert.importance import Importance, measure_importance
from momify.convert.network import Network
from momify.convert.refit import Fitting, refit
from momify.convert.routers import Line, Parts, everyone, fit_line, fit_patch, twin
from momify.convert.source import Source, open_source
from momify.convert.walk import Decide, Fork, halves, split, walk
from momify.data.blocks import load_tokens
from momify.data.tokenizer import load_tokenizer
from momify.measure.stakes import Place, loss_metrics, stakes
from momify.model import MomForCausalLM
from momify.model.layout import HalfStep
from momify.models import locate
from momify.recipe_blocks import DataBlock

SHARES = ((0.25, 0.25), (0.5, 0.25), (0.5, 0.5))
KINDS = ("mha", "ffn")
_WALKS = 4  # until the thresholds and what they change have found each other
_TURNS = 1


@dataclass
class Policy:
    """Who skips: tokens whose score lies below their kind's threshold. Subclasses say what the score is."""

    model: MomForCausalLM
    metrics: dict[Place, Tensor]
    parts: Parts | None = None  # what is fitted towards the source's residual; None: patches alone, to their modules
    thresholds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, -math.inf))
    scores: dict[Place, Tensor] = field(default_factory=dict)
    lines: dict[Place, Line] = field(default_factory=dict)
    quality: dict[Place, float] = field(default_factory=dict)  # R2 of log cost, of the last walk

    def score(self, place: Place, fork: Fork) -> Tensor:
        """(n,) what running is worth to the tokens before a half-step."""
        raise NotImplementedError

    def learn(self, place: Place, sights: list[Fork]) -> None:
        """Fit to what is before the half-step; nothing where the score needs no fit."""

    def choose(self, half: HalfStep, sights: list[Fork]) -> list[Tensor]:
        """Score and compare."""
        place = half.kind, half.step
        scores = [self.score(place, fork) for fork in sights]
        self.scores[place] = torch.cat(scores)
        return [one < self.thresholds[half.kind] for one in scores]

    def fit(self, half: HalfStep, sights: list[Fork]) -> list[Tensor]:
        """Fit the patch to those who take it, the home to the others, and the score, in turns; then choose."""
        skips = everyone(sights)
        for turn in range(1 + _TURNS):
            if self.parts is not None and turn:
                self.parts.fit(half, sights, skips)
            elif sum(int(skip.sum()) for skip in skips) >= 0.03 * sum(map(len, skips)):
                fit_patch(self.model, half, sights, skips)
            self.learn((half.kind, half.step), sights)
            skips = self.choose(half, sights)
        return skips

    def over(self, tokens: Tensor, decide: Decide) -> list[Tensor]:
        """A walk over tokens (S, T), beside the source where something aims at it."""
        return walk(self.model, tokens, decide, None if self.parts is None else self.parts.before)

    def cost(self, place: Place, fork: Fork) -> Tensor:
        """(n,) nats that the patch in the module's place costs."""
        return stakes(fork.patch - fork.home, fork.x, self.metrics[place])

    def settle(self, shares: Sequence[float]) -> None:
        """Thresholds at which these shares of each kind's tokens would have skipped in the last walk."""
        for kind, share in zip(KINDS, shares, strict=True):
            scores = torch.cat([one for place, one in self.scores.items() if place[0] == kind])
            self.thresholds[kind] = float(scores.kthvalue(min(len(scores), int(share * len(scores)) + 1)).values)


class Static(Policy):
    """Whole half-layers: `gone` skip for all tokens."""

    gone: frozenset[Place] = frozenset()

    def score(self, place: Place, fork: Fork) -> Tensor:
        return torch.full((len(fork.x),), -1.0 if place in self.gone else 1.0)

    def settle(self, shares: Sequence[float]) -> None:
        self.thresholds = dict.fromkeys(KINDS, 0.0)


class Random(Policy):
    """Random tokens of each half-step."""

    def score(self, place: Place, fork: Fork) -> Tensor:
        generator = torch.Generator().manual_seed(2 * place[1] + KINDS.index(place[0]))
        return torch.rand(len(fork.x), generator=generator)


class Oracle(Policy):
    """The tokens whose skipping costs least, beyond what running costs them."""

    def score(self, place: Place, fork: Fork) -> Tensor:
        if fork.goal is None:
            return self.cost(place, fork)
        skip, run = (stakes(way - fork.goal, fork.x, self.metrics[place]) for way in (fork.patch, fork.home))
        return skip - run


class Routed(Policy):
    """The tokens whose patch a linear router expects to cost least."""

    def score(self, place: Place, fork: Fork) -> Tensor:
        return self.lines[place](fork.x_hat)

    def learn(self, place: Place, sights: list[Fork]) -> None:
        x_hat, cost = torch.cat([f.x_hat for f in sights]), torch.cat([self.cost(place, f) for f in sights])
        self.lines[place] = fit_line(x_hat, cost)

    def choose(self, half: HalfStep, sights: list[Fork]) -> list[Tensor]:
        place = half.kind, half.step
        said, cost = (torch.cat([one(place, f) for f in sights]) for one in (self.score, self.cost))
        errors = cost.log() - said
        self.quality[place] = 1 - float(errors.var() / cost.log().var())
        return super().choose(half, sights)


@dataclass(frozen=True)
class Texts:
    """Blocks (S, T) to fit on and to judge on."""

    fit: Tensor
    judge: Tensor


def measured(policy: Policy, shares: Sequence[float], texts: Texts) -> float:
    """Held-out loss of a policy at these shares: fitted on one text, thresholds found on the other, without labels."""
    for _ in range(_WALKS):
        policy.over(texts.fit, policy.fit)
        policy.settle(shares)
    policy.over(texts.fit, policy.fit)
    for _ in range(_WALKS):
        policy.over(texts.judge, policy.choose)
        policy.settle(shares)
    return loss(policy, texts.judge)


@torch.inference_mode()
def loss(policy: Policy, tokens: Tensor) -> float:
    """Mean loss in nats per token of a walk over tokens (S, T)."""
    model, total = policy.model, 0.0
    for batch, x in zip(split(tokens), policy.over(tokens, policy.choose), strict=True):
        logits = model.lm_head(model.model.ln_f(x)).unflatten(0, batch.shape)
        part = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total += float(part)
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def make_model(source: Source, rank: int) -> MomForCausalLM:
    """The source with all of its modules, each of which may be skipped for a patch of this rank."""
    total = source.config.n_layer
    plan = choose_homes(Importance.unmeasured(total), Request(total, total, reach="skip", patch_rank=rank))
    return assemble(source, network_of(source), plan)


def static_choices(source: Source, quotas: tuple[int, int], policy: Policy, texts: Texts) -> list[frozenset[Place]]:
    """Half-layers to leave out: by greedy loss without them, and those whose patches cost least."""
    network: Network = network_of(source)
    importance = measure_importance(network, texts.fit[:16], quotas, "greedy")
    greedy = frozenset((removal.kind, removal.layer) for removal in importance.removals)
    costs: dict[Place, float] = {}

    def note(half: HalfStep, sights: list[Fork]) -> list[Tensor]:
        place = half.kind, half.step
        fit_patch(policy.model, half, sights, everyone(sights))
        costs[place] = float(torch.cat([policy.cost(place, f) for f in sights]).mean())
        return [torch.zeros(len(f.x), dtype=torch.bool) for f in sights]

    walk(policy.model, texts.fit, note)
    cheapest = [
        place
        for kind, quota in zip(KINDS, quotas, strict=True)
        for place in sorted((p for p in costs if p[0] == kind), key=costs.__getitem__)[:quota]
    ]
    return [greedy, frozenset(cheapest)]


def best_static(
    source: Source, rank: int, shares: Sequence[float], texts: Texts, metrics: dict[Place, Tensor]
) -> float:
    """Held-out loss of the better of two ways to choose half-layers, judged on the text that patches are fitted on."""
    total, found = source.config.n_layer, []
    quotas = (round(shares[0] * total), round(shares[1] * total))
    model = make_model(source, rank)
    for gone in static_choices(source, quotas, Static(model, metrics), texts):
        policy = Static(model, metrics)
        policy.gone = gone
        policy.settle(shares)
        walk(model, texts.fit, policy.fit)
        found.append((loss(policy, texts.fit), loss(policy, texts.judge)))
    return min(found)[1]


POLICIES: dict[str, tuple[type[Policy], bool]] = {
    "random": (Random, True), "router, own": (Routed, False), "oracle, own": (Oracle, False),
    "router": (Routed, True), "oracle": (Oracle, True),
}  # fmt: skip
"""Who chooses, and whether patches and what runs aim at the source's residual."""


def make_policy(name: str, source: Source, rank: int, metrics: dict[Place, Tensor]) -> Policy:
    """One of POLICIES on a model of its own."""
    kind, aims = POLICIES[name]
    model = make_model(source, rank)
    return kind(model, metrics, Parts(model, twin(model)) if aims else None)


def refitted_static(source: Source, rank: int, shares: Sequence[float], texts: Texts) -> float:
    """Held-out loss of momify's own static model: greedy removals, what stays and patches fitted to the source."""
    total = source.config.n_layer
    kept = [total - round(share * total) for share in shares]
    quotas = (total - kept[0], total - kept[1])
    plan = choose_homes(measure_importance(network_of(source), texts.fit[:16], quotas), Request(*kept, patch_rank=rank))
    network = network_of(source)
    fitted = refit(network, plan, texts.fit, Fitting())
    model = assemble(source, replace(network, layers=fitted.layers), plan, stand_ins=fitted.stand_ins)
    nobody = Static(model, {})
    nobody.settle(shares)
    return loss(nobody, texts.judge)


def table(source: Source, rank: int, texts: Texts, policies: Sequence[str]) -> None:
    """Print the yardstick, row by row as it comes."""
    model = make_model(source, rank)
    metrics = loss_metrics(model, texts.fit)
    nobody = Static(model, metrics)
    nobody.settle(())
    base, quality = loss(nobody, texts.judge), {}
    sizes = f"{texts.fit.numel():,} tokens to fit, {texts.judge.numel():,} to judge"
    print(f"source: loss {base:.4f}; patches of rank {rank}; {sizes}\n")
    print(
        "| skipped, attention / feed-forward | static | static, the rest refitted | "
        + " | ".join(policies)
        + " | of the way | to the oracle, own |"
    )
    print("|---|" + "---:|" * (4 + len(policies)), flush=True)
    for shares in SHARES:
        losses = {"static": best_static(source, rank, shares, texts, metrics)}
        losses["refitted"] = refitted_static(source, rank, shares, texts)
        for name in policies:
            policy = make_policy(name, source, rank, metrics)
            losses[name] = measured(policy, shares, texts)
            quality = policy.quality if name == "router" else quality
        start = min(losses["static"], losses["refitted"])
        ways = [(start - losses["router"]) / (start - losses[goal]) for goal in ("oracle", "oracle, own")]
        cells = [f"{math.exp(one - base):.3f}" for one in losses.values()]
        print(
            f"| {shares[0]:.0%} / {shares[1]:.0%} | " + " | ".join([*cells, *(f"{way:.0%}" for way in ways)]) + " |",
            flush=True,
        )
    print("\nR2 of the router's log cost on the judged text, at the last shares:")
    for kind in KINDS:
        print(
            f"  {kind}: " + " ".join(f"{quality[kind, half.step]:.2f}" for half in halves(model) if half.kind == kind)
        )


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="builtin:demo", help="hub name, folder or builtin:demo")
    parser.add_argument("--data", nargs="+", default=["builtin:demo"])
    parser.add_argument("--valid", nargs="+", help="held-out text; documents of --data if left out")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16, help="of the patches")
    parser.add_argument("--fit-tokens", type=int, default=16_384)
    parser.add_argument("--judge-tokens", type=int, default=16_384)
    parser.add_argument("--few", action="store_true", help="without random tokens")
    parser.add_argument("--train", type=int, default=0, help="steps of 4 blocks; 0: the yardstick without training")
    parser.add_argument("--rows", default="static,supervised,fitted", help="of --train")
    parser.add_argument("--windows", type=int, default=256, help="held-out blocks scored after --train")
    parser.add_argument("--seed", type=int, default=0, help="of --train")
    parser.add_argument("--out", type=Path, default=Path("runs/routing"), help="runs of --train")
    given = parser.parse_args()
    if given.train:
        train_table(given)
        return
    folder = locate(given.source)
    block = DataBlock(train=given.data, valid=given.valid, block_length=given.block)
    data = load_tokens(block, load_tokenizer(folder))
    judge = data.valid_tensor(given.judge_tokens)
    judge = judge[: len(judge) // given.block * given.block].view(-1, given.block)
    texts = Texts(data.spread_blocks(given.fit_tokens // given.block), judge)
    table(open_source(folder), given.rank, texts, [name for name in POLICIES if name != "random" or not given.few])


if __name__ == "__main__":
    main()
