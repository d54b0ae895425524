"""Which half-steps a model executes, in order: the tables of a config, read once when a model is built."""

from dataclasses import dataclass, replace

from .config import Kind, MomConfig


@dataclass(frozen=True)
class HalfStep:
    """One executed half of a step: which kind, where it starts, what it may choose (design section 2)."""

    step: int
    kind: Kind
    skip: int
    """The choice that stands for SKIP: the pool's size M."""
    home: int
    reach: tuple[int, ...]
    route: int | None
    """Row of this half-step in its kind's router; None if there is one choice and so no router."""
    slot: int | None
    """Cache slot of the keys and values; None for a feed-forward half."""
    key_home: int | None
    """Module that makes key and value of a token that skips; None if none can skip or they are masked."""
    masks_keys: bool
    """Whether a token that skips is hidden from the later ones."""
    patch: int | None
    """Row of this half-step among its kind's patches; None if SKIP adds nothing here, or cannot be chosen."""
    delta: int | None
    """Row of this half-step among its kind's deltas; None if its module is as it is in the pool."""

    @property
    def routed(self) -> bool:
        """Whether tokens choose here."""
        return self.route is not None

    @property
    def forks(self) -> bool:
        """Whether the choices are one module, the home, and SKIP."""
        return self.reach == (self.home, self.skip)

    def at_home(self) -> "HalfStep":
        """The same half-step without a choice: every token runs the home module."""
        alone = (self.home,)
        return replace(self, reach=alone, route=None, key_home=None, masks_keys=False, patch=None)


def half_steps(config: MomConfig) -> tuple[HalfStep, ...]:
    """All half-steps that do anything, in order; one that can only SKIP and has no patch is left out."""
    kinds: tuple[Kind, ...] = ("mha", "ffn")
    rows = {kind: _Rows.of(config, kind) for kind in kinds}
    return tuple(
        _half_step(config, step, kind, rows[kind])
        for step in range(config.num_steps)
        for kind in kinds
        if step in rows[kind].running or step in rows[kind].patched
    )


@dataclass(frozen=True)
class _Rows:
    """Of one kind, what only some steps have: each such step, with its place among them."""

    routed: dict[int, int]
    running: dict[int, int]
    patched: dict[int, int]
    adapted: dict[int, int]

    @classmethod
    def of(cls, config: MomConfig, kind: Kind) -> "_Rows":
        """Worked out once for all steps."""
        steps = (config.routed(kind), config.running(kind), config.patched(kind), config.adapted(kind))
        return cls(*({step: row for row, step in enumerate(some)} for some in steps))


def _half_step(config: MomConfig, step: int, kind: Kind, rows: _Rows) -> HalfStep:
    skip, home, reach = config.num_modules(kind), config.homes(kind)[step], config.reach(kind)[step]
    # with K > 1 a token picks distinct choices, at most one of which is SKIP: its keys come from the others
    can_skip = kind == "mha" and skip in reach and config.modules_per_token == 1
    keeps_keys = can_skip and config.skipped_keys == "home" and home != skip
    slot = rows.running.get(step) if kind == "mha" else None
    return HalfStep(
        step=step,
        kind=kind,
        skip=skip,
        home=home,
        reach=tuple(reach),
        route=rows.routed.get(step),
        slot=slot,
        key_home=home if keeps_keys else None,
        masks_keys=can_skip and not keeps_keys and slot is not None,
        patch=rows.patched.get(step),
        delta=rows.adapted.get(step),
    )
