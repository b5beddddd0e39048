"""validate and schema."""

from pathlib import Path

import pytest
import yaml

from tests.support.cli import optimer

ROOT = Path(__file__).parents[2]


def test_validate_names_the_kind_of_each_good_file(folder, tmp_path):
    study = {
        "base_model": "a/b",
        "vectors": {"w": {"source": "a/w"}},
        "objective": {"terms": [{"task": "arc_easy"}]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    lines = optimer(
        "validate", folder / "my-merge.yml", folder / "obj.yaml", tmp_path / "study.yaml"
    ).stdout
    assert [line.split(": ")[1] for line in lines.splitlines()] == [
        "a valid merge config, 2 weights to search",
        "a valid objective",
        "a valid study, 1 weight to search",
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"merge_method": "linear", "base_model": None}, "field 'base_model' is missing. "),
        ({"models": None, "slices": [0]}, "slices: layer_range: found [1, 2], expected"),
        ({}, None),
    ],
)
def test_validate_says_what_search_will_refuse(tmp_path, changes, reason):
    model = {"model": "you/a", "parameters": {"weight": 0.5}}
    config = {
        **{"merge_method": "task_arithmetic", "base_model": "you/b", "dtype": "float32"},
        **{"models": [model], "slices": None, **changes},
    }
    if config["slices"]:
        config["slices"] = [{"sources": [{**model, "layer_range": [1, 2]}]}]
    path = tmp_path / "m.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v}), encoding="utf-8")
    said = optimer("validate", path).stdout.strip()
    if reason is None:
        assert said == f"{path}: a valid merge config, 1 weight to search: a"
    else:
        expected = "a valid merge config for `optimer merge`; `optimer search` refuses it: "
        assert said.startswith(f"{path}: {expected}{reason}")


def test_validate_reports_all_bad_files_and_still_the_good_ones(folder, tmp_path):
    (tmp_path / "a.yaml").write_text("terms: []\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text(
        "base_model: a/b\nvectors: {w: {source: a/w}}\nobjectve: 1\n", encoding="utf-8"
    )
    result = optimer(
        "validate", tmp_path / "a.yaml", folder / "obj.yaml", tmp_path / "b.yaml", ok=False
    )
    assert result.exit_code == 1
    assert "obj.yaml: a valid objective" in result.stdout
    assert "a.yaml:1: terms: " in result.stderr and "Did you mean 'objective'?" in result.stderr


def test_validate_names_all_mistakes_in_a_file_with_their_lines(tmp_path):
    terms = [{"task": "t", "num_fewshot": 1}, {"task": "t"}]
    study = {
        "base_model": "a/b",
        "vectors": {"w": {"source": "a/w", "bounds": [1.0, 0.0]}, "x": {"train": "t.yaml"}},
        "objective": {"terms": terms, "combine": "wurst"},
        "search": {"seed": -1, "n_trails": 3},
    }
    train = {
        "name": "n",
        "base_model": "a/b",
        "corpus": {"path": "x.jsonl"},
        "lora": {"alpha": 8},
        "trainer": {"learning_rate": "high", "gradient_accumulation_steps": 0},
    }
    for name, data in (("study.yaml", study), ("train.yaml", train)):
        text = yaml.safe_dump(data, sort_keys=False)
        (tmp_path / name).write_text(text, encoding="utf-8")
    result = optimer("validate", tmp_path / "study.yaml", tmp_path / "train.yaml", ok=False)
    lines = result.stderr.removeprefix("error: ").replace(f"{tmp_path}/", "").splitlines()
    assert [line.rpartition(".yaml:")[2][:35] for line in lines] == [
        "5: vectors.w.bounds: bounds [1.0, 0",
        "15: objective.combine: found 'wurst",
        "17: search.seed: found -1. Input sh",
        "18: unknown field 'search.n_trails'",
        "6: lora.alpha: unknown field of Lor",
        "8: trainer.learning_rate: found 'hi",
        "9: trainer.gradient_accumulation_st",
    ]


def test_validate_finds_mistakes_in_a_merge_config(tmp_path):
    (tmp_path / "m.yml").write_text(
        "merge_method: linear\nmodels: [{modle: a/b}]\n", encoding="utf-8"
    )
    assert (
        "models.0: unknown field 'modle'"
        in optimer("validate", tmp_path / "m.yml", ok=False).stderr
    )
    (tmp_path / "m.yml").write_text("merge_method: linaer\n", encoding="utf-8")
    assert "Did you mean 'linear'?" in optimer("validate", tmp_path / "m.yml", ok=False).stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("study.yaml")), ids=lambda path: path.parent.name
)
def test_the_recipes_of_this_repository_are_valid(path):
    optimer("validate", *sorted(path.parent.glob("*.yaml")))


