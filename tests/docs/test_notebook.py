"""The notebooks in examples/ and docs/ run from first cell to last in a real kernel, and
what the cells show is short.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "search.ipynb"
SMALL = {'"n_trials": 30}': '"n_trials": 6, "rescore_top": 1}', '"limit": 100': '"limit": 4'}


@pytest.fixture(scope="module")
def cells(tmp_path_factory, make_base, make_tuned, corpus_dir):
    """The cells after they ran over tiny models and texts."""
    folder = tmp_path_factory.mktemp("notebook")
    base = make_base("llama")
    names = {"google/gemma-3-270m": base.path}
    for seed, name in enumerate(("you/gemma-math", "./my-code-lora")):
        names[name] = make_tuned(base, "llama", seed)
    for name, source in {"math": "xyz", "code": "aaa"}.items():
        texts = [(corpus_dir / f"{source}.{part}.jsonl").read_text() for part in ("train", "test")]
        (folder / f"{name}.held-out.jsonl").write_text("".join(texts))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for old, new in (SMALL | {k: str(v) for k, v in names.items()}).items():
            cell.source = cell.source.replace(old, new)
    run(notebook, folder)
    assert (folder / "merged" / "config.json").is_file()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(notebook, folder: Path) -> None:
    """Execute a notebook in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment | {"PYTHONPATH": str(ROOT)})


def pages_of(cell) -> list[str]:
    return [output.data.get("text/html", "") for output in cell.outputs if "data" in output]


@pytest.mark.slow
def test_the_notebook_shows_bars_and_tables(cells):
    searched, compared = cells[1], cells[5]
    pages = pages_of(searched)
    assert any('<progress value="6" max="6">' in page for page in pages)
    assert any("opening base, vectors and tasks" in page for page in pages)
    assert "<caption>Study my-study: 6 trials, best math " in pages[-1]
    assert "searched merge" in pages_of(compared)[-1]


@pytest.mark.slow
def test_no_cell_is_full_of_the_bars_and_logs_of_libraries(cells):
    once = re.compile("Loading weights|IProgress|notebook_tqdm")  # as often as a model is loaded
    for cell in cells:
        streams = "".join(output.get("text", "") for output in cell.outputs)
        lines = [line for line in re.split(r"[\r\n]+", streams) if line.strip()]
        assert [line for line in lines if not once.search(line)] == []


QUICKSTART = ROOT / "docs" / "quickstart.ipynb"
SMALLER = {
    "%pip install -q optimer-hf": "",
    "N_TRAIN, N_HELD_OUT = 2000, 80": "N_TRAIN, N_HELD_OUT = 60, 40",
    '"block_size": 512': '"block_size": 32',
    '"max_tokens": 100_000': '"max_tokens": 512',
    '"n_trials": 20': '"n_trials": 5, "rescore_top": 1',
    "max_new_tokens=40": "max_new_tokens=4",
    ', name="main"': "",
}


@pytest.mark.slow
def test_the_quickstart_goes_from_texts_to_a_merged_model(tmp_path, make_base, corpus_dir):
    base = make_base("llama")
    for name, corpus, field in (("TinyStories", "aaa", "text"), ("gsm8k", "xyz", "question")):
        (tmp_path / name).mkdir()
        text = (corpus_dir / f"{corpus}.train.jsonl").read_text("utf-8")
        (tmp_path / name / "train.jsonl").write_text(text.replace('"text"', f'"{field}"'), "utf-8")
    names = {
        "HuggingFaceTB/SmolLM2-135M": str(base.path),
        "roneneldan/TinyStories": str(tmp_path / "TinyStories"),
        "openai/gsm8k": str(tmp_path / "gsm8k"),
    }
    notebook = nbformat.read(QUICKSTART, as_version=4)
    for old, new in (SMALLER | names).items():
        assert any(old in cell.source for cell in notebook.cells), old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    run(notebook, tmp_path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "<caption>Study study: 5 trials, best stories" in pages_of(cells[3])[-1]
    assert "searched merge" in pages_of(cells[4])[-1]
    assert pages_of(cells[5])[-1].count("data:image/png") == 1
    assert (tmp_path / "merged" / "recipe.lock.json").is_file()
    assert (tmp_path / "report.html").is_file()
