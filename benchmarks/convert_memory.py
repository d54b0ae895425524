"""Peak memory of a whole conversion, calibration and refit included: python benchmarks/convert_memory.py --size gpt2-xl

A random float32 checkpoint of that shape is written to --work (and removed afterwards), one file a layer, and
converted in a process of its own, whose peak the system tells. Before each line that the conversion says stands the
peak so far. Calibration at 1.5 G parameters takes hours on a core: --importance, --block and the counts make it short.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from momify.convert.source import expected_shapes, read_config
from momify.models import BUILTIN, locate

SIZES = {  # layers, width, heads; as published
    "gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25),
}  # fmt: skip


def write_checkpoint(folder: Path, size: str) -> int:
    """A random GPT-2 with the demo's tokenizer; its bytes. Never more than a layer is in memory."""
    layers, width, heads = SIZES[size]
    config = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": 50257}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for path in locate(BUILTIN).glob("tokenizer*"):
        shutil.copy(path, folder)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in expected_shapes(read_config(folder), tied=True).items():
        part = name.split(".")[1] if name.startswith("h.") else "frame"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for file, shapes in files.items():
        save_file({name: torch.randn(shape).mul_(0.02) for name, shape in shapes.items()}, folder / file)
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak() -> float:
    """The largest size of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def convert(recipe_file: Path) -> None:
    """What `momify convert` does, with the peak so far before each line."""
    from rich.console import Console

    from momify.conversion import convert
    from momify.pipeline import check, quiet_libraries
    from momify.recipe import load_recipe
    from momify.runs import opened_run
    from momify.screen import Screen

    class Told(Screen):
        def say(self, line: str, style: str = "") -> None:
            print(f"{peak():6.2f} GB {time.perf_counter() - since:6.0f} s  {line[:90]}", flush=True)

    since, screen, recipe = time.perf_counter(), Told(Console(quiet=True)), load_recipe(recipe_file)
    quiet_libraries()
    check(recipe, screen)
    with opened_run(recipe, resume=False) as run:
        convert(recipe, run, screen)


def main() -> None:
    """Parse, write, convert, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="gpt2-medium")
    parser.add_argument("--mha", type=int, help="half of the layers if left out")
    parser.add_argument("--ffn", type=int, help="three quarters of the layers if left out")
    parser.add_argument("--importance", default="greedy")
    parser.add_argument("--block", type=int, default=1024, help="tokens of a block")
    parser.add_argument("--calibration-blocks", type=int, default=16)
    parser.add_argument("--refit-tokens", type=int, default=32_768)
    parser.add_argument("--mom", nargs="*", default=[], help="more keys of the recipe's mom block: patch_rank=16")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.convert:
        convert(given.convert)
        return
    layers = SIZES[given.size][0]
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        size = write_checkpoint(Path(folder) / "source", given.size)
        mom = {"mha": given.mha or layers // 2, "ffn": given.ffn or layers * 3 // 4, "importance": given.importance,
               "calibration_blocks": given.calibration_blocks, "refit_tokens": given.refit_tokens}  # fmt: skip
        mom |= {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in given.mom)}
        recipe = {"run": {"dir": f"{folder}/run"}, "source": {"model": f"{folder}/source"}, "mom": mom,
                  "data": {"train": BUILTIN, "block_length": given.block}}  # fmt: skip
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        subprocess.run([sys.executable, __file__, "--convert", str(path)], cwd=folder, check=True)
    found = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    more = " ".join(["", *given.mom])
    text = f"{given.calibration_blocks} x {given.block} tokens"
    how = f"{given.importance}{more} on {text}, refit on {given.refit_tokens:,}"
    print(f"{given.size} -> {mom['mha']} x {mom['ffn']}, {how}: checkpoint {size / 1e9:.2f} GB, "
          f"peak {found / 1e9:.2f} GB = {found / size:.2f} x")  # fmt: skip


if __name__ == "__main__":
    main()
