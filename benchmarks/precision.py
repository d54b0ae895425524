"""Forward and backward in bfloat16 and in float32, alternating: why train.precision goes by the machine.

    python benchmarks/precision.py
    python benchmarks/precision.py --threads 1 --rounds 5

The shipped model reads 4 sequences of 256 tokens, as in a step of `momify demo`. Prints the machine, whether momify
takes it for one that computes bfloat16, and both times.
"""

import argparse

import torch
from timer import alternate, circumstances

from momify.models import load_model, locate
from momify.train.precision import computes_bf16

SEQUENCES, BLOCK = 4, 256


def main() -> None:
    """Time both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load_model(locate("builtin:demo")).train()
    ids = torch.randint(0, model.config.vocab_size, (SEQUENCES, BLOCK))  # (B, T)

    def step(bf16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad()

    times = alternate({"bf16": lambda: step(True), "fp32": lambda: step(False)}, given.rounds, warmup=1)
    print(circumstances())
    print(f"momify takes this processor for one that computes bfloat16: {'yes' if computes_bf16('cpu') else 'no'}")
    print(
        f"seconds a step: bf16 {times.of('bf16')}, fp32 {times.of('fp32')}; bf16 / fp32 {times.ratio('bf16', 'fp32')}"
    )


if __name__ == "__main__":
    main()
