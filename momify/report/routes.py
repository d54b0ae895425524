"""routes.html: which way each token of a text went, as one page that needs nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from momify.measure.paths import HalfPath, Paths
from momify.report.html import content_policy, environment
from momify.report.words import KINDS, Json


@dataclass(frozen=True)
class Traced:
    """A text's paths with what the page says about them: the model's name, each token's text, the size of each pool.

    `rises`: how much the text's loss rises without a module, by (kind, module), where that was asked for.
    """

    model: str
    tokens: Sequence[str]
    modules: Mapping[str, int]
    paths: Paths
    rises: Mapping[tuple[str, int], float] | None = None


def render_routes(traced: Traced) -> str:
    """routes.html; tokens are text wherever they stand, never markup."""
    env = environment()
    script = env.loader.get_source(env, "routes.js")[0]
    data = routes_data(traced)
    return env.get_template("routes.html.j2").render(
        model=traced.model,
        tokens=[_shown(text) for text in traced.tokens],
        loss=traced.paths.loss,
        data=Markup(_for_script(data)),
        steps=[{**half, "place": place} for place, half in enumerate(data["halves"])],
        kinds={kind: name.capitalize() for kind, name in KINDS.items()},
        rises=traced.rises is not None,
        policy=content_policy(script),
        script=Markup(script),
    )


def routes_data(traced: Traced) -> Json:
    """What the page's script reads: plain JSON values."""
    rises = traced.rises or {}
    return {
        "losses": [None if loss is None else round(loss, 4) for loss in traced.paths.losses],
        "modules": dict(traced.modules),
        "halves": [_half(half) for half in traced.paths.halves],
        "rises": {f"{kind}/{module}": round(rise, 4) for (kind, module), rise in rises.items()},
        "first": most_divided(traced.paths.halves),
    }


def _half(half: HalfPath) -> Json:
    picks = [[[module, round(gate, 4)] for module, gate in picks] for picks in half.picks]
    return {"step": half.step, "kind": half.kind, "home": half.home, "fixed": half.fixed, "patched": half.patched,
            "picks": picks}  # fmt: skip


def most_divided(halves: Sequence[HalfPath]) -> int:
    """The half-step at which the tokens went the most different ways: the one to look at first."""

    def largest_group(half: HalfPath) -> int:
        first = [picks[0][0] for picks in half.picks]
        return max(first.count(module) for module in set(first))

    return min(range(len(halves)), key=lambda index: largest_group(halves[index]), default=0)


def _shown(text: str) -> str:
    """A token as it can be seen: a sign before each line end, tabs and carriage returns by theirs, none invisible."""
    return text.replace("\r", "␍").replace("\t", "⇥").replace("\n", "↵\n") or "∅"


def _for_script(data: Json) -> str:
    """JSON that no text in it can end the script element of."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
