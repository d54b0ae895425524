"""Which layers become modules, and which module each step starts from (design section 3)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from momify.errors import MomifyError

if TYPE_CHECKING:  # it imports torch, which `momify plan` does without
    from momify.convert.importance import Importance

KINDS = ("mha", "ffn")
NOUNS = {"mha": "attention", "ffn": "feed-forward"}
INITS = ("home", "random")
REACHES = ("all", "skip", "home")
STEP_RANK = 16  # of a step's own change to a shared module, where nothing else is asked for (docs/results.md)


@dataclass(frozen=True)
class Alike:
    """Stands for an importance that nobody has measured: figures hang on how much goes, not on which."""

    num_layers: int
    method = "alike"

    def order(self, kind: str) -> tuple[int, ...]:
        """Layers, first to go first."""
        return tuple(range(self.num_layers))

    def cost(self, kind: str, layer: int) -> float:
        """What removing the layer would cost."""
        return 0.0


@dataclass(frozen=True)
class Request:
    """What the user asks for. None: depth as in the source; steps as many as modules, and as added steps.

    reach: "all" every module and SKIP at each step that runs, "skip" home or SKIP, "home" the home (static); None: home
    where that is possible, as it recovers best (docs/results.md), else all: K > 1, a random start, added steps.
    init: "home" the start that loses nothing, "random" the paper's way (all reachable, no home preferred).
    patch_rank: of the patch that SKIP adds, 0 for none; step_rank: of each step's own delta to a shared module, 0 for
    none; None where it is not said yet (`with_step_rank`).
    """

    mha: int
    ffn: int
    depth: int | None = None
    modules_per_token: int = 1
    mha_steps: int | None = None
    ffn_steps: int | None = None
    init: str = "home"
    reach: str | None = None
    patch_rank: int = 0
    step_rank: int | None = None

    def modules(self, kind: str) -> int:
        return self.mha if kind == "mha" else self.ffn

    def steps(self, kind: str) -> int | None:
        return self.mha_steps if kind == "mha" else self.ffn_steps


@dataclass(frozen=True)
class HomePlan:
    """Where every module comes from and what every step starts with and may choose; len(homes) = H steps."""

    num_layers: int  # L of the source
    mha_layers: tuple[int, ...]  # (M_A,) source layer of each module, ascending
    ffn_layers: tuple[int, ...]  # (M_F,)
    step_layers: tuple[int | None, ...]  # (H,) source layer of each step, None for a step added by depth > L
    mha_homes: tuple[int, ...]  # (H,) module, M_A for SKIP
    ffn_homes: tuple[int, ...]
    mha_reach: tuple[tuple[int, ...], ...]  # (H,) sorted choices, the home among them
    ffn_reach: tuple[tuple[int, ...], ...]
    modules_per_token: int = 1
    init: str = "home"
    patch_rank: int = 0
    step_rank: int = 0

    def layers(self, kind: str) -> tuple[int, ...]:
        """Source layers of the pool's modules."""
        return self.mha_layers if kind == "mha" else self.ffn_layers

    def homes(self, kind: str) -> tuple[int, ...]:
        """Home module per step, len(layers(kind)) for SKIP."""
        return self.mha_homes if kind == "mha" else self.ffn_homes

    def reach(self, kind: str) -> tuple[tuple[int, ...], ...]:
        """Choices per step."""
        return self.mha_reach if kind == "mha" else self.ffn_reach

    def home_layer(self, kind: str, step: int) -> int | None:
        """Source layer whose module is the step's home; None for SKIP."""
        home = self.homes(kind)[step]
        return None if home == len(self.layers(kind)) else self.layers(kind)[home]

    def running_steps(self, kind: str) -> list[int]:
        """Steps that may run a module of this kind."""
        skip = len(self.layers(kind))
        return [step for step, choices in enumerate(self.reach(kind)) if choices != (skip,)]

    def patched(self, kind: str) -> list[int]:
        """Steps at which SKIP adds a patch."""
        skip = len(self.layers(kind))
        return [step for step, choices in enumerate(self.reach(kind)) if self.patch_rank and skip in choices]

    def adapted(self, kind: str) -> list[int]:
        """Static steps with a delta to their module, which is also another step's home."""
        homes, skip = self.homes(kind), len(self.layers(kind))
        static = [step for step, choices in enumerate(self.reach(kind)) if len(choices) == 1 and choices != (skip,)]
        return [step for step in static if self.step_rank and homes.count(homes[step]) > 1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "HomePlan":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        fixed = {name: _as_tuple(value) for name, value in data.items()}
        return cls(**fixed)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value


def removal_quotas(request: Request, num_layers: int) -> tuple[int, int]:
    """How many (attention, feed-forward) half-layers `measure_importance` should remove for this request."""
    check_request(request, num_layers)
    whole = max(0, num_layers - (request.depth or num_layers))  # layers that go with both halves
    return max(num_layers - request.mha, whole), max(num_layers - request.ffn, whole)


def with_step_rank(request: Request, width: int) -> Request:
    """`request` with the usual rank of step deltas for a source of that width, where it names none."""
    return request if request.step_rank is not None else replace(request, step_rank=min(STEP_RANK, width))


def check_request(request: Request, num_layers: int) -> None:
    """Raise MomifyError for a request that a source of `num_layers` layers cannot fulfil."""
    for kind in KINDS:
        modules, noun = request.modules(kind), NOUNS[kind]
        if not 1 <= modules <= num_layers:
            raise MomifyError(f"{kind} is {modules}; the source has {num_layers} {noun} modules, use 1 to {num_layers}")
    if request.depth is not None and request.depth < 1:
        raise MomifyError(f"depth is {request.depth}; a model needs at least 1 step (the source has {num_layers})")
    for name, value, known in (("init", request.init, INITS), ("reach", request.reach or "home", REACHES)):
        if value not in known:
            raise MomifyError(f"{name} is {value!r}; use one of {', '.join(known)}")
    _check_picks(request, num_layers)
    _check_reach(request, num_layers)
    for kind in KINDS:
        _check_steps(request, kind, num_layers)


def reach_of(request: Request, num_layers: int) -> str:
    """What a running step may choose: as asked, else home where nothing asked for needs more."""
    if request.reach is not None:
        return request.reach
    routed = request.modules_per_token != 1 or request.init == "random" or (request.depth or num_layers) > num_layers
    unreached = any(default_steps(request, kind, num_layers) < request.modules(kind) for kind in KINDS)
    return "all" if routed or unreached else "home"


def _check_picks(request: Request, num_layers: int) -> None:
    """K must not exceed what a step can choose from."""
    fewest, reach = min(request.mha, request.ffn), reach_of(request, num_layers)
    choices = {"all": fewest + 1, "skip": 2, "home": 1}[reach]
    if not 1 <= request.modules_per_token <= choices:
        raise MomifyError(
            f"modules_per_token is {request.modules_per_token}; "
            f"a step chooses from {choices} (reach {reach}, SKIP counts), use 1 to {choices}"
        )


def _check_reach(request: Request, num_layers: int) -> None:
    """Added steps and the random start exist only where everything is reachable."""
    if reach_of(request, num_layers) == "all":
        return
    if request.init == "random":
        raise MomifyError(f"reach is {request.reach!r} with init random, which needs every module; use reach all")
    if (request.depth or num_layers) > num_layers:
        raise MomifyError(
            f"reach is {request.reach!r} with depth {request.depth} above the source's {num_layers} layers, "
            "so added steps could only skip; use reach all"
        )


def _check_steps(request: Request, kind: str, num_layers: int) -> None:
    """A step count lies in 1..H, and no module may be out of every step's reach."""
    depth, modules = request.depth or num_layers, request.modules(kind)
    steps = default_steps(request, kind, num_layers)
    if not 1 <= steps <= depth:
        raise MomifyError(f"{kind}_steps is {steps}; the model has {depth} steps, use 1 to {depth}")
    if reach_of(request, num_layers) != "all" and steps < modules:
        raise MomifyError(
            f"{kind} is {modules} but only {steps} steps run one with reach {request.reach!r}, "
            f"so some could never be used; lower {kind} to {steps} or use reach all"
        )


def default_steps(request: Request, kind: str, num_layers: int) -> int:
    """Steps that may run a module of this kind: as asked, else one per module and one per added step."""
    depth, asked = request.depth or num_layers, request.steps(kind)
    if asked is not None:
        return asked
    if request.init == "random":
        return depth
    return min(request.modules(kind) + max(0, depth - num_layers), depth)


def choose_homes(importance: "Importance | Alike", request: Request) -> HomePlan:
    """The plan for `request`: modules that cost most to remove stay, each step starts from its own or SKIP.

    Removed half-layers run a neighbour's module as far as the steps asked for allow, those that hurt most
    first.
    Raises MomifyError as `check_request`, and where something is to be removed but nothing was measured.
    """
    total = importance.num_layers
    if any(removal_quotas(request, total)) and importance.method == "none":
        raise MomifyError("modules are to be removed but no calibration was run; measure the importance first")
    layers = _kept_whole(importance, request)
    steps = spread_steps(layers, (request.depth or total) - len(layers))
    sides = {kind: _plan_kind(importance, request, kind, steps) for kind in KINDS}
    return HomePlan(
        num_layers=total,
        mha_layers=sides["mha"].layers,
        ffn_layers=sides["ffn"].layers,
        step_layers=tuple(steps),
        mha_homes=sides["mha"].homes,
        ffn_homes=sides["ffn"].homes,
        mha_reach=sides["mha"].reach,
        ffn_reach=sides["ffn"].reach,
        modules_per_token=request.modules_per_token,
        init=request.init,
        patch_rank=request.patch_rank,
        step_rank=request.step_rank or 0,
    )


def _kept_whole(importance: "Importance | Alike", request: Request) -> list[int]:
    """Source layers that stay as steps; those dropped (depth < L) cost least beside what is gone anyway."""
    total = importance.num_layers
    gone = {kind: set(importance.order(kind)[: total - request.modules(kind)]) for kind in KINDS}

    def price(layer: int) -> tuple[float, float, int]:
        """What dropping it costs beside what goes anyway; of equals, what both halves cost; then the first."""
        costs = {kind: importance.cost(kind, layer) for kind in KINDS}
        extra = sum(cost for kind, cost in costs.items() if layer not in gone[kind])
        return extra, sum(costs.values()), layer

    dropped = sorted(range(total), key=price)[: max(0, total - (request.depth or total))]
    return [layer for layer in range(total) if layer not in dropped]


def spread_steps(layers: list[int], added: int) -> list[int | None]:
    """`layers` in order with `added` Nones spread evenly among them."""
    steps: list[int | None] = list(layers)
    for number in reversed(range(added)):
        steps.insert(round((number + 1) * len(layers) / (added + 1)), None)
    return steps


@dataclass(frozen=True)
class _Side:
    """One kind's share of a HomePlan."""

    layers: tuple[int, ...]
    homes: tuple[int, ...]
    reach: tuple[tuple[int, ...], ...]


def _plan_kind(importance: "Importance | Alike", request: Request, kind: str, steps: list[int | None]) -> _Side:
    """Modules, homes and reach of one kind for `steps` (source layer or None each)."""
    skip = request.modules(kind)
    order = importance.order(kind)  # first to go .. needed most
    ranked = [i for i in order if i not in steps] + [i for i in order if i in steps]  # dropped layers go first
    layers = sorted(ranked[-skip:])
    needs = {i: importance.cost(kind, i) if i not in layers else order.index(i) for i in range(len(order))}
    running = _running_steps(steps, layers, needs, default_steps(request, kind, importance.num_layers))
    homes = [_home(layer, layers) if step in running else skip for step, layer in enumerate(steps)]
    allowed = reach_of(request, importance.num_layers)
    reach = [_choices(home, skip, allowed) if step in running else (skip,) for step, home in enumerate(homes)]
    return _Side(tuple(layers), tuple(homes), tuple(reach))


def _running_steps(steps: list[int | None], layers: list[int], needs: Mapping[int, float], count: int) -> set[int]:
    """The `count` steps that run: own modules, then added steps, then removed ones; needed most first."""

    def rank(step: int) -> tuple[int, float]:
        layer = steps[step]
        if layer is None:
            return 1, step
        return (0 if layer in layers else 2), -needs[layer]

    return set(sorted(range(len(steps)), key=rank)[:count])


def _home(layer: int | None, layers: list[int]) -> int:
    """Index of the module nearest to `layer` (of two, the lower); SKIP for an added step."""
    if layer is None:
        return len(layers)
    return min(range(len(layers)), key=lambda module: (abs(layers[module] - layer), layers[module]))


def _choices(home: int, skip: int, reach: str) -> tuple[int, ...]:
    """What a running step may choose, sorted."""
    if reach == "all":
        return tuple(range(skip + 1))
    return tuple(sorted({home, skip})) if reach == "skip" else (home,)
