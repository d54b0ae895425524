"""Arrows point downward only (design section 7), and what must be light is light."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import momify

PACKAGE = Path(momify.__file__).parent
# A module imports from layers below its own, or from its own package; top first.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("sweep", "convert_command"),
    ("terminal",),
    ("pipeline",),
    ("conversion", "evaluation"),
    ("subject", "generate", "plan"),
    ("models",),
    ("export",),
    ("convert", "report"),
    ("train",),
    ("evaluate", "measure"),
    ("data",),
    ("model", "demo", "runs"),
    ("recipe", "screen"),
    ("recipe_choices",),
    ("recipe_blocks",),
    ("overrides", "task_names"),
    ("mistakes", "replaced"),
    ("files", "processes", "devices", "import_hook"),
    ("errors", "amounts"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Layers of momify that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module} if node.module != "momify" else {f"momify.{a.name}" for a in node.names}
    return {name.split(".")[1] for name in names if name.startswith("momify.")}


def test_every_part_has_a_layer() -> None:
    assert len(FILES) > 40
    assert {layer(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    own = layer(path)
    for other in imported(path) - {own}:
        assert RANK[other] > RANK[own], f"{path.relative_to(PACKAGE)} imports momify.{other}, which is not below {own}"


def test_model_stands_alone() -> None:
    """An export carries these files and no others."""
    allowed = {"torch", "transformers", "dataclasses", "collections", "functools", "typing", "math", "os"}
    for path in (PACKAGE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                may = allowed | ({"triton"} if node.col_offset else set())  # inside try ... except ImportError
                assert {alias.name.split(".")[0] for alias in node.names} <= may, path.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] in allowed, path.name
                assert node.level == 0 or (node.module and "." not in node.module), path.name


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages([str(PACKAGE)], "momify."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@pytest.mark.parametrize("statement", ["import momify", "import momify.cli", "import momify.recipe"])
def test_light_modules_leave_heavy_ones_alone(statement: str) -> None:
    heavy = {"torch", "transformers", "numpy"}
    if statement != "import momify.recipe":  # pydantic and yaml are its trade
        heavy |= {"asyncio", "importlib.metadata", "pydantic", "yaml"}
    code = f"{statement}; import sys; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_short() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text("utf-8").splitlines())) > 400}
    assert not long
