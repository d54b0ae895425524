"""The shape of a Mixture-of-Modules model, as saved in config.json (design sections 1 to 3)."""

from collections import Counter
from typing import Any, ClassVar, Literal

from transformers import __version__

Kind = Literal["mha", "ffn"]
"""Which half of a step: "mha" (attention) or "ffn" (feed-forward)."""

OLDEST = "5.17"
"""The oldest transformers that was tried and does what this needs of configs, masks and caches."""


def check_version(version: str) -> None:
    """Raise ImportError for a version of transformers that loads these models wrongly, or not at all."""
    here, needed = (tuple(map(int, one.split(".")[:2])) for one in (version, OLDEST))
    if here < needed:
        raise ImportError(
            f"this model needs transformers {OLDEST} or newer, here is {version}: pip install -U transformers"
        )


LEARNED_ACTIVATIONS = ("prelu", "xielu")
"""They own parameters, which lie in no pool and for which GPT-2's names have no place."""

check_version(__version__)

from transformers import PreTrainedConfig  # noqa: E402 - older ones have no such name
from transformers.activations import ACT2FN  # noqa: E402


class MomConfig(PreTrainedConfig):
    """Shape of a MoM model: its pool, its steps, and what each step may choose.

    In homes and reaches a module is its index in the pool; the pool's size stands for SKIP. `None` for homes
    means that step s starts at module s % M, `None` for a reach means every module and SKIP.
    `num_hidden_layers` is derived: the number of steps whose attention may run, which is the number of cache
    slots (at least 1). `patch_rank`: rank of what SKIP adds (0: nothing); `step_rank`: rank by which a module differs
    at each of several fixed steps that share it (0: not at all). Raises ValueError, naming field, value and remedy,
    for anything that cannot be built.
    """

    model_type = "mom"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "router_logits", "routing"]
    attribute_map: ClassVar[dict[str, str]] = {
        "max_position_embeddings": "n_positions",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    num_mha_modules: int = 12
    num_ffn_modules: int = 12
    num_steps: int = 12
    num_hidden_layers: int | None = None
    modules_per_token: int = 1
    mha_homes: list[int] | None = None
    ffn_homes: list[int] | None = None
    mha_reach: list[list[int]] | None = None
    ffn_reach: list[list[int]] | None = None
    router_tau: float = 1.0
    router_hidden: int = 0
    home_bias: float = 4.0
    router_explore: float = 0.0
    router_threshold: float = 0.0
    skipped_keys: str = "home"
    patch_rank: int = 0
    step_rank: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_sizes()
        self._check_settings()
        self.mha_homes, self.mha_reach = self._table("mha", self.mha_homes, self.mha_reach)
        self.ffn_homes, self.ffn_reach = self._table("ffn", self.ffn_homes, self.ffn_reach)
        self.num_hidden_layers = max(1, len(self.running("mha")))

    def num_modules(self, kind: Kind) -> int:
        """Size M of the pool of `kind`; M is also the index that stands for SKIP."""
        return self.num_mha_modules if kind == "mha" else self.num_ffn_modules

    def homes(self, kind: Kind) -> list[int]:
        """Home of each step: a module's index, or M for SKIP."""
        return self.mha_homes if kind == "mha" else self.ffn_homes

    def reach(self, kind: Kind) -> list[list[int]]:
        """What each step may choose: sorted module indices, M for SKIP."""
        return self.mha_reach if kind == "mha" else self.ffn_reach

    def routed(self, kind: Kind) -> list[int]:
        """Steps with more than one choice: those that have a router."""
        return [step for step, reach in enumerate(self.reach(kind)) if len(reach) > 1]

    def running(self, kind: Kind) -> list[int]:
        """Steps that may run a module of `kind`: all but those that can only SKIP."""
        skip_only = [self.num_modules(kind)]
        return [step for step, reach in enumerate(self.reach(kind)) if reach != skip_only]

    def patched(self, kind: Kind) -> list[int]:
        """Steps with a patch: where SKIP is within reach, be it the only choice."""
        modules = self.num_modules(kind)
        return [step for step, reach in enumerate(self.reach(kind)) if modules in reach] if self.patch_rank else []

    def adapted(self, kind: Kind) -> list[int]:
        """Steps with a delta: those fixed to a module that is also the home of another step."""
        homes, modules = self.homes(kind), self.num_modules(kind)
        uses = Counter(homes)
        fixed = [step for step, reach in enumerate(self.reach(kind)) if len(reach) == 1 and reach != [modules]]
        return [step for step in fixed if uses[homes[step]] > 1] if self.step_rank else []

    def _check_sizes(self) -> None:
        """Whole numbers that must be at least one, and heads that must divide the width."""
        for name in (
            "vocab_size", "n_positions", "hidden_size", "num_attention_heads", "intermediate_size",
            "num_mha_modules", "num_ffn_modules", "num_steps", "modules_per_token",
        ):  # fmt: skip
            _check_whole(name, getattr(self, name), at_least=1)
        for name in ("router_hidden", "patch_rank", "step_rank"):
            _check_whole(name, getattr(self, name), at_least=0)
        for name in ("patch_rank", "step_rank"):
            if getattr(self, name) > self.hidden_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} is more than hidden_size {self.hidden_size}; no map needs more"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; choose a head count that divides it"
            )
        most = max(self.num_mha_modules, self.num_ffn_modules) + 1
        if self.modules_per_token > most:
            raise ValueError(
                f"modules_per_token {self.modules_per_token} is more than any step can choose from; "
                f"use at most {most} (the larger pool and SKIP)"
            )

    def _check_settings(self) -> None:
        """Names and real numbers."""
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "router_explore"):
            _check_real(name, getattr(self, name), low=0.0, high=1.0)
        for name in ("layer_norm_epsilon", "router_tau"):
            _check_real(name, getattr(self, name), low=0.0)
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0; use a number above 0")
        _check_real("home_bias", self.home_bias)
        _check_real("router_threshold", self.router_threshold)
        if self.activation_function not in ACT2FN or self.activation_function in LEARNED_ACTIVATIONS:
            raise ValueError(
                f"activation_function {self.activation_function!r} is unknown or has own parameters; use another of "
                "transformers.ACT2FN"
            )
        if self.skipped_keys not in ("home", "masked"):
            raise ValueError(f"skipped_keys is {self.skipped_keys!r}; use 'home' or 'masked'")
        if self.router_explore and self.modules_per_token > 1:
            raise ValueError(
                f"router_explore {self.router_explore} needs modules_per_token 1, not "
                f"{self.modules_per_token}, whose gates have a gradient of their own; set router_explore 0"
            )

    def _table(
        self, kind: Kind, homes: list[int] | None, reach: list[list[int]] | None
    ) -> tuple[list[int], list[list[int]]]:
        """Fill in the defaults of one kind's homes and reach, and check them."""
        modules, steps = self.num_modules(kind), self.num_steps
        homes = [step % modules for step in range(steps)] if homes is None else list(homes)
        reach = [list(range(modules + 1))] * steps if reach is None else reach
        reach = [list(choices) for choices in reach]
        for name, table in ((f"{kind}_homes", homes), (f"{kind}_reach", reach)):
            if len(table) != steps:
                raise ValueError(f"{name} has {len(table)} entries for num_steps {steps}; give one a step")
        for step, (home, choices) in enumerate(zip(homes, reach, strict=True)):
            _check_choices(f"{kind}_reach[{step}]", choices, modules)
            if home not in choices:
                raise ValueError(
                    f"{kind}_homes[{step}] is {home}, which {kind}_reach[{step}] {choices} lacks; "
                    "a home must be reachable"
                )
        return homes, reach


def _check_whole(name: str, value: Any, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is {value!r}; use a whole number of at least {at_least}")


def _check_real(name: str, value: Any, low: float = float("-inf"), high: float = float("inf")) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not low <= value <= high or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} is {value!r}; use a number between {low} and {high}")


def _check_choices(name: str, choices: list[int], modules: int) -> None:
    whole = all(isinstance(choice, int) and not isinstance(choice, bool) for choice in choices)
    if not choices or not whole or choices != sorted(set(choices)):
        raise ValueError(f"{name} is {choices}; list each choice once, in rising order")
    if choices[0] < 0 or choices[-1] > modules:
        raise ValueError(f"{name} is {choices}; use 0 to {modules - 1} for modules and {modules} for SKIP")
