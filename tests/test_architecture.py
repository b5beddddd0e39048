"""Who may read models, run code and print. Which room may import which, pyproject.toml says, and
import-linter holds it.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

from tests.support.golden import VERSIONS, copy_golden

PACKAGE = Path(__file__).parent.parent / "optimer_hf"
LOADERS = {"models.loader", "models.gguf_loader"}
LOADING = {"from_pretrained", "from_config", "get_class_from_dynamic_module"}
TAKES_NO_FLAG = {"PeftConfig", "PeftModel"}  # PEFT imports nothing that an adapter names


@functools.cache
def trees() -> dict[str, ast.Module]:
    files = {path: path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts): ast.parse(path.read_text()) for path, name in files.items()}


def names_in(tree: ast.Module) -> set[str]:
    nodes = list(ast.walk(tree))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def test_only_the_loaders_let_transformers_and_peft_read_a_model():
    assert {name for name, tree in trees().items() if names_in(tree) & LOADING} == LOADERS
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
        for name in LOADERS
        for node in ast.walk(trees()[name])
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
                allowed = {"merging.mergekit": "options.trust_remote_code"}
                assert ast.unparse(node.value) in {"False", allowed.get(name)}, name
        assert not names_in(tree) & {"pickle", "cloudpickle", "dill"}, name


def test_the_command_line_prints_through_one_function():
    calls = [
        ast.unparse(node)
        for name, tree in trees().items()
        if name.startswith("cli.")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("click.echo", "click.secho", "print")
    ]
    assert calls == ["click.echo(make_visible(str(message)), file, err=err, nl=nl)"]


ENGINES = ("torch", "transformers", "lm_eval", "mergekit", "smac", "dask", "distributed", "numba")
COMMANDS = [  # about a finished study; each finds the files that those before it wrote
    ["report", "STUDY", "report.html", "--no-vectors"],
    ["report", "STUDY", "report.html"],  # measures the cosines
    ["report", "STUDY", "report.html"],  # reads them
    ["recipe", "STUDY", "recipe.yaml"],
    ["ratios", "STUDY"],
    ["ratios", "recipe.yaml"],
    ["schema", "study"],
    ["validate", "STUDY/study.json"],
]


def test_commands_about_a_finished_study_load_no_engine(tmp_path: Path):
    study = copy_golden(VERSIONS[-1], tmp_path / "golden") / "runs" / "tiny" / "study"
    code = (
        "import sys; from optimer_hf.cli import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print('loaded', [name for name in {ENGINES} if name in sys.modules])"
    )
    loaded = []
    for command in COMMANDS:
        arguments = [text.replace("STUDY", str(study)) for text in command]
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert "Traceback" not in result.stderr, result.stderr
        loaded.append(result.stdout.splitlines()[-1])
    assert "torch" in loaded.pop(1)
    assert set(loaded) == {"loaded []"}, loaded