def test_validate_names_local_files_that_are_not_there(tmp_path):
    (tmp_path / "here.jsonl").touch()
    (tmp_path / "study.yaml").write_text(
        "base_model: a/b\nvectors: {x: {source: ./x}, y: {source: c/y}}\n"
        "objective:\n  system_instruction: /no_think\n"
        "  terms: [{text: here.jsonl}, {text: gone.jsonl}]\n"
        "test:\n  system_instruction: /no_think\n"
        "  include_path: tasks\n  terms: [{task: t, metric: acc}]\n",
        encoding="utf-8",
    )
    (tmp_path / "train.yaml").write_text(
        "name: x\nbase_model: a/b\ncorpus: {path: corpus.jsonl}\nmax_tokens: 1_024\n",
        encoding="utf-8",
    )
    (tmp_path / "m.yml").write_text(
        "merge_method: linear\nbase_model: ./base\nmodels:\n"
        "- {model: ./tuned, parameters: {weight: 1}}\n"
        "- {model: org/a+org/b, parameters: {weight: 1}}\n",
        encoding="utf-8",
    )
    result = optimer(
        "validate", *(tmp_path / name for name in ("study.yaml", "train.yaml", "m.yml"))
    )
    assert result.stdout.replace(f"{tmp_path}/", "").splitlines() == [
        "study.yaml: a valid study, 2 weights to search: x, y",
        "study.yaml:2: vectors.x.source: x: no such file or directory.",
        "study.yaml:5: objective.terms.1.text: gone.jsonl: no such file or directory.",
        "study.yaml:8: test.include_path: tasks: no such file or directory.",
        "train.yaml: a valid train config",
        "train.yaml:3: corpus.path: corpus.jsonl: no such file or directory.",
        "m.yml: a valid merge config for `optimer merge`; `optimer search` refuses it: "
        "models.1.model: found 'org/a+org/b', an adapter of another model than base_model (base), "
        "expected BASE or BASE+ADAPTER. Merge the adapter into its model and give the result.",
        "m.yml:2: base_model: base: no such file or directory.",
        "m.yml:4: models.0.model: tuned: no such file or directory.",
    ]
    (tmp_path / "obj.yaml").write_text("terms: [{text: gone.jsonl}]\n", encoding="utf-8")
    for arguments in (["study.yaml"], ["m.yml", "--objective", tmp_path / "obj.yaml"]):
        result = optimer(
            "search", tmp_path / arguments[0], *arguments[1:], tmp_path / "s", ok=False
        )
        assert "gone.jsonl: no such file or directory." in result.stderr
        assert f"{arguments[0]}:2: " in result.stderr
        assert not (tmp_path / "s").exists()
    result = optimer("validate", "--strict", tmp_path / "study.yaml", tmp_path / "m.yml", ok=False)
    assert result.stdout == ""
    assert result.stderr.count("no such file or directory.") == 5


def test_strict_names_wrong_fields_and_absent_files_together(tmp_path):
    (tmp_path / "here.jsonl").touch()
    files = {
        "study.yaml": "base_model: ./base\nvectors: {x: {source: ./x}, y: {train: y.yaml}}\n"
        "objective:\n  limit: 0\n  terms: [{text: here.jsonl}, {text: gone.jsonl}]\n"
        "baselines: {models: {m: ./m}}\n",
        "train.yaml": "name: x\nbase_model: ./base\n"
        "mixture: [{path: gone.jsonl, share: 1}]\nmax_tokens: 0\n",
        "other.yaml": "name: x\nbase_model: ./base\ncorpus: {path: c.jsonl}\nlora: {x: 1}\n",
        "obj.yaml": "terms: [{text: gone.jsonl, weight: x}]\ninclude_path: tasks\n",
        "m.yml": "merge_method: linear\nmodels:\n- {model: ./tuned, parameters: {wight: 1}}\n"
        "- {model: ./base+./adapter, parameters: {weight: 1}}\n- {model: 5}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    result = optimer("validate", "--strict", *(tmp_path / name for name in files), ok=False)
    lines = result.stderr.removeprefix("error: ").replace(f"{tmp_path}/", "").splitlines()
    absent = [line for line in lines if line.endswith(": no such file or directory.")]
    assert [line.rpartition(": no ")[0] for line in absent] == [
        "study.yaml:1: base_model: base",
        "study.yaml:2: vectors.x.source: x",
        "study.yaml:2: vectors.y.train: y.yaml",
        "study.yaml:5: objective.terms.1.text: gone.jsonl",
        "study.yaml:6: baselines.models.m: m",
        "train.yaml:2: base_model: base",
        "train.yaml:3: mixture.0.path: gone.jsonl",
        "other.yaml:2: base_model: base",
        "other.yaml:3: corpus.path: c.jsonl",
        "obj.yaml:1: terms.0.text: gone.jsonl",
        "obj.yaml:2: include_path: tasks",
        "m.yml:3: models.0.model: tuned",
        "m.yml:4: models.1.model.0: base",
        "m.yml:4: models.1.model.1: adapter",
    ]
    wrong = [line.split(" ")[1] for line in lines if line not in absent]
    assert wrong == [
        *("objective.limit:", "max_tokens:", "lora.x:", "terms.0.weight:"),
        *("models.2.model:", "models.0.parameters:"),
    ]
    plain = optimer("validate", *(tmp_path / name for name in files), ok=False)
    assert "no such file" not in plain.stderr
