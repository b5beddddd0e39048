"""What ships is valid: merge configs and recipe folders."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from optimer_hf.cli import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "merge_configs").glob("*.yml"))
RECIPES = sorted(path.parent for path in (ROOT / "recipes").glob("*/study.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_merge_config_is_valid_and_says_how_to_run_it(path: Path):
    result = CliRunner().invoke(main, ["validate", str(path)])
    assert result.exit_code == 0, result.output
    assert f"optimer merge merge_configs/{path.name} OUT" in path.read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_merge_config_runs_on_real_models(path: Path, tmp_path: Path, make_base, make_tuned):
    base = make_base("llama")
    text = path.read_text().replace("google/gemma-3-270m", str(base.path))
    for seed, name in enumerate(("math", "code")):
        text = re.sub(rf"your-name/\S*-{name}", str(make_tuned(base, "llama", seed)), text)
    config = tmp_path / path.name
    config.write_text(text)
    result = CliRunner().invoke(main, ["merge", str(config), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "config.json").exists()
    assert list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("folder", RECIPES, ids=lambda path: path.name)
def test_a_recipe_folder_is_valid_in_every_budget(folder: Path, tmp_path: Path):
    from optimer_hf.experiment.folder import Run, load_inputs
    from optimer_hf.experiment.profile import is_profile
    from optimer_hf.files.reading import read_yaml

    files = [path for path in sorted(folder.glob("*.yaml")) if is_profile(set(read_yaml(path)))]
    assert folder / "short.yaml" in files
    for profile in (None, *(path.stem for path in files)):
        inputs = load_inputs(Run(folder, tmp_path / "out", profile))
        config = inputs.study
        assert set(inputs.trainings) <= set(config.vectors)
        for objective in (config.objective, config.test):
            assert all(term.text is None or term.text.is_file() for term in objective.terms)


@pytest.mark.parametrize("folder", RECIPES, ids=lambda path: path.name)
def test_no_document_is_in_two_splits(folder: Path):
    import json
    import lzma

    for search in (folder / "data").glob("*.search.jsonl.xz"):
        seen: dict[str, set[str]] = {}
        for split in ("train", "search", "test"):
            path = search.with_name(search.name.replace("search", split))
            if path.exists():
                with lzma.open(path, "rt", encoding="utf-8") as file:
                    rows = [json.loads(line) for line in file]
                seen[split] = {row.get("doc") or row["query"] for row in rows}
        splits = list(seen.values())
        for index, docs in enumerate(splits):
            for other in splits[index + 1 :]:
                assert not docs & other, search.name


def test_the_data_of_a_recipe_stay_small():
    for folder in RECIPES:
        files = [path for path in (folder / "data").rglob("*") if "-more." not in path.name]
        assert sum(path.stat().st_size for path in files) < 3_000_000
