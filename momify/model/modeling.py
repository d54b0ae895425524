"""The Mixture-of-Modules transformer for transformers: base class, body, and the causal language model.

Shapes: B batch, T tokens of this call, S keys (past and new), n = B*T, D width, M modules, K picked, H steps,
N heads.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.utils import can_return_tuple

from .activation import make_activation
from .attention import Scene
from .cache import count_tokens
from .config import Kind, MomConfig
from .dispatch import choose_backend
from .half import Observe, Pass, Report, Sight, record, run_half
from .layout import HalfStep, half_steps
from .low_rank import FfnDelta, LowRank, MhaDelta
from .outputs import CACHE, MomCausalLMOutput, MomModelOutput
from .picking import Choosing
from .pool import FfnPool, MhaPool, StackedLinear
from .router import Router


class MomPreTrainedModel(PreTrainedModel):
    """What all MoM models share: config class, capabilities, and how parameters start."""

    config_class = MomConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["MhaPool", "FfnPool"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As GPT-2: normal weights, zero biases, residual ones 1 / sqrt(2H) as large; routers pick homes.

        Patches and deltas do nothing.
        """
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, StackedLinear):
            init.normal_(module.weight, std=std / (2 * self.config.num_steps) ** 0.5 if module.residual else std)
            init.zeros_(module.bias)
        elif isinstance(module, LowRank):
            init.normal_(module.weight_in, std=std)
            init.zeros_(module.weight_out)
            init.zeros_(module.bias)
        elif isinstance(module, Router):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.home_rows(self.config.home_bias))
            # no file holds this buffer: from_pretrained leaves it uninitialised
            init.copy_(module.closed, module.closed_choices())
            if module.w_in is not None and module.b_in is not None:
                init.normal_(module.w_in, std=std)
                init.zeros_(module.b_in)


