"""Prefill, decoding and a training step: MoM against dense GPT-2, time ratio over MAC ratio.

python benchmarks/forward.py --width gpt2 --what prefill decode-1 decode-8 train
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from models import CASES, WIDTHS, Width, dense, macs, mom, prompt, to
from timer import alternate, circumstances
from torch import Tensor
from transformers import PreTrainedModel

from momify.model.outputs import CACHE

HEAD = "| what | MoM | routing | dense s | MoM s | time ratio | MAC ratio | time over MACs |\n" + "|---" * 8 + "|"


@dataclass(frozen=True)
class Work:
    """One kind of work: a batch, a prompt, tokens decoded after it, or a training step."""

    batch: int
    tokens: int
    decode: int = 0
    train: bool = False


WORK = {
    "prefill": Work(1, 1024),
    "decode-1": Work(1, 64, decode=16),
    "decode-8": Work(8, 64, decode=16),
    "train": Work(1, 512, train=True),
}


def prefill(model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    """One forward pass over the prompt, logits of the last position."""

    def call() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return call


def decode(model: PreTrainedModel, ids: Tensor, tokens: int) -> Callable[[], object]:
    """`tokens` tokens one by one, fixed ones, after a prompt that is read untimed and then cropped back to."""
    following = ids.roll(1, 1)[:, :tokens]
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), CACHE)

    def call() -> None:
        with torch.no_grad():
            for t in range(tokens):
                model(input_ids=following[:, t : t + 1], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        cache.crop(-tokens)

    return call


def train(model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    """Forward and backward of the next-token loss, without an optimizer."""
    model.train()

    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return call


def make(model: PreTrainedModel, work: Work, width: Width, device: str) -> Callable[[], object]:
    """The timed call of one model."""
    ids = prompt(width, work.batch, work.tokens).to(device)
    if work.train:
        return train(model, ids)
    return decode(model.eval(), ids, work.decode) if work.decode else prefill(model.eval(), ids)


def main() -> None:
    """Parse, time, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", nargs="+", default=["gpt2"], choices=WIDTHS)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--routing", nargs="+", default=["home", "mixed"])
    parser.add_argument("--what", nargs="+", default=list(WORK), choices=WORK)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(circumstances(args.device) + f", {args.dtype}, {args.rounds} alternating rounds")
    for name in args.width:
        width = WIDTHS[name]
        print(f"\n## {name}\n\n{HEAD}")
        side = to(dense(width), args.device, args.dtype)
        for case in args.case:
            for routing in args.routing:
                model = to(mom(width, CASES[case], routing), args.device, args.dtype)
                for what in args.what:
                    build = partial(make, work=WORK[what], width=width, device=args.device)
                    calls = {"dense": build(side), "mom": build(model)}
                    share = macs(calls["mom"]) / macs(calls["dense"])
                    times = alternate(calls, rounds=args.rounds, warmup=1, device=args.device)
                    ratio = times.ratio("mom", "dense")
                    print(
                        f"| {what} | {case} | {routing} | {times.of('dense')} | {times.of('mom')} | {ratio} "
                        f"| {share:.3f} | **{ratio.median / share:.3f}** ({ratio.low / share:.3f}-"
                        f"{ratio.high / share:.3f}) |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
