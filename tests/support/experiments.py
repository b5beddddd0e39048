"""A tiny folder of inputs, and a run of it."""

import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from optimer_hf.cli import main

TRAIN = {
    "format_version": 1,
    "block_size": 32,
    "max_tokens": 1024,
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "trainer": {"learning_rate": 2e-2, "per_device_train_batch_size": 4, "bf16": False},
}


@pytest.fixture
def recipe_dir(tmp_path: Path, make_base, corpus_dir: Path) -> Path:
    """A recipe folder: two vectors trained on made-up languages, a third language to keep, a
    sealed test, and a retargeted objective.
    """
    return write_recipe(tmp_path / "recipes" / "tiny", str(make_base("gemma").path), corpus_dir)


def write_recipe(folder: Path, base: str, corpus_dir: Path) -> Path:
    """Write the folder above, and return it."""
    folder.mkdir(parents=True)
    for name in ("aaa", "xyz"):
        config = TRAIN | {
            "name": name,
            "base_model": base,
            "corpus": {"path": str(corpus_dir / f"{name}.train.jsonl")},
        }
        (folder / f"train-{name}.yaml").write_text(yaml.safe_dump(config))

    def terms(split: str) -> list[dict[str, object]]:
        return [
            {"name": name, "text": str(corpus_dir / f"{name}.{split}.jsonl")}
            for name in ("aaa", "xyz", "mix")
        ]

    study = {
        "format_version": 1,
        "base_model": base,
        "vectors": {name: {"train": f"train-{name}.yaml"} for name in ("aaa", "xyz")},
        "objective": {"limit": 4, "terms": terms("search")},
        "test": {"terms": terms("test")},
        "retarget": {"only xyz": {"xyz": 1.0}},
        "search": {"n_trials": 7, "rescore_top": 2},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    (folder / "short.yaml").write_text(
        yaml.safe_dump({"train": {"max_tokens": 256}, "study": {"search": {"n_trials": 5}}})
    )
    return folder


def run_optimer(*arguments: object):
    """Run a command, whether it succeeds or fails."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory, make_base, corpus_dir: Path) -> Path:
    """A finished run of `recipe_dir`, of which each test gets a copy. It is as deep as the copies:
    its paths to the base and the texts are relative.
    """
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder / "recipes" / "tiny", str(make_base("gemma").path), corpus_dir)
    out = folder / "runs" / "tiny"
    result = run_optimer("run", recipe, out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A finished run."""
    out = tmp_path / "runs" / "tiny"
    shutil.copytree(finished_once, out, symlinks=True)
    return out
