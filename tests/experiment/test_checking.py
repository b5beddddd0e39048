"""checking.py: a file of another kind is named as what it is, and short forms are understood."""

from pathlib import Path

import pytest
import yaml

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.experiment.checking import check_fields, check_file
from optimer_hf.searching.study_file import read_study
from optimer_hf.training.config import TrainConfig
from optimer_hf.vectors.opening import open_vector
from tests.support.cli import optimer

FILES = {
    "study": "base_model: a/b\nvectors: {w: a/w}\nobjective: {terms: [{task: t}]}\nsearch: {}\n",
    "train": "name: n\nbase_model: a/b\ncorpus: math.jsonl\nlora: {r: 4}\n",
    "objective": "terms: [{text: a.jsonl}]\n",
    "merge config": "merge_method: linear\nmodels: [{model: a/w, parameters: {weight: 1}}]\n",
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("asked", ["study", "train", "objective", "recipe", "merge config"])
def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path: Path, kind, asked):
    path = tmp_path / "file.yaml"
    path.write_text(FILES[kind], "utf-8")
    if kind == asked:
        check_fields(path, asked)
        return
    with pytest.raises(ConfigError, match=f"found a file of the kind {kind}"):
        check_fields(path, asked)


def test_a_plain_text_is_the_path_of_a_corpus(tmp_path: Path):
    path = tmp_path / "train.yaml"
    path.write_text(FILES["train"], "utf-8")
    assert TrainConfig.read(path).corpus.path == tmp_path / "math.jsonl"


def test_a_part_that_is_no_mapping_is_told_without_a_name_of_ours(tmp_path: Path):
    path = tmp_path / "study.yaml"
    path.write_text(FILES["study"].replace("{}", "fast"), "utf-8")
    message = "study.yaml:4: search: found 'fast'. Expected a mapping of fields to values."
    assert message in optimer("validate", path, ok=False).stderr


def test_a_mergekit_yaml_gets_a_sealed_test(make_base, make_tuned, corpus_dir, tmp_path):
    base = make_base("llama")
    merge = {
        "merge_method": "task_arithmetic",
        "base_model": str(base.path),
        "models": [{"model": str(make_tuned(base, "llama", 1)), "parameters": {"weight": 1}}],
    }
    (tmp_path / "m.yml").write_text(yaml.safe_dump(merge), "utf-8")
    objective, sealed = tmp_path / "obj.yaml", tmp_path / "sealed.yaml"
    objective.write_text(f"terms: [{{text: {corpus_dir / 'aaa.search.jsonl'}}}]", "utf-8")
    sealed.write_text(f"terms: [{{text: {corpus_dir / 'mix.test.jsonl'}}}]", "utf-8")
    config = read_study(tmp_path / "m.yml", objective=objective, test=sealed)
    assert [term.label for term in config.test.terms] == ["mix"]
    assert not {"split_by"} & (config.objective.model_fields_set | config.test.model_fields_set)
    (tmp_path / "study.yaml").write_text(FILES["study"], "utf-8")
    with pytest.raises(ConfigError, match="Leave --objective and --test out"):
        read_study(tmp_path / "study.yaml", test=sealed)


def test_an_empty_folder_is_refused_with_the_name_of_its_vector(make_base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"vector 'math': .*empty: is an empty directory"):
        open_vector("math", str(tmp_path / "empty"), make_base("llama"))


def test_a_tab_is_named(tmp_path: Path):
    path = tmp_path / "study.yaml"
    path.write_text("base_model: a/b\nvectors:\n\tmath: a/m\n", "utf-8")
    text = optimer("validate", path, ok=False).stderr
    assert "study.yaml:3: not valid YAML. found a tab, expected spaces" in text


@pytest.mark.parametrize("in_slices", [False, True])
def test_validate_says_whether_a_search_takes_so_many_filters(tmp_path: Path, in_slices):
    """In slices, a search may leave filters out, which shows in the names of the tensors."""
    n_filters = 2 if in_slices else 101
    weight = [{"filter": f"part{index}.", "value": 0.5} for index in range(n_filters)]
    parameters = {"weight": [*weight, {"value": 1}]}
    config = {"merge_method": "linear", "base_model": "a/base", "dtype": "float32"}
    if in_slices:
        slices = []
        for at in range(34):
            models = ["a/v", "a/w"] if at else ["a/v"]
            own = {"layer_range": [at, at + 1], "parameters": parameters}
            slices.append({"sources": [{"model": name, **own} for name in models]})
        config["slices"] = slices
    else:
        config["models"] = [{"model": "a/v", "parameters": parameters}]
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    what, _ = check_file(path)
    if in_slices:
        assert what == "merge config"
    else:
        assert "`optimer search` refuses it: vectors.v.by: found {" in what
        assert "at most 100" in what