class MomModel(MomPreTrainedModel):
    """The body: embeddings, H steps of routed attention and feed-forward modules, final LayerNorm.

    arXiv 2407.06677 section 3; design sections 2 and 3.
    """

    def __init__(self, config: MomConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.n_positions, width)
        self.mha = MhaPool(config.num_mha_modules, width)
        self.ffn = FfnPool(config.num_ffn_modules, width, config.intermediate_size)
        self.mha_router = _make_router(config, "mha")
        self.ffn_router = _make_router(config, "ffn")
        self.mha_patch = _make_patch(config, "mha")
        self.ffn_patch = _make_patch(config, "ffn")
        adapted, rank = {kind: len(config.adapted(kind)) for kind in ("mha", "ffn")}, config.step_rank
        self.mha_delta = MhaDelta(adapted["mha"], width, rank) if adapted["mha"] else None
        self.ffn_delta = FfnDelta(adapted["ffn"], width, config.intermediate_size, rank) if adapted["ffn"] else None
        self.ln_f = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.activation = make_activation(config.activation_function)
        halves = half_steps(config)
        self.steps = tuple(tuple(h for h in halves if h.step == step) for step in range(config.num_steps))
        self.attends = any(half.slot is not None for half in halves)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        observe: Observe | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MomModelOutput:
        """Hidden states (B, T, D) after the final LayerNorm for input_ids (B, T) or inputs_embeds (B, T, D).

        past_key_values and cache are one thing, by the name that transformers had until 5.23 and has since.
        attention_mask (B, S) marks padding by 0; positions count its ones unless position_ids are given. `observe` is
        shown the residual before each half-step and behind the last. Raises ValueError for neither or both inputs, too
        many tokens, earlier keys while checkpointing, or attentions asked of another than eager.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        self._check_attentions(output_attentions)
        embeds = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        x = self._embed(embeds, attention_mask, position_ids, cache)
        shared = replace(self._prepare(embeds, attention_mask, position_ids, cache), observe=observe)
        keep_hidden = self._wants(output_hidden_states, "output_hidden_states")
        x, hidden, reports = self._run(x, shared, keep_hidden)
        attentions = tuple(r.weights for r in reports if r.half.kind == "mha")
        logits = tuple(r.picks.logits for r in reports if r.half.routed)
        return MomModelOutput(
            last_hidden_state=x,
            **{CACHE: cache},
            hidden_states=hidden,
            attentions=attentions if self._wants(output_attentions, "output_attentions") else None,
            router_logits=logits if output_router_logits else None,
            routing=tuple(record(r, embeds) for r in reports) if output_router_logits else None,
        )

    def begin(self, input_ids: Tensor) -> tuple[Tensor, Pass]:
        """The residual (n, D) before the first half-step, and what all of `half_steps` share; no cache, no padding.

        For running a model half-step by half-step (`half.run_half`), as conversion does.
        """
        embeds = self.wte(input_ids)
        return self._embed(embeds, None, None, None).flatten(0, 1), self._prepare(embeds, None, None, None)

    def _wants(self, asked: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name, False) if asked is None else asked)

    def _check_attentions(self, asked: bool | None) -> None:
        if self._wants(asked, "output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions is set with attn_implementation {self.config._attn_implementation!r}; "
                "call model.set_attn_implementation('eager')"
            )

    def _cache(self, past: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to work on: none while checkpointing, as the steps run a second time in backward."""
        if self.gradient_checkpointing and self.training:
            if past is not None and past.get_seq_length():
                raise ValueError(
                    "past_key_values holds keys, which a training that checkpoints cannot use; call model.eval() or "
                    "model.gradient_checkpointing_disable()"
                )
            return None
        if past is not None:
            return past
        return DynamicCache(config=self.config) if self._wants(use_cache, "use_cache") else None

    def _embed(
        self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Token embeddings (B, T, D) plus those of their positions."""
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = default_positions(embeds, attention_mask, past)
        self._check_positions(past + embeds.shape[1], position_ids)
        x = embeds + self.wpe(position_ids)
        return F.dropout(x, p=self.config.embd_pdrop) if self.training else x

    def _check_positions(self, tokens: int, position_ids: Tensor) -> None:
        """Raise ValueError for positions that there are none of.

        A length that fits is enough to know, as to look at positions waits for the device; a longer one may be padding.
        """
        most = self.config.n_positions
        if isinstance(tokens, int) and tokens > most and (used := int(position_ids.max()) + 1) > most:
            raise ValueError(f"input of {used} tokens is longer than n_positions {most}; shorten it")

    def _prepare(
        self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Pass:
        """Mask, cache, pool slices and routers for one pass."""
        config = self.config
        mask = create_causal_mask(config, embeds, attention_mask, cache, position_ids)
        if cache is not None and not self.attends:
            count_tokens(cache, embeds)
        backend, qkv = choose_backend(embeds.device, embeds.dtype), self.mha.qkv()
        scene = Scene(
            batch=embeds.shape[0],
            tokens=embeds.shape[1],
            heads=config.num_attention_heads,
            mask=mask,
            cache=cache,
            implementation=config._attn_implementation,
            dropout=config.attn_pdrop if self.training else 0.0,
            module=self.mha,
            qkv=qkv,
            query=qkv.columns(0, config.hidden_size),
            key_value=qkv.columns(config.hidden_size),
            out=self.mha.out(),
            backend=backend,
        )
        explore = config.router_explore if self.training else 0.0
        return Pass(
            scene=scene,
            choosing=Choosing(config.modules_per_token, config.router_tau, explore, backend),
            routers={
                kind: () if router is None else router(config.router_threshold)
                for kind, router in (("mha", self.mha_router), ("ffn", self.ffn_router))
            },
            ffn=(self.ffn.up(), self.ffn.down()),
            patches=_slices(self.mha_patch, self.ffn_patch),
            deltas=_slices(self.mha_delta, self.ffn_delta),
            activation=self.activation,
            epsilon=self.ln_f.eps,
            backend=backend,
        )

    def _run(
        self, x: Tensor, shared: Pass, keep_hidden: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, list[Report]]:
        """All steps and the final LayerNorm: (B, T, D), the hidden states if kept, a report per half-step."""
        hidden, reports = [], []
        for halves in self.steps:
            if keep_hidden:  # else each step's input would stay alive to the end
                hidden.append(x)
            run = partial(self._step, halves=halves, shared=shared)
            if self.gradient_checkpointing and self.training:
                x, done = self._gradient_checkpointing_func(run, x)
            else:
                x, done = run(x)
            reports.extend(done)
        if shared.observe is not None:
            shared.observe(Sight(x.reshape(-1, x.shape[-1])))
        x = self.ln_f(x)
        return x, (*hidden, x) if keep_hidden else None, reports

    def _step(self, x: Tensor, halves: tuple[HalfStep, ...], shared: Pass) -> tuple[Tensor, list[Report]]:
        """One step of x (B, T, D): its attention half, then its feed-forward half, as far as they run."""
        rows, reports = x.reshape(-1, x.shape[-1]), []  # (n, D)
        for half in halves:
            y, report = run_half(rows, half, shared)
            if y is not None:
                rows = rows + self._drop(y)
            reports.append(report)
        return rows.reshape(x.shape), reports

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, p=self.config.resid_pdrop) if self.training else y


def _make_router(config: MomConfig, kind: Kind) -> Router | None:
    """The router of one kind, or None if no step has a choice."""
    routed_steps = config.routed(kind)
    if not routed_steps:
        return None
    homes = [config.homes(kind)[step] for step in routed_steps]
    reach = [config.reach(kind)[step] for step in routed_steps]
    return Router(config.hidden_size, config.router_hidden, homes, reach, config.num_modules(kind))


def _make_patch(config: MomConfig, kind: Kind) -> LowRank | None:
    """The patches of one kind, or None if no step has one."""
    steps = len(config.patched(kind))
    return LowRank(steps, config.hidden_size, config.patch_rank, config.hidden_size) if steps else None


def _slices(mha: nn.Module | None, ffn: nn.Module | None) -> dict[Kind, tuple[Any, ...]]:
    """What each kind's stack of step parts gives for one forward pass; empty where there is none."""
    return {kind: () if module is None else module() for kind, module in (("mha", mha), ("ffn", ffn))}


def default_positions(embeds: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """Positions (B or 1, T): the ones of a mask (B, S) counted, so that left padding shifts nothing."""
    tokens = embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        positions = attention_mask.long().cumsum(dim=1) - 1
        return positions.clamp_min(0)[:, -tokens:]
    return torch.arange(past, past + tokens, device=embeds.device).unsqueeze(0)


class MomForCausalLM(MomPreTrainedModel, GenerationMixin):
    """MoM with a language-model head, tied to the token embedding unless the config says otherwise."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.wte.weight"}

    def __init__(self, config: MomConfig) -> None:
        super().__init__(config)
        self.model = MomModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        head_loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        observe: Observe | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MomCausalLMOutput:
        """Next-token logits (B, T, vocabulary), and with labels (B, T) the mean cross-entropy in nats.

        Labels are shifted inside; -100 is not counted. logits_to_keep: the last so many positions (0: all),
        or their indices. Further keywords go to the loss function (`num_items_in_batch`).

        head_loss, in place of labels: gets the hidden states (B, T, D) and the head's weight (V, D) and returns the
        loss and its parts, for losses that need not hold all logits at once; none are returned then.
        """
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            observe=observe,
            return_dict=True,
        )
        logits = loss = parts = None
        if head_loss is not None:  # called here, where sharded training has gathered the weight
            loss, parts = head_loss(body.last_hidden_state, self.lm_head.weight)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(body.last_hidden_state[:, kept])
        if labels is not None and logits is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MomCausalLMOutput(
            loss=loss,
            loss_parts=parts,
            logits=logits,
            **{CACHE: getattr(body, CACHE)},
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            router_logits=body.router_logits,
            routing=body.routing,
        )
