"""Routed execution against the plain loop over modules: whole model, mixed routing over 8 + 8 modules, K = 1.

    python benchmarks/gather_loop.py --width small-384

The loop is the usual way to write such a model: for each module, find its tokens, gather them, run its layers, write
the result back. It works on the same weights, and the logits of both are compared before anything is timed.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import WIDTHS, Case, Width, dense, macs, mom, prompt
from timer import alternate, circumstances
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN

from momify.model import MomForCausalLM
from momify.model.outputs import CACHE

CASE = Case("8 + 8 modules", 1, 1, 1, 1)
HEAD = (
    "| tokens | loop s | MoM s | dense s | loop over MoM | MoM over dense | products, spread over one module "
    "| MACs over dense |"
)


class Loop:
    """The forward pass of a MoM with K = 1 as a loop over modules; keys and values joined as a plain cache does."""

    def __init__(self, model: MomForCausalLM) -> None:
        self.body, self.head, self.config = model.model, model.lm_head, model.config
        self.act = ACT2FN[model.config.activation_function]

    def __call__(self, ids: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """Logits of the last position (B, vocabulary); `cache` holds a (2, B, N, S, D/N) tensor a step."""
        past = cache[0].shape[3] if cache else 0
        x = self.body.wte(ids) + self.body.wpe(torch.arange(past, past + ids.shape[1]))
        grown = []
        for step in range(self.config.num_steps):
            x = x + self._attention(x, step, cache[step] if cache else None, grown)
            x = x + self._ffn(x, step)
        if cache is not None:
            cache[:] = grown
        return self.head(self.body.ln_f(x[:, -1]))

    def _picks(self, x_hat: Tensor, kind: str, step: int) -> Tensor:
        router = getattr(self.body, f"{kind}_router")
        return (x_hat @ router.weight[step] + router.bias[step]).softmax(-1).topk(1, -1).indices.flatten()

    def _spread(self, x: Tensor, picks: Tensor, width: int, run: Callable[[Tensor, int], Tensor], count: int) -> Tensor:
        rows, out = x.flatten(0, 1), x.new_zeros(x.shape[0] * x.shape[1], width)
        for module in range(count):
            tokens = (picks == module).nonzero().flatten()
            if tokens.numel():
                out[tokens] = run(rows[tokens], module)
        return out.view(*x.shape[:2], width)

    def _attention(self, x: Tensor, step: int, past: Tensor | None, grown: list[Tensor]) -> Tensor:
        pool, c = self.body.mha, self.config
        x_hat = F.layer_norm(x, x.shape[-1:])
        picks = self._picks(x_hat, "mha", step)
        sources = torch.where(picks == c.num_mha_modules, c.mha_homes[step], picks)  # a skipping token keeps its key
        qkv = self._spread(
            x_hat, sources, 3 * c.hidden_size, lambda r, m: torch.addmm(pool.qkv.bias[m], r, pool.qkv.weight[m]),
            c.num_mha_modules,
        )  # fmt: skip
        q, k, v = qkv.view(*x.shape[:2], 3, c.num_attention_heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        grown.append(torch.stack([k, v]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1).transpose(1, 2).flatten(2)
        return self._spread(
            y, picks, c.hidden_size, lambda r, m: torch.addmm(pool.out.bias[m], r, pool.out.weight[m]),
            c.num_mha_modules,
        )  # fmt: skip

    def _ffn(self, x: Tensor, step: int) -> Tensor:
        up, down = self.body.ffn.up, self.body.ffn.down
        x_hat = F.layer_norm(x, x.shape[-1:])

        def run(rows: Tensor, m: int) -> Tensor:
            return torch.addmm(down.bias[m], self.act(torch.addmm(up.bias[m], rows, up.weight[m])), down.weight[m])

        picks = self._picks(x_hat, "ffn", step)
        return self._spread(x_hat, picks, x.shape[-1], run, self.config.num_ffn_modules)


def decoded(model: MomForCausalLM | GPT2LMHeadModel, ids: Tensor, tokens: int) -> Callable[[], Tensor]:
    """`tokens` tokens after a prompt, one by one."""
    cache = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), CACHE)

    def call() -> Tensor:
        for t in range(tokens):
            out = model(input_ids=ids[:, t : t + 1], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        cache.crop(-tokens)
        return out.logits[:, -1]

    return call


def decoded_by_loop(loop: Loop, ids: Tensor, tokens: int) -> Callable[[], Tensor]:
    """The same by the loop."""
    c = loop.config
    start = [ids.new_zeros(2, ids.shape[0], c.num_attention_heads, 0, c.hidden_size // c.num_attention_heads).float()]
    prefilled = start * c.num_steps
    loop(ids, prefilled)

    def call() -> Tensor:
        cache = list(prefilled)
        for t in range(tokens):
            logits = loop(ids[:, t : t + 1], cache)
        return logits

    return call


def products(model: MomForCausalLM, rows: int, spread: bool) -> Callable[[], None]:
    """The bare products of a model's steps for `rows` rows, nothing gathered or routed.

    spread: over all modules at each step, as mixed routing has it; else through one module a step, as a dense model
    has it. What the first takes over the second is the floor of any dispatch that calls torch's products: each
    module's weights are read for its few rows.
    """
    body, c = model.model, model.config
    pools = (body.mha.qkv, body.mha.out, body.ffn.up, body.ffn.down)
    count = c.num_mha_modules
    each = [len(part) for part in torch.arange(rows).tensor_split(min(rows, count))] if spread else [rows]
    inputs = [[torch.randn(size, pool.weight.shape[1]) for size in each] for pool in pools]
    times = max(1, 256 // rows)

    def call() -> None:
        for step in range(c.num_steps * times):
            for pool, groups in zip(pools, inputs, strict=True):
                for at, group in enumerate(groups):
                    module = (step + at) % count
                    torch.addmm(pool.bias[module], group, pool.weight[module])

    return call


def sides(width: Width, batch: int, tokens: int, decode: int) -> dict[str, Callable[[], object]]:
    """The calls to time, after a check that loop and MoM agree."""
    model, side = mom(width, CASE, "mixed"), dense(width)
    ids, loop = prompt(width, batch, tokens), Loop(model)
    if decode:
        calls = {
            "loop": decoded_by_loop(loop, ids, decode),
            "mom": decoded(model, ids, decode),
            "dense": decoded(side, ids, decode),
        }
    else:
        calls = {
            "loop": lambda: loop(ids),
            "mom": lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1],
            "dense": lambda: side(input_ids=ids, use_cache=False, logits_to_keep=1).logits,
        }
    difference = (calls["loop"]() - calls["mom"]()).abs().max().item()
    assert difference < 1e-3, f"loop and MoM differ by {difference}"
    rows = batch if decode else batch * tokens
    return calls | {"spread": products(model, rows, spread=True), "one": products(model, rows, spread=False)}


def main() -> None:
    """Parse, compare, time, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", default="small-384", choices=WIDTHS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    width = WIDTHS[args.width]
    print(circumstances() + f", float32, {args.width}, {args.rounds} alternating rounds\n\n{HEAD}\n{'|---' * 8}|")
    work = (
        ("1 x 1024", 1, 1024, 0),
        ("1 x 64", 1, 64, 0),
        ("decode, batch 8", 8, 32, 16),
        ("decode, batch 1", 1, 32, 16),
    )
    with torch.no_grad():
        for name, batch, tokens, decode in work:
            calls = sides(width, batch, tokens, decode)
            share = macs(calls["mom"]) / macs(calls["dense"])
            times = alternate(calls, rounds=args.rounds)
            row = [times.of("loop"), times.of("mom"), times.of("dense"), times.ratio("loop", "mom")]
            row += [times.ratio("mom", "dense"), times.ratio("spread", "one")]
            print(f"| {name} | {' | '.join(map(str, row))} | {share:.3f} |", flush=True)


if __name__ == "__main__":
    main()
