"""Random MoM models, GPT-2 taken apart by hand, and the model's mathematics as a plain loop over tokens."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN

from momify.model import MomConfig, MomForCausalLM, MomForSequenceClassification

SIZES: dict[str, Any] = {
    "vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "num_mha_modules": 3, "num_ffn_modules": 4, "num_steps": 4, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def random_mom(head: type = MomForCausalLM, seed: int = 0, **changes: Any) -> Any:
    """A MoM whose parameters are large enough that routing is mixed and every part shows in the logits."""
    model = head(MomConfig(**{**SIZES, **changes}))
    generator = torch.Generator().manual_seed(seed)
    scale = {
        "router.weight": 0.5,
        "router.bias": 0.5,
        "bias": 0.1,
        "wte": 0.5,
        "wpe": 0.5,
        "ln_f.weight": 1.0,
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = next((value for part, value in scale.items() if part in name), 0.15)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def folded_mom(gpt2: GPT2LMHeadModel, **changes: Any) -> MomForCausalLM:
    """A MoM with every layer of `gpt2` as a module, LayerNorms folded: W' = diag(gamma) W, b' = b + beta W."""
    c = gpt2.config
    layers = len(gpt2.transformer.h)
    shape = {
        "vocab_size": c.vocab_size, "n_positions": c.n_positions, "hidden_size": c.n_embd, "num_steps": layers,
        "num_attention_heads": c.n_head, "intermediate_size": c.n_inner or 4 * c.n_embd,
        "activation_function": c.activation_function, "num_mha_modules": layers, "num_ffn_modules": layers,
        "tie_word_embeddings": c.tie_word_embeddings, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model = MomForCausalLM(MomConfig(**{**shape, **changes})).eval()
    body, source = model.model, gpt2.transformer
    with torch.no_grad():
        body.wte.weight.copy_(source.wte.weight)
        body.wpe.weight.copy_(source.wpe.weight)
        body.ln_f.load_state_dict(source.ln_f.state_dict())
        model.lm_head.weight.copy_(gpt2.lm_head.weight)
        for i, block in enumerate(source.h):
            _fold(body.mha.qkv, i, block.ln_1, block.attn.c_attn)
            _fold(body.ffn.up, i, block.ln_2, block.mlp.c_fc)
            for stack, layer in ((body.mha.out, block.attn.c_proj), (body.ffn.down, block.mlp.c_proj)):
                stack.weight[i], stack.bias[i] = layer.weight, layer.bias
    return model


def _fold(stack: Any, i: int, norm: Any, layer: Any) -> None:
    gamma, beta, w, b = (p.double() for p in (norm.weight, norm.bias, layer.weight, layer.bias))
    stack.weight[i], stack.bias[i] = gamma[:, None] * w, b + beta @ w


class PlainLoop:
    """The routed forward of a float64 model, token by token; written from design section 2, not from the code."""

    def __init__(self, model: MomForCausalLM) -> None:
        self.config, self.body, self.head = model.config, model.model, model.lm_head
        self.picked: list[tuple[str, int, list[int]]] = []

    def logits(self, ids: Tensor) -> Tensor:
        """(T, vocabulary) for one row of ids (T,) without padding."""
        x = [self.body.wte.weight[token] + self.body.wpe.weight[t] for t, token in enumerate(ids.tolist())]
        for step in range(self.config.num_steps):
            for kind, half in (("mha", self._attention), ("ffn", self._feed_forward)):
                hats = [self._normal(row) for row in x]
                picks = [self._pick(kind, step, hat) for hat in hats]
                patches = [self._patch(kind, step, hat, gates) for hat, gates in zip(hats, picks, strict=True)]
                x = self._add(self._add(x, half(hats, self._modules(kind, picks), step)), patches)
        norm = self.body.ln_f
        return torch.stack([(self._normal(r) * norm.weight + norm.bias) @ self.head.weight.T for r in x])

    def _add(self, x: list[Tensor], y: list[Tensor | None]) -> list[Tensor]:
        return [a if b is None else a + b for a, b in zip(x, y, strict=True)]

    def _normal(self, row: Tensor) -> Tensor:
        row = row - row.mean()
        return row / torch.sqrt((row**2).mean() + self.config.layer_norm_epsilon)

    def _pick(self, kind: str, step: int, x_hat: Tensor) -> dict[int, float]:
        """Gate of each choice picked."""
        reach = self.config.reach(kind)[step]
        if len(reach) == 1:
            return {reach[0]: 1.0}
        router = getattr(self.body, f"{kind}_router")
        row = self.config.routed(kind).index(step)
        if self.config.router_hidden:
            x_hat = torch.nn.functional.gelu(x_hat @ router.w_in[row] + router.b_in[row])
        scores = (x_hat @ router.weight[row] + router.bias[row]).tolist()
        best = sorted(reach, key=lambda choice: -scores[choice])[: self.config.modules_per_token]
        self.picked.append((kind, step, best))
        odds = {choice: math.exp(scores[choice] / self.config.router_tau) for choice in best}
        return {choice: odds[choice] / sum(odds.values()) for choice in best}

    def _modules(self, kind: str, picks: list[dict[int, float]]) -> list[dict[int, float]]:
        """Gates of the modules picked, SKIP left out."""
        skip = self.config.num_modules(kind)
        return [{choice: gate for choice, gate in gates.items() if choice != skip} for gates in picks]

    def _patch(self, kind: str, step: int, x_hat: Tensor, gates: dict[int, float]) -> Tensor | None:
        skip = self.config.num_modules(kind)
        if not self.config.patch_rank or skip not in gates:
            return None
        part = getattr(self.body, f"{kind}_patch")
        row = [s for s, reach in enumerate(self.config.reach(kind)) if skip in reach].index(step)
        return gates[skip] * (part.bias[row] + x_hat @ part.weight_in[row] @ part.weight_out[row])

    def _through(self, name: str, i: int, step: int, x: Tensor) -> Tensor:
        """x through one matrix of module i, as that step has it: with its delta folded in."""
        kind, part = name.split(".")
        stack = getattr(getattr(self.body, kind), part)
        weight, bias = stack.weight[i], stack.bias[i]
        homes, reach = self.config.homes(kind), self.config.reach(kind)
        steps = [s for s, home in enumerate(homes) if reach[s] == [home] and homes.count(home) > 1]
        steps = [s for s in steps if homes[s] != self.config.num_modules(kind)]
        if self.config.step_rank and step in steps:
            delta, row = getattr(getattr(self.body, f"{kind}_delta"), part), steps.index(step)
            weight = weight + delta.weight_in[row] @ delta.weight_out[row]
            bias = bias + delta.bias[row]
        return x @ weight + bias

    def _attention(self, hats: list[Tensor], picks: list[dict[int, float]], step: int) -> list[Tensor | None]:
        skip, home = self.config.num_mha_modules, self.config.mha_homes[step]
        qkv: list[Tensor | None] = []
        for hat, gates in zip(hats, picks, strict=True):
            if gates:
                total = sum(gates.values())
                parts = [g / total * self._through("mha.qkv", i, step, hat) for i, g in gates.items()]
                qkv.append(torch.stack(parts).sum(0))
            elif self.config.skipped_keys == "home" and home != skip:
                qkv.append(self._through("mha.qkv", home, step, hat))
            else:
                qkv.append(None)
        return [self._attend(qkv, t, gates, step) if gates else None for t, gates in enumerate(picks)]

    def _attend(self, qkv: list[Tensor | None], t: int, gates: dict[int, float], step: int) -> Tensor:
        heads = self.config.num_attention_heads
        seen = [row.reshape(3, heads, -1) for row in qkv[: t + 1] if row is not None]
        query, size = seen[-1][0], seen[-1].shape[-1]
        context = []
        for head in range(heads):
            scores = torch.stack([query[head] @ row[1, head] / math.sqrt(size) for row in seen])
            weights = torch.softmax(scores, dim=0)
            context.append(torch.stack([w * row[2, head] for w, row in zip(weights, seen, strict=True)]).sum(0))
        y = torch.cat(context)
        return torch.stack([g * self._through("mha.out", i, step, y) for i, g in gates.items()]).sum(0)

    def _feed_forward(self, hats: list[Tensor], picks: list[dict[int, float]], step: int) -> list[Tensor | None]:
        act = ACT2FN[self.config.activation_function]
        rows: list[Tensor | None] = []
        for hat, gates in zip(hats, picks, strict=True):
            parts = [
                g * self._through("ffn.down", i, step, act(self._through("ffn.up", i, step, hat)))
                for i, g in gates.items()
            ]
            rows.append(torch.stack(parts).sum(0) if parts else None)
        return rows


@pytest.fixture
def make_mom() -> Callable[..., Any]:
    """`random_mom`."""
    return random_mom


@pytest.fixture
def make_classifier() -> Callable[..., Any]:
    """`random_mom` with a classification head."""
    return lambda **changes: random_mom(MomForSequenceClassification, **changes)


@pytest.fixture
def fold_gpt2() -> Callable[..., MomForCausalLM]:
    """`folded_mom`."""
    return folded_mom


@pytest.fixture
def plain_loop() -> type[PlainLoop]:
    """`PlainLoop`."""
    return PlainLoop


@pytest.fixture
def token_ids() -> Tensor:
    """(3, 11) token ids, none of them 0, which tests use for padding."""
    return torch.randint(1, 61, (3, 11), generator=torch.Generator().manual_seed(7))
