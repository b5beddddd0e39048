"""What `optimer init` writes is valid, and shows every field with a value that it may have."""

import re
from pathlib import Path

import pytest
import yaml

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.experiment.folder import check_folder, run_of
from optimer_hf.experiment.templates import init
from optimer_hf.scoring.objective import Objective, Term
from optimer_hf.study.config import Baselines, SearchConfig, StudyConfig, VectorConfig
from optimer_hf.training.config import TrainConfig
from tests.support.cli import optimer

BASE = "google/gemma-3-270m"


def names_in(text: str) -> set[str]:
    return set(re.findall(r"^[ #-]*([a-z_]+):", text, flags=re.M))


def test_a_study_is_valid_and_explains_every_field(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.yaml"
    task = "gsm8k=exact_match,flexible-extract"
    arguments = ("math=you/math", "./code-lora", "--base", BASE, "--task", task, "--full")
    assert str(path) in optimer("init", path, *arguments).stdout
    assert "a valid study" in optimer("validate", path).stdout
    config = StudyConfig.read(path)
    assert {name: v.source for name, v in config.vectors.items()} == {
        "math": "you/math",
        "code-lora": str(tmp_path / "code-lora"),
    }
    assert config.objective.terms[0].metric == "exact_match,flexible-extract"
    assert config.test.terms[0].hash_range == (0.5, 1.0)
    text = path.read_text("utf-8")
    for cls in (StudyConfig, VectorConfig, Objective, Term, SearchConfig, Baselines):
        assert set(cls.model_fields) - {"format_version"} <= names_in(text), cls.__name__
    assert max(map(len, text.splitlines())) <= 110


def test_every_line_that_is_a_field_is_valid_yaml_when_it_is_set(tmp_path):
    init(tmp_path / "study.yaml", ["math=you/math"], base=BASE, full=True)
    lines = re.findall(r"^ *# ([a-z_]+: .*)$", (tmp_path / "study.yaml").read_text("utf-8"), re.M)
    assert len(lines) > 20
    for line in lines:
        assert len(yaml.safe_load(line)) == 1, line


@pytest.mark.parametrize("field", ["dtype: float32", "tokenizer_source: base", "engine: vllm"])
def test_a_field_is_set_by_removing_its_mark(tmp_path, field):
    path = init(tmp_path / "study.yaml", ["math=you/math"], base=BASE, full=True)[0]
    name = field.partition(":")[0]
    text, n = re.subn(rf"^# {name}: .*$", field, path.read_text("utf-8"), flags=re.M)
    path.write_text(text, "utf-8")
    assert n == 1 and "a valid study" in optimer("validate", path).stdout


def test_a_recipe_folder_is_one_that_runs(tmp_path):
    (tmp_path / "math.jsonl").write_text('{"text": "a"}\n', "utf-8")
    folder = tmp_path / "mine"
    sources = [f"math={tmp_path}/math.jsonl", "chat=you/chat"]
    written = init(folder, sources, base=BASE, full=True)
    assert [path.name for path in written] == ["study.yaml", "train-math.yaml"]
    (folder / "held-out.jsonl").touch()  # which the person still has to write
    check_folder(run_of(folder))
    for path in written:
        assert "a valid" in optimer("validate", path).stdout
    names = names_in((folder / "train-math.yaml").read_text("utf-8"))
    for cls in (TrainConfig, CorpusConfig):
        assert set(cls.model_fields) - {"format_version"} <= names, cls.__name__


@pytest.mark.parametrize("option", [(), ("--full",)])
def test_a_short_file_has_what_one_needs_and_says_the_same(tmp_path, monkeypatch, option):
    """Of the fields that are set, and in a length that fits a screen."""
    monkeypatch.chdir(tmp_path)
    Path("math.jsonl").write_text('{"text": "a"}\n', "utf-8")
    arguments = ("math=math.jsonl", "chat=you/chat", "--base", BASE, "--task", "arc_easy")
    assert "optimer validate" in optimer("init", "mine", *arguments, *option).stderr
    texts = {path.name: path.read_text("utf-8") for path in Path("mine").iterdir()}
    long, short = init(Path("all"), arguments[:2], base=BASE, tasks=["arc_easy"], full=True), texts
    for path in long:
        assert yaml.safe_load(path.read_text("utf-8")) == yaml.safe_load(short[path.name])
        n_lines = len(short[path.name].splitlines())
        assert (n_lines <= 60 and "--full" in short[path.name]) == (not option)
        for line in re.findall(r"^ *# ([a-z_]+: .*)$", short[path.name], re.M):
            assert len(yaml.safe_load(line)) == 1, line


def test_several_terms_are_split_alike(tmp_path):
    path, texts = tmp_path / "study.yaml", ("--text", "a.jsonl", "--text", "b.jsonl")
    optimer("init", path, "you/math", "--base", BASE, "--task", "arc_easy", *texts)
    study = StudyConfig.read(path)
    assert [term.hash_range for term in study.objective.terms] == [(0, 0.5)] * 3
    assert [term.hash_range for term in study.test.terms] == [(0.5, 1)] * 3


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("a.jsonl b.jsonl", "a b"),
        ("held_out.math.jsonl held_out.code.jsonl.gz", "held_out.math held_out.code"),
        ("math/held_out.jsonl code/held_out.jsonl", "math-held_out code-held_out"),
        ("x/math/t.txt x/code/t.txt other.txt", "math-t code-t other"),
        ("t.txt t.csv", "t.txt t.csv"),
        ("t.txt ../work/t.txt", "t"),
        ("a/t.txt a-t.txt t.csv b/a/t.txt", "a-t.txt a-t t.csv b-a-t"),
        ("t.txt a/t.txt", "t.txt a-t"),
        ("gsm8k=em,strict gsm8k=em,loose arc_easy", "gsm8k-em-strict gsm8k-em-loose arc_easy"),
        ("arc_easy=acc arc_easy", "arc_easy"),
    ],
)
def test_terms_get_names_of_their_own(tmp_path, monkeypatch, given, names):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    given = given.split()
    texts = [each for each in given if "." in each]
    tasks = [each for each in given if "." not in each]
    path = Path("study.yaml")
    init(path, ["math=you/math"], base=BASE, tasks=tasks, texts=texts)
    study = StudyConfig.read(path)
    assert [term.label for term in study.objective.terms] == names.split()
    assert [term.label for term in study.test.terms] == names.split()
    assert ("name:" in path.read_text("utf-8")) == any(
        set("-.") & {*name} for name in names.split()
    )


