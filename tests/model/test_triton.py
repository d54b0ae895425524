"""The Triton kernels without a GPU: numbers under the interpreter, and compiled for the chips they are meant for."""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (pip install 'momify[triton]', Linux only)")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from momify.model.triton_dispatch import row_tile, weight_tile
from momify.model.triton_kernels import rows_kernel, weights_kernel

HERE = Path(__file__).parent
# Shared memory that one block may have, in bytes: A100 and H100 (CUDA programming guide, compute capabilities).
SHARED = {80: 166_912, 90: 232_448}
POINTERS = {
    "rows": ("x", "weight", "bias", "y", "before", "sources", "places", "gates", "ends"),
    "weights": ("x", "grad", "weight", "bias", "sources", "places", "gates", "ends"),
}
SCALARS = {
    "rows": (
        "inner",
        "outputs",
        "x_stride",
        "w_module",
        "w_inner",
        "w_output",
        "b_module",
        "y_stride",
        "before_stride",
    ),
    "weights": ("inner", "outputs", "x_stride", "grad_stride"),
}
PRECISIONS = (("bf16", 2, "ieee"), ("fp32", 4, "tf32"), ("fp32", 4, "ieee"))
FORWARD = {"GATHER": True, "SCATTER": False, "BIAS": True, "GATES": False, "ACTIVATION": "gelu_tanh", "SAVE": True}
RETURN = {"GATHER": False, "SCATTER": True, "BIAS": True, "GATES": True, "ACTIVATION": "", "SAVE": False}
BACKWARD = {"GATHER": True, "SCATTER": False, "BIAS": False, "GATES": True, "ACTIVATION": "gelu_tanh", "SAVE": False}


@pytest.mark.timeout(900)  # half a minute of one core, many on a busy machine
def test_kernels_equal_the_reference_under_the_interpreter() -> None:
    """In a process of its own: the interpreter has to be chosen before the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-W", "ignore", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(
        [*command, str(HERE / "interpreted.py")], env=environment, capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 35


def compiled(
    kind: str, capability: int, dtype: str, constants: dict, weights_transposed: bool = False
) -> tuple[int, str]:
    """Shared memory in bytes, and the line of cuobjdump that tells registers and stack, of one compiled kernel."""
    kernel = rows_kernel if kind == "rows" else weights_kernel
    tile = {name: value for name, value in constants.items() if not name.startswith("num_")}
    index = {"sources": "*i64", "places": "*i64", "ends": "*i32", "gates": "*fp32"}
    signature = {name: index.get(name, f"*{dtype}") for name in POINTERS[kind]}
    # a stride of 1 is a constant to Triton: of inner in a transposed weight, else of outputs
    ones = {"w_inner" if weights_transposed else "w_output": 1} if kind == "rows" else {}
    signature |= {name: "constexpr" if name in ones else "i32" for name in SCALARS[kind]}
    signature |= dict.fromkeys(tile, "constexpr")
    order = {name: at for at, name in enumerate(kernel.arg_names)}
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = {(order[n],): [["tt.divisibility", 16]] for n in (*POINTERS[kind], *SCALARS[kind]) if n not in ones}
    source = ASTSource(fn=kernel, signature=signature, constexprs={**tile, **ones}, attrs=aligned)
    options = {name: value for name, value in constants.items() if name.startswith("num_")}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return done.metadata.shared, resources(done.asm["cubin"])


def resources(cubin: bytes) -> str:
    """What cuobjdump says of registers and stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return next(line for line in out.splitlines() if "REG:" in line)


def row_kernels() -> list:
    """Every tile that row_tile chooses, in each precision, for forward and backward passes."""
    found = []
    for (dtype, item, precision), each in itertools.product(PRECISIONS, (1, 30, 200, 1000)):
        tile = row_tile(each * 8, 8, item)
        for name, flags in (("up", FORWARD), ("down", RETURN), ("back", BACKWARD)):
            case = (dtype, precision, tuple({**flags, **tile}.items()), name == "back")
            if case not in [old.values for old in found] and (name != "down" or each == 200):
                found.append(pytest.param(*case, id=f"{dtype}-{precision}-{tile['ROWS']}-{name}"))
    return found


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "precision", "constants", "transposed"), row_kernels())
def test_rows_kernel_fits_the_chip(capability, dtype, precision, constants, transposed) -> None:
    fixed = {"MODULES": 8, "SPAN": 8, "SLOPE": transposed, "PRECISION": precision, "TILES": 24}
    shared, line = compiled("rows", capability, dtype, {**dict(constants), **fixed}, transposed)
    assert 0 < shared <= SHARED[capability]
    assert "STACK:0 " in line, line


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "item", "precision"), PRECISIONS)
def test_weights_kernel_fits_the_chip(capability, dtype, item, precision) -> None:
    flags = {"GATHER": True, "SCATTER": True, "GATES": False, "PRECISION": precision}
    shared, line = compiled("weights", capability, dtype, {**flags, **weight_tile(item)})
    assert 0 < shared <= SHARED[capability]
    assert "STACK:0 " in line, line


def test_a_kernel_that_spills_is_noticed() -> None:
    """Tiles far too large for four warps: the line that the tests above read says so."""
    large = {**FORWARD, "SLOPE": False, "PRECISION": "ieee", "MODULES": 8, "SPAN": 8, "TILES": 24}
    large |= {"ROWS": 256, "OUTPUTS": 128, "INNER": 32, "num_warps": 4, "num_stages": 2}
    _, line = compiled("rows", 80, "bf16", large)
    assert "STACK:0 " not in line, line
