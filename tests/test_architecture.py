"""The shape of the package: imports go one way, and the command line starts without the heavy
libraries.
"""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "optimer_hf"
ORDER = [
    "errors",
    "printable",
    "secret",
    "reading",
    "files",
    "guard",
    "faults",
    "memory",
    "progress",
    "texts",
    "corpus",
    "checkpoint",
    "gguf_header",
    "loader",
    "gguf_config",
    "packages",
    "convert",
    "ties",
    "settings",
    "vocabulary",
    "names",
    "head",
    "growth",
    "kernel",
    "patterns",
    "adapter_config",
    "adapter",
    "training_state",
    "train",
    "quantize",
    "vector",
    "tokenizer",
    "merge",
    "merge_method",
    "mergekit_yaml",
    "merge_check",
    "merge_config",
    "geometry",
    "resident",
    "harness",
    "intervals",
    "evaluate",
    "overlap",
    "record",
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


LOADING = {"from_pretrained", "from_config", "get_class_from_dynamic_module"}
TAKES_NO_FLAG = {"PeftConfig", "PeftModel"}  # PEFT imports nothing that an adapter names


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}


def names_in(tree: ast.Module) -> set[str]:
    nodes = list(ast.walk(tree))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def test_one_module_lets_transformers_and_peft_read_a_model():
    assert {name for name, tree in trees().items() if names_in(tree) & LOADING} == {"loader"}
    for name, tree in trees().items():
        imported = [
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "transformers"
            for alias in node.names
        ]
        assert "pipeline" not in imported, name


def test_every_loading_call_says_that_no_code_is_trusted():
    calls = [
        node
        for node in ast.walk(trees()["loader"])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LOADING
    ]
    assert calls
    for call in calls:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if ast.unparse(call.func.value) not in TAKES_NO_FLAG:
            assert keywords.get("trust_remote_code") == "False", ast.unparse(call)


def test_no_module_trusts_remote_code_or_pickles():
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                # mergekit's own flag, which `optimer merge` hands on when a person gives it
                allowed = {"merge_config": "options.trust_remote_code"}
                assert ast.unparse(node.value) in {"False", allowed.get(name)}, name
        assert not names_in(tree) & {"pickle", "cloudpickle", "dill"}, name


def test_the_command_line_prints_through_one_function():
    calls = [
        ast.unparse(node)
        for node in ast.walk(trees()["cli"])
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("click.echo", "click.secho", "print")
    ]
    assert calls == ["click.echo(visible(str(message)), err=err, nl=nl)"]