@pytest.mark.parametrize("out", ["rec", "deep/er/rec", "link/rec", "new/study.yaml", "study.yaml"])
@pytest.mark.parametrize("base", ["./base", "base", BASE, "~/base"])
def test_paths_are_those_of_the_working_directory(tmp_path, monkeypatch, out, base):
    work = tmp_path / "work"
    for folder in ("base", "code", "you/chat", "data"):
        (work / folder).mkdir(parents=True)
    (work / "link").symlink_to(tmp_path / "elsewhere" / "far")
    (tmp_path / "elsewhere" / "far").mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = ["code=./code", "chat=you/chat", "hub=you/other@main", "far=/models/far"]
    corpora = (
        {"math": "data/math.jsonl", "law": str(work / "law.csv")} if out[-5:] != ".yaml" else {}
    )
    sources += [f"{name}={text}" for name, text in corpora.items()]
    written = init(Path(out), sources, base=base, texts=["data/held-out.jsonl", "more.jsonl"])
    home = str(tmp_path / "base")
    expected_base = {BASE: BASE, "~/base": home}.get(base, str(work / "base"))
    study = StudyConfig.read(written[0])
    assert study.base_model == expected_base
    assert {name: v.source for name, v in study.vectors.items() if v.source is not None} == {
        "code": str(work / "code"),
        "chat": str(work / "you" / "chat"),
        "hub": "you/other@main",
        "far": "/models/far",
    }
    texts = [work / "data" / "held-out.jsonl", work / "more.jsonl"]
    assert [term.text for term in study.objective.terms] == texts
    assert [term.text for term in study.test.terms] == texts
    trainings = [TrainConfig.read(path) for path in written[1:]]
    assert [t.corpus.path for t in trainings] == [work / text for text in corpora.values()]
    assert {t.base_model for t in trainings} <= {expected_base}


@pytest.mark.parametrize("mark", ["config.json", "adapter_config.json", "vector.json"])
def test_a_folder_of_a_model_or_a_vector_is_no_text(tmp_path, mark):
    folder = tmp_path / "math-int8"  # with vector.json as `extract --dtype int8` leaves it
    folder.mkdir()
    (folder / "README.md").write_text("a card", "utf-8")
    for name in (mark, "vector.safetensors"):
        (folder / name).write_text("{}", "utf-8")
    (study,) = init(tmp_path / "study.yaml", [str(folder)], base=BASE)
    assert StudyConfig.read(study).vectors["math-int8"].source == str(folder)


@pytest.mark.parametrize(
    "names", [("math", "Math"), ("a b", "a-b"), ("\u6570\u5b66", "\u7269\u7406"), ("x", "x.")]
)
def test_vectors_that_would_share_a_train_file_are_refused(tmp_path, names):
    sources = [f"{name}={name}.jsonl" for name in names]
    message = optimer("init", tmp_path / "new", *sources, "--base", BASE, ok=False).stderr
    assert f"{names[0]}, {names[1]}: found names that both stand for the file train-" in message
    assert not (tmp_path / "new").exists()


def test_a_version_in_the_name_of_a_model_is_no_ending(tmp_path):
    models = ["you/Qwen2.5-1.5B-math@main", "you/Qwen2.5-1.5B-code", "./lora.v2"]
    (study,) = init(tmp_path / "study.yaml", models, base=BASE)
    names = ["Qwen2.5-1.5B-math", "Qwen2.5-1.5B-code", "lora.v2"]
    assert [*StudyConfig.read(study).vectors] == names
    (tmp_path / "more.train.jsonl.gz").touch()
    assert init(tmp_path / "out", [str(tmp_path / "more.train.jsonl.gz")], base=BASE)[1].stem == (
        "train-more"
    )


@pytest.mark.parametrize(
    ("out", "sources", "message"),
    [
        ("s.yaml", ["math.jsonl"], "Give a folder instead of a .yaml"),
        ("s.yaml", ["a/math", "b/math"], "Give it as NAME=b/math"),
        (".", ["a/math"], "is there already"),
        ("old.yaml", ["a/math"], "is there already"),
    ],
)
def test_nothing_is_written_over_and_names_are_clear(tmp_path, monkeypatch, out, sources, message):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text("kept", "utf-8")
    assert message in optimer("init", out, *sources, "--base", BASE, ok=False).stderr
    assert Path("old.yaml").read_text("utf-8") == "kept"
