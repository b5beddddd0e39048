"""The shape of the package: imports go one way, and the command line starts without the heavy
libraries.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "optimer_hf"
ORDER = [
    "errors",
    "files",
    "faults",
    "memory",
    "progress",
    "texts",
    "corpus",
    "checkpoint",
    "convert",
    "head",
    "growth",
    "kernel",
    "adapter",
    "train",
    "quantize",
    "vector",
    "tokenizer",
    "merge",
    "merge_config",
    "geometry",
    "resident",
    "harness",
    "evaluate",
    "overlap",
    "surrogate",
    "study",
    "trial",
    "workers",
    "tracking",
    "smac_parts",
    "ask",
    "search",
    "ledger",
    "retarget",
    "baselines",
    "compare",
    "report",
    "recipe",
    "schema",
    "ratios",
    "private",
    "publish",
    "untrusted",
    "card",
    "remote",
    "push",
    "pull",
    "hub",
    "plan",
    "pipeline",
    "seeds",
    "cli",
]


def imported(module: str) -> set[str]:
    """Return the modules of this package that a module imports, also inside functions."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimer_hf"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_modules_above_it(module: str):
    allowed = set(ORDER[: ORDER.index(module)])
    assert imported(module) <= allowed


def test_every_module_has_its_place_in_the_order():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(ORDER)


def test_no_module_trusts_remote_code_or_pickles():
    for path in PACKAGE.glob("*.py"):
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        }
        keywords = {
            node.arg
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.keyword)
        }
        assert "trust_remote_code" not in keywords
        assert "pickle" not in names
