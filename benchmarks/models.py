"""What the benchmarks compare: dense GPT-2 of transformers, and MoMs of the same widths with random weights.

Random weights cost what trained ones do; only where tokens go matters, and that is set here: `home` routing sends
all tokens of a step to one module, as conversion starts; `mixed` spreads them over all modules and SKIP.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from momify.measure.flops import register_formulas
from momify.model import MomConfig, MomForCausalLM

Routing = Literal["home", "mixed"]


@dataclass(frozen=True)
class Width:
    """The widths of a GPT-2."""

    layers: int
    hidden: int
    heads: int
    positions: int = 1024
    vocab: int = 50257


WIDTHS = {
    "gpt2": Width(12, 768, 12),
    "gpt2-medium": Width(24, 1024, 16),
    "small-384": Width(8, 384, 6, vocab=1024),  # a small head, so that routed execution is what is timed
}


@dataclass(frozen=True)
class Case:
    """A MoM relative to L layers: shares of modules kept, and of steps whose half may run (SKIP for good else)."""

    name: str
    mha: float
    ffn: float
    mha_steps: float
    ffn_steps: float


CASES = {
    "full": Case("full", 1, 1, 1, 1),
    "50% MHA + 75% FFN": Case("50% MHA + 75% FFN", 0.5, 0.75, 0.5, 0.75),
    "as 8/36": Case("as 8/36", 8 / 36, 1, 16 / 36, 1),
}


def dense(width: Width) -> GPT2LMHeadModel:
    """transformers' GPT-2 with SDPA, dropout off."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=width.layers, n_embd=width.hidden, n_head=width.heads, n_positions=width.positions,
        vocab_size=width.vocab, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def mom(width: Width, case: Case, routing: Routing) -> MomForCausalLM:
    """A MoM of `width`, steps that run spread evenly."""
    torch.manual_seed(0)
    config = MomConfig(
        vocab_size=width.vocab, n_positions=width.positions, hidden_size=width.hidden,
        num_attention_heads=width.heads, intermediate_size=4 * width.hidden, num_steps=width.layers,
        **_table("mha", width.layers, case.mha, case.mha_steps),
        **_table("ffn", width.layers, case.ffn, case.ffn_steps),
    )  # fmt: skip
    model = MomForCausalLM(config).eval()
    if routing == "mixed":
        scatter_tokens(model)
    return model


def _table(kind: str, layers: int, modules: float, steps: float) -> dict[str, Any]:
    """Pool size, homes and reach of one kind."""
    pool, running = round(modules * layers), round(steps * layers)
    runs = [(step + 1) * running // layers > step * running // layers for step in range(layers)]
    homes = [step * pool // layers if run else pool for step, run in enumerate(runs)]
    reach = [list(range(pool + 1)) if run else [pool] for run in runs]
    return {f"num_{kind}_modules": pool, f"{kind}_homes": homes, f"{kind}_reach": reach}


@torch.no_grad()
def scatter_tokens(model: MomForCausalLM) -> None:
    """Routers that send tokens to every choice about as often: no bias, weights that make logits of size one."""
    for router in (model.model.mha_router, model.model.ffn_router):
        if router is not None:
            router.weight.normal_(std=router.weight.shape[1] ** -0.5)
            router.bias.zero_()


def prompt(width: Width, batch: int, tokens: int) -> torch.Tensor:
    """Ids (batch, tokens), the same in each run."""
    return torch.randint(width.vocab, (batch, tokens), generator=torch.Generator().manual_seed(1))


def macs(call: Any) -> int:
    """Multiply-adds of one call, as torch's counter sees them with momify's formulas."""
    register_formulas()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def to(model: PreTrainedModel, device: str, dtype: str) -> PreTrainedModel:
    """The model on a device, in a precision by name."""
    return model.to(device=device, dtype=getattr(torch, dtype))
