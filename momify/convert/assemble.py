"""Puts folded layers and a plan of homes together into a Mixture-of-Modules model (design sections 2, 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from momify.convert.homes import HomePlan
from momify.convert.layers import Frame, Layers, LayerSettings, take_apart, take_frame
from momify.convert.network import Network
from momify.convert.source import Source
from momify.convert.stand_ins import StandIns, stand_in_state
from momify.errors import MomifyError
from momify.model import MomConfig, MomForCausalLM

SHARED_FIELDS = (  # same name and meaning in GPT2Config and MomConfig; whether tied is said by the weights
    "vocab_size", "n_positions", "activation_function", "layer_norm_epsilon", "initializer_range",
    "embd_pdrop", "attn_pdrop", "resid_pdrop", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class RouterSettings:
    """How the routers are built and started; the names are MomConfig's without "router_". seed: of what is drawn."""

    tau: float = 1.0
    hidden: int = 0
    home_bias: float = 4.0
    explore: float = 0.0
    skipped_keys: str = "home"
    seed: int = 0


def layer_settings(config: GPT2Config) -> LayerSettings:
    """What taking a GPT-2 of this config apart depends on."""
    return LayerSettings(
        num_layers=config.n_layer,
        num_heads=config.n_head,
        scale_attn_weights=config.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
    )


def network_of(source: Source, dtype: torch.dtype = torch.float32) -> Network:
    """The source taken apart: what `measure_importance` runs and `assemble` takes its layers from."""
    return Network(
        layers=take_apart(source.tensors, layer_settings(source.config), dtype),
        frame=take_frame(source.tensors, dtype),
        num_heads=source.config.n_head,
        activation=ACT2FN[source.config.activation_function],
        epsilon=source.config.layer_norm_epsilon,
    )


def mom_config(
    config: GPT2Config, plan: HomePlan, tied: bool = True, routers: RouterSettings | None = None
) -> MomConfig:
    """The config of the MoM that `plan` makes of a source of `config`.

    Raises MomifyError for settings that MomConfig refuses.
    """
    routers = routers or RouterSettings()
    width = config.n_embd
    try:
        return MomConfig(
            **{name: getattr(config, name) for name in SHARED_FIELDS},
            hidden_size=width,
            num_attention_heads=config.n_head,
            intermediate_size=config.n_inner or 4 * width,
            tie_word_embeddings=tied,
            num_mha_modules=len(plan.mha_layers),
            num_ffn_modules=len(plan.ffn_layers),
            num_steps=len(plan.step_layers),
            modules_per_token=plan.modules_per_token,
            mha_homes=list(plan.mha_homes),
            ffn_homes=list(plan.ffn_homes),
            mha_reach=[list(choices) for choices in plan.mha_reach],
            ffn_reach=[list(choices) for choices in plan.ffn_reach],
            router_tau=routers.tau,
            router_hidden=routers.hidden,
            home_bias=0.0 if plan.init == "random" else routers.home_bias,
            router_explore=routers.explore,
            skipped_keys=routers.skipped_keys,
            patch_rank=plan.patch_rank,
            step_rank=plan.step_rank,
        )
    except ValueError as error:
        raise MomifyError(str(error)) from error


def assemble(
    source: Source,
    network: Network,
    plan: HomePlan,
    dtype: torch.dtype = torch.float32,
    routers: RouterSettings | None = None,
    stand_ins: StandIns | None = None,
) -> MomForCausalLM:
    """The MoM of `plan` in `dtype`, in evaluation mode, filled from the source's folded layers.

    init "home": every step starts at its home. init "random": the paper's routers, drawn at random. `stand_ins`: fitted
    patches and step deltas; those of the plan that are not among them do nothing yet. The network is used up: its
    tensors become the model's parameters, those that stay moved to the front, so that nothing is in memory twice.
    """
    routers = routers or RouterSettings()
    state = state_of(network.layers, network.frame, plan)
    std = source.config.initializer_range
    state |= stand_in_state(plan, network.layers, stand_ins or {}, std, routers.seed)
    with no_init_weights():
        model = MomForCausalLM(mom_config(source.config, plan, source.tied, routers))
    outcome = model.load_state_dict(state, strict=False, assign=True)
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = name in state  # init_weights then starts the routers only
    model.init_weights()
    strays = [name for name in outcome.missing_keys if "_router." not in name] + list(outcome.unexpected_keys)
    assert not strays, f"convert and model disagree about {strays}"
    if plan.init == "random":
        draw_routers(model, routers.seed)
    return model.to(dtype).eval()


def state_of(layers: Layers, frame: Frame, plan: HomePlan) -> dict[str, Tensor]:
    """The state dict of the plan's MoM apart from its routers, in the memory of `layers`, which is used up."""
    mha, ffn = plan.mha_layers, plan.ffn_layers
    return {
        "model.wte.weight": frame.wte,
        "model.wpe.weight": frame.wpe,
        "model.ln_f.weight": frame.ln_f_weight,
        "model.ln_f.bias": frame.ln_f_bias,
        "lm_head.weight": frame.head,
        "model.mha.qkv.weight": _at_the_front(layers.qkv_weight, mha),
        "model.mha.qkv.bias": _at_the_front(layers.qkv_bias, mha),
        "model.mha.out.weight": _at_the_front(layers.out_weight, mha),
        "model.mha.out.bias": _at_the_front(layers.out_bias, mha),
        "model.ffn.up.weight": _at_the_front(layers.up_weight, ffn),
        "model.ffn.up.bias": _at_the_front(layers.up_bias, ffn),
        "model.ffn.down.weight": _at_the_front(layers.down_weight, ffn),
        "model.ffn.down.bias": _at_the_front(layers.down_bias, ffn),
    }


def _at_the_front(stack: Tensor, layers: Sequence[int]) -> Tensor:
    """These layers, ascending, of a stack: moved to its front and seen without the rest."""
    for place, layer in enumerate(layers):
        if place != layer:
            stack[place] = stack[layer]
    return stack[: len(layers)]


@torch.no_grad()
def draw_routers(model: MomForCausalLM, seed: int) -> None:
    """The paper's start: router parameters uniform within 1/sqrt(inputs), as torch draws a linear layer."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "_router." in name:
            shape, part = parameter.shape, name.rsplit(".", 1)[1]
            first_layer = part in ("w_in", "b_in") or not model.config.router_hidden
            inputs = model.config.hidden_size if first_layer else model.config.router_hidden
            parameter.copy_(torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator))
