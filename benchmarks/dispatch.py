"""Routed products alone: every backend against one dense product of the same arithmetic, and against the peak.

    python benchmarks/dispatch.py                                   # this machine's CPU
    python benchmarks/dispatch.py --device cuda --dtype bfloat16    # a GPU, with the Triton kernels

`bare` is the floor of what torch can do: the products of the groups alone, rows already sorted, nothing gathered,
weighed or put back. What `bare` takes over dense is the price of reading every module's weights for its few rows.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from models import WIDTHS
from timer import alternate, circumstances
from torch import Tensor

from momify.model.activation import make_activation
from momify.model.dispatch import BACKENDS, Backend, has_triton, routed
from momify.model.grouped_dispatch import run_chain
from momify.model.plan import make_plan
from momify.model.pool import Stack, StackedLinear

# Dense peak in TFLOP/s as the makers state it; for other chips the largest product measured here counts as the peak.
PEAKS = {
    ("A100", "bfloat16"): 312.0,
    ("H100", "bfloat16"): 989.0,
    ("H200", "bfloat16"): 989.0,
    ("A100", "float32"): 19.5,
}
HEAD = "| tokens | product | pass | side | ms | over dense | TFLOP/s | of peak |\n|---|---|---|---|---|---|---|---|"


def layers(kind: str, modules: int, width: int, device: str, dtype: torch.dtype) -> list[StackedLinear]:
    """The stacked matrices of one product: a feed-forward module's two, or the attention's q, k, v."""
    shapes = [(width, 4 * width), (4 * width, width)] if kind == "ffn" else [(width, 3 * width)]
    made = [StackedLinear(modules, *shape) for shape in shapes]
    for layer in made:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return [layer.to(device, dtype) for layer in made]


def bare(rows: tuple[Tensor, ...], stacks: list[Stack], activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Each group through its module."""
    return torch.cat([run_chain(group, module, stacks, activation) for module, group in enumerate(rows) if len(group)])


def through(x: Tensor, modules: Tensor, backend: Backend, pool: list[StackedLinear], activation: object) -> Tensor:
    """A half-step's product, the sorting included."""
    plan = make_plan(modules, None, pool[0].weight.shape[0], backend.wait)
    return routed(x, plan, [layer() for layer in pool], activation, backend)


def sides(x: Tensor, modules: Tensor, pool: list[StackedLinear], names: list[str]) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""
    activation = make_activation("gelu_new")
    count = pool[0].weight.shape[0]
    order = modules[:, 0].argsort(stable=True)
    sizes = torch.bincount(modules[:, 0], minlength=count).tolist()
    rows = x.detach()[order].split(sizes)
    found = {
        "dense": lambda: run_chain(x, 0, [layer() for layer in pool], activation),
        "bare": lambda: bare(rows, [layer() for layer in pool], activation),
    }
    return found | {name: partial(through, x, modules, BACKENDS[name], pool, activation) for name in names}


def repeated(call: Callable[[], Tensor], times: int, backward: bool) -> Callable[[], None]:
    """`times` calls in a row, with gradients or without."""

    def run() -> None:
        for _ in range(times):
            if backward:
                call().sum().backward()
            else:
                with torch.no_grad():
                    call()

    return run


def peak(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s: the maker's number, or a product of 4096 (CPU: 2048) squared matrices here."""
    name = torch.cuda.get_device_name() if device != "cpu" else ""
    for (chip, kind), value in PEAKS.items():
        if chip in name and str(dtype).endswith(kind):
            return value
    size = 2048 if device == "cpu" else 4096
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    times = alternate({"product": lambda: a @ b}, rounds=5, device=device)
    return 2 * size**3 / min(times.seconds["product"]) / 1e12


def main() -> None:
    """Parse, time, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", default="gpt2", choices=WIDTHS)
    parser.add_argument("--modules", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 1024, 8192])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, width = getattr(torch, args.dtype), WIDTHS[args.width].hidden
    names = ["reference", "grouped"] + (["triton"] if has_triton(torch.device(args.device)) else [])
    most = peak(args.device, dtype)
    print(
        circumstances(args.device) + f", {args.dtype}, width {width}, {args.modules} modules, peak {most:.3g} TFLOP/s"
    )
    print(f"\n{HEAD}")
    for tokens in args.tokens:
        for kind in ("ffn", "qkv"):
            table(args, tokens, kind, names, most)


def table(args: argparse.Namespace, tokens: int, kind: str, names: list[str], most: float) -> None:
    """The rows of one product: forward, and forward with backward."""
    dtype, width = getattr(torch, args.dtype), WIDTHS[args.width].hidden
    torch.manual_seed(0)
    pool = layers(kind, args.modules, width, args.device, dtype)
    x = torch.randn(tokens, width, device=args.device).to(dtype).requires_grad_()
    modules = torch.randint(args.modules, (tokens, 1), device=args.device)
    flops = 2 * tokens * sum(layer.weight[0].numel() for layer in pool)
    for backward in (False, True):
        times_in_a_row = 1 if backward else max(1, min(20, int(1e9 / flops)))
        calls = sides(x, modules, pool, names)
        timed = {name: repeated(call, times_in_a_row, backward) for name, call in calls.items()}
        times = alternate(timed, rounds=args.rounds, device=args.device)
        for name in calls:
            each = times.of(name).median / times_in_a_row
            rate = flops * (3 if backward else 1) / each / 1e12
            what = "forward + backward" if backward else "forward"
            ratio = times.ratio(name, "dense")
            print(
                f"| {tokens} | {kind} | {what} | {name} | {1e3 * each:.3g} | {ratio} | {rate:.3g} | {rate / most:.0%} |"
            )


if __name__ == "__main__":
    main()
