"""tokenizer.py: whose tokenizer scores and ships with a merge, from the study to the model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import HfApi
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from optimer_hf.cli import main
from optimer_hf.comparison.sealed import with_pool
from optimer_hf.errors import ConfigError, HubError, ModelError, StudyError
from optimer_hf.hub.publication import choose_files
from optimer_hf.hub.untrusted import check_pulled
from optimer_hf.merging.engines import merge
from optimer_hf.merging.mergekit_pool import linear_merge_of
from optimer_hf.merging.mergekit_search import unsearched_settings, with_weights
from optimer_hf.merging.tokenizer import completed_ends, open_tokenizer
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.cache import list_cache
from optimer_hf.models.layout import ResolvedModel, weight_digests
from optimer_hf.recipes.build import build, verify
from optimer_hf.recipes.record import Lock, Recipe, tokenizer_note
from optimer_hf.recipes.vanilla import write_vanilla
from optimer_hf.recipes.write import write_recipe
from optimer_hf.scoring.objective import Asked
from optimer_hf.searching.engine import _vllm_options
from optimer_hf.searching.loop import search
from optimer_hf.searching.study_file import study_of_merge_config
from optimer_hf.searching.trial import ResidentPool
from optimer_hf.study.config import StudyConfig, VectorConfig
from optimer_hf.study.directory import load_study
from optimer_hf.study.engine import EngineConfig
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
END_OF_TURN = [1, 7]
TASK = """task: chatty
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def models(make_base, make_tuned, make_adapter, tmp_path) -> dict[str, Path]:
    """A base, an adapter, a fine-tune, and an instruct model with a template and another EOS."""
    base = make_base("llama")
    sources = {
        "base": base.path,
        "code": make_adapter(base, 0),
        "math": make_tuned(base, "llama", 1),
    }
    shutil.copytree(make_tuned(base, "llama", 2), tmp_path / "it")
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "it")
    GenerationConfig(eos_token_id=END_OF_TURN).save_pretrained(tmp_path / "it")
    return sources | {"it": tmp_path / "it"}


@pytest.fixture
def base(models) -> ResolvedModel:
    return ResolvedModel(models["base"], "base")


def study_of(models: dict[str, Path], tmp_path: Path, **changes) -> StudyConfig:
    """A study whose objective asks through a chat template."""
    rows = [json.dumps({"question": "ab" * n}) for n in range(1, 5)]
    (tmp_path / "tasks").mkdir(exist_ok=True)
    (tmp_path / "tasks" / "items.jsonl").write_text("\n".join(rows), encoding="utf-8")
    task = TASK.replace("items.jsonl", str(tmp_path / "tasks" / "items.jsonl"))
    (tmp_path / "tasks" / "chatty.yaml").write_text(task, encoding="utf-8")
    data = {
        "base_model": str(models["base"]),
        "vectors": {
            "math": {"source": str(models["math"])},
            "it": {"source": str(models["it"]), "fixed": 1.0},
        },
        "objective": {
            "include_path": str(tmp_path / "tasks"),
            "terms": [{"task": "chatty", "metric": "acc"}],
        },
        "search": {"n_trials": 3, "rescore_top": 0},
    }
    return StudyConfig.model_validate(data | changes)


def assert_is_instruct(directory: Path) -> None:
    assert AutoTokenizer.from_pretrained(directory).chat_template == TEMPLATE
    generation = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == END_OF_TURN


# -- the field -------------------------------------------------------------------------------------


def test_the_base_as_the_source_is_the_study_without_the_field(models, tmp_path):
    without = study_of(models, tmp_path)
    assert "tokenizer_source" not in without.identity
    assert study_of(models, tmp_path, tokenizer_source="base").digest() == without.digest()
    named = study_of(models, tmp_path, tokenizer_source="it")
    assert named.identity["tokenizer_source"] == "it" and named.digest() != without.digest()
    assert named.tokenizer_reference == str(models["it"])


def test_a_name_that_is_neither_a_vector_nor_a_model_is_reported_with_its_line(models, tmp_path):
    data = study_of(models, tmp_path).model_dump(mode="json", exclude_none=True)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(data | {"tokenizer_source": "itt"}), encoding="utf-8")
    said = (
        r"study\.yaml:\d+: tokenizer_source: found 'itt'\. expected 'base', a vector \(it, math\)"
    )
    with pytest.raises(ConfigError, match=said):
        StudyConfig.read(file)
    file.write_text(yaml.safe_dump(data | {"tokenizer_source": "./it"}), encoding="utf-8")
    assert StudyConfig.read(file).tokenizer_reference == str(models["it"])


def test_a_model_of_other_vectors_is_scored_with_the_tokenizer_of_the_study(models, tmp_path):
    config = study_of(models, tmp_path, tokenizer_source="it")
    other = with_pool(config, {"ties (1)": str(models["math"])}, {})
    assert StudyConfig.model_validate(other.model_dump()).tokenizer_reference == str(models["it"])
    assert set(other.vectors.values()) == {VectorConfig(source=str(models["math"]))}


# -- what is refused -------------------------------------------------------------------------------


def test_a_source_without_a_tokenizer_of_its_own_is_refused(models, base, tmp_path):
    with pytest.raises(ConfigError, match=r"has no tokenizer\. Give a model with a tokenizer"):
        open_tokenizer(base, str(models["code"]))
    extract(open_vector("it", str(models["it"]), base), base, tmp_path / "delta")
    with pytest.raises(
        ConfigError, match=r"is a delta with .* the model that it was extracted from"
    ):
        open_tokenizer(base, str(tmp_path / "delta"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(models["it"] / name, tmp_path / "delta")
        shutil.copy(models["it"] / name, models["code"])  # a copy of the test's own
    assert open_tokenizer(base, str(tmp_path / "delta")) is not None
    assert open_tokenizer(base, str(models["code"])) is not None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (models["code"] / name).unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"<eos>": 0, "<pad>": 1}, r"the token '<pad>' the id 1, but the base gives it 0"),
        ({"<end>": 1}, r"the token '<eos>' no id, but the base gives it 1"),
        ({"<end>": 259}, r"the token '<end>' the id 259, but the embedding of the base has 259"),
    ],
    ids=["swapped", "renamed", "beyond the embedding"],
)
def test_a_tokenizer_with_other_tokens_is_refused_naming_the_first(models, base, change, said):
    file = models["it"] / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    if 1 in change.values() and "<end>" in change:
        del vocabulary["<eos>"]
    vocabulary |= change
    data["added_tokens"] = []
    file.write_text(json.dumps(data), encoding="utf-8")
    settings = models["it"] / "tokenizer_config.json"
    kept = json.loads(settings.read_text(encoding="utf-8"))
    plain = {k: v for k, v in kept.items() if not k.endswith("_token") and "added" not in k}
    settings.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        open_tokenizer(base, str(models["it"]))


def test_a_token_of_the_base_beyond_its_embedding_is_no_mistake(models, tmp_path):
    """Gemma 3's text models have such a token, for images."""
    shutil.copytree(models["base"], tmp_path / "base")
    for directory in (tmp_path / "base", models["it"]):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_tokens(["<image>"])
        tokenizer.save_pretrained(directory)
    base = ResolvedModel(tmp_path / "base", "base")
    assert open_tokenizer(base, str(models["it"])).path == models["it"]


def test_everything_but_the_weights_of_a_model_is_fetched_from_the_hub(hub, models, base):
    api = HfApi(token="hf_alice_write")
    api.create_repo("alice/chatty-model", exist_ok=True)
    api.upload_folder(repo_id="alice/chatty-model", folder_path=models["it"])
    tokenizer = open_tokenizer(base, "alice/chatty-model")
    assert_is_instruct(tokenizer.path)
    assert not list(tokenizer.path.glob("*.safetensors")) and tokenizer.commit is not None


def test_a_requested_chat_template_must_exist(models, tmp_path):
    asked = study_of(models, tmp_path).objective.model_dump() | {"apply_chat_template": True}
    with pytest.raises(ConfigError, match=r"apply_chat_template: .*tokenizer_source"):
        ResidentPool(study_of(models, tmp_path, objective=asked))


# -- scoring and building --------------------------------------------------------------------------


@pytest.fixture
def study(models, tmp_path):
    """A finished search that asked through the template of the fixed vector."""
    asked = study_of(models, tmp_path).objective.model_dump() | {"apply_chat_template": True}
    config = study_of(models, tmp_path, objective=asked, tokenizer_source="it")
    return search(config, tmp_path / "study")


def test_trials_are_scored_with_the_template_and_the_end_of_turn(models, tmp_path):
    chatty = study_of(models, tmp_path).objective.model_dump() | {"apply_chat_template": True}
    config = study_of(models, tmp_path, objective=chatty, tokenizer_source="it")
    pool, plain = ResidentPool(config), ResidentPool(study_of(models, tmp_path))
    weights, asked = {"math": 0.5, "it": 1.0}, [Asked(config.objective.terms[0], 4)]
    tokens = [each.score(weights, asked).n_tokens for each in (pool, plain)]
    assert tokens[0] >= tokens[1] + 4 * len("<user>")
    assert pool._engine.lm.model.generation_config.eos_token_id == END_OF_TURN
    assert set(pool.inputs) - set(plain.inputs) == {"tokenizer_source"}


def test_a_study_does_not_go_on_with_another_template(study, models):
    study = load_study(study.directory)
    (models["it"] / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    longer = study.config.search.model_copy(update={"n_trials": 4})
    with pytest.raises(StudyError, match=r"tokenizer_source: not the weights or items"):
        search(study.config.model_copy(update={"search": longer}), study.directory)
    with pytest.raises(StudyError, match=r"tokenizer_source: not the weights or items"):
        write_recipe(study, study.directory / "recipe.yaml", name="chat")


@pytest.mark.parametrize("named", ["it", "by its place"])
def test_a_recipe_builds_the_model_with_the_tokenizer_and_locks_it(
    models, tmp_path, study, named, make_base
):
    if named != "it":
        config = study.config.model_copy(update={"tokenizer_source": str(models["it"])})
        study = search(config, tmp_path / "another")
    file = tmp_path / "recipe.yaml"
    recipe = write_recipe(study, file, name="chat")
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert written["tokenizer_source"] == ("it" if named == "it" else "./it")
    assert recipe.tokenizer_reference == str(models["it"])
    build(file, tmp_path / "out")
    assert_is_instruct(tmp_path / "out")
    assert set(Lock.read(file.with_suffix(".lock.json")).tokenizer) == {
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    beside = Recipe.read(tmp_path / "out" / "recipe.yaml")
    assert beside.tokenizer_reference == str(models["it"])
    (models["it"] / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"chat: tokenizer_source: .* is not the locked one"):
        build(file, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_recipe_without_the_field_builds_what_it_built(models, tmp_path):
    study = search(study_of(models, tmp_path), tmp_path / "study")
    write_recipe(study, tmp_path / "recipe.yaml", name="plain")
    build(tmp_path / "recipe.yaml", tmp_path / "out")
    for directory in (tmp_path, tmp_path / "out"):
        assert "tokenizer_source" not in (directory / "recipe.yaml").read_text(encoding="utf-8")
    assert "tokenizer_source" not in (tmp_path / "optimer.yml").read_text(encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (models["base"] / name).read_bytes()


LENDERS = {  # what lends the tokenizer, and which tokens end an answer of the merge
    "a model that says it in config.json": ({"config.json": {"eos_token_id": [1, 7]}}, [1, 7]),
    "a model whose tokenizer says it": ({"tokenizer_config.json": {"eos_token": "d"}}, [1, 70]),
    "an adapter": ({"config.json": None, "tokenizer_config.json": {"eos_token": "d"}}, [1, 70]),
    "a model that ends as the base does": ({}, 1),
}


@pytest.mark.parametrize("of_base", [True, False], ids=["base says it", "base does not"])
@pytest.mark.parametrize("kind", LENDERS)
def test_a_merge_stops_where_the_model_that_lends_its_tokenizer_stops(
    models, tmp_path, kind, of_base
):
    changes, ends = LENDERS[kind]
    (models["it"] / "generation_config.json").unlink()
    for name, fields in changes.items():
        file = models["it"] / name
        if fields is None:
            file.unlink()
        else:
            file.write_text(json.dumps(json.loads(file.read_text()) | fields), encoding="utf-8")
    left_out = () if of_base else ("generation_config.json",)
    copy = tmp_path / "base"
    shutil.copytree(models["base"], copy, ignore=shutil.ignore_patterns(*left_out))
    models = models | {"base": copy}
    base, lender = (ResolvedModel(models[name], name) for name in ("base", "it"))
    vector = open_vector("math", str(models["math"]), base)
    write_merged(base, [vector], {"math": 0.5}, tmp_path / "out", tokenizer=lender)
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert built.generation_config.eos_token_id == ends
    config = study_of(models, tmp_path, vectors={"math": str(models["math"])})
    held = ResidentPool(config.model_copy(update={"tokenizer_source": str(models["it"])}))
    assert held._engine.lm.model.generation_config.eos_token_id == ends
    options = _vllm_options(EngineConfig(name="vllm"), base, lender, "float32")
    read_there = "generation_config" in options  # else vLLM reads that of the base, and its EOS
    assert read_there == (ends != 1)
    cached = [(each.kind, str(each.path)) for each in list_cache() if each.kind == "generation"]
    if read_there:
        assert ("generation", options["generation_config"]) in cached
        config = GenerationConfig.from_pretrained(options["generation_config"])
        assert config.eos_token_id == ends
    assert completed_ends(base.path, lender.path) == (ends if read_there else None)
    note = tokenizer_note("it", completed_ends(base.path, lender.path))
    to_do = f"no generation_config.json: set eos_token_id in OUT/generation_config.json to {ends}."
    assert (to_do if read_there else "the EOS of its config.json") in note


@pytest.mark.parametrize("engine", ["native", "mergekit"])
def test_a_merge_config_stops_there_too(models, tmp_path, engine):
    (models["it"] / "generation_config.json").unlink()
    file = models["it"] / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "d"}), encoding="utf-8")
    merge_config(models, tmp_path / "merge.yml", tokenizer_source=str(models["it"]))
    assert merge(tmp_path / "merge.yml", tmp_path / "out", engine=engine) == engine
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert built.generation_config.eos_token_id == [1, 70]


@pytest.mark.parametrize("pool", ["checkpoints", "deltas"])
def test_the_exported_configs_give_the_same_model_with_the_same_tokenizer(
    models, study, tmp_path, pool, monkeypatch
):
    if pool == "deltas":
        monkeypatch.setattr("optimer_hf.recipes.vanilla._is_quantised", lambda vector: True)
    write_recipe(study, tmp_path / "recipe.yaml", name="chat")
    build(tmp_path / "recipe.yaml", tmp_path / "built")
    assert merge(tmp_path / "optimer.yml", tmp_path / "ours") == "native"
    assert_is_instruct(tmp_path / "ours")
    assert weight_digests(tmp_path / "ours") == weight_digests(tmp_path / "built")
    written = write_vanilla(study, tmp_path / "vanilla.yml")
    assert written == (pool == "checkpoints") == (tmp_path / "vanilla.yml").exists()
    write_vanilla(study, tmp_path / "vanilla.yml", deltas=tmp_path / "deltas")
    assert (tmp_path / "deltas").exists() != written
    text = (tmp_path / "vanilla.yml").read_text(encoding="utf-8")
    assert (
        "# Copy tokenizer, chat template and (if there is one) generation_config.json of " in text
    )
    config = yaml.safe_load(text)
    assert not config.keys() & {"tokenizer", "tokenizer_source"}  # mergekit would cut the embedding
    theirs = tmp_path / "theirs"
    run_merge(MergeConfiguration.model_validate(config), str(theirs), MergeOptions(quiet=True))
    built = load_file(tmp_path / "built" / "model.safetensors")
    for name, tensor in load_file(theirs / "model.safetensors").items():
        torch.testing.assert_close(tensor, built[name], rtol=2**-7, atol=1e-3)


def test_a_tokenizer_that_was_changed_after_the_build_is_not_verified(study, tmp_path):
    write_recipe(study, tmp_path / "recipe.yaml", name="chat")
    build(tmp_path / "recipe.yaml", tmp_path / "built")
    verify(tmp_path / "recipe.yaml", tmp_path / "built")
    GenerationConfig(eos_token_id=3).save_pretrained(tmp_path / "built")
    with pytest.raises(ModelError, match=r"generation_config\.json: not the tokenizer that recipe"):
        verify(tmp_path / "recipe.yaml", tmp_path / "built")


def test_a_base_without_a_tokenizer_has_none_to_compare(models, tmp_path):
    shutil.copytree(models["base"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match="base_model: bare: has no tokenizer to compare"):
        open_tokenizer(ResolvedModel(tmp_path / "bare", "bare"), str(models["it"]))


# -- mergekit's YAML -------------------------------------------------------------------------------


def merge_config(models, path: Path, **changes) -> dict:
    entries = [
        {"model": str(models[name]), "parameters": {"weight": 0.5}} for name in ("math", "it")
    ]
    config = {
        "merge_method": "optimer",
        "base_model": str(models["base"]),
        "models": entries,
        "dtype": "float32",
    }
    path.write_text(yaml.safe_dump(config | changes), encoding="utf-8")
    return config | changes


@pytest.mark.parametrize(
    "field", [{"tokenizer_source": "./it"}, {"tokenizer": {"source": "./it"}}], ids=str
)
def test_a_search_takes_over_the_tokenizer_of_a_merge_config(models, tmp_path, field):
    path = tmp_path / "merge.yml"
    config = merge_config(models, path, **field)
    (tmp_path / "x.jsonl").write_text('{"text": "aaa"}\n', encoding="utf-8")
    objective = tmp_path / "objective.yaml"
    objective.write_text("terms: [{text: x.jsonl}]", encoding="utf-8")
    assert study_of_merge_config(path, objective).tokenizer_source == "it"
    assert unsearched_settings(config, Path("c.yml")) == []
    weights = {models["math"].name: 0.1, "it": 1.0}
    changed = with_weights(config, path, weights, dict.fromkeys(weights, "checkpoint"))
    assert yaml.safe_dump(changed).count("/it\n") == 2  # the model, and the tokenizer
    assert merge(path, tmp_path / "out") == "native"
    assert_is_instruct(tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"tokenizer": {"pad_to_multiple_of": 8}}, "tokenizer: {'pad_to_multiple_of': 8}"),
        ({"tokenizer": {"source": "base", "tokens": {"a": {}}}}, "tokenizer: {'source': 'base', "),
        ({"tokenizer_source": "org/a+org/b"}, "tokenizer_source: 'org/a+org/b'"),
        ({"chat_template": "chatml"}, "chat_template: 'chatml'"),
    ],
)
def test_a_search_names_what_it_does_not_keep_of_a_tokenizer(models, tmp_path, field, said):
    config = merge_config(models, tmp_path / "merge.yml", **field)
    (setting,) = unsearched_settings(config, Path("c.yml"))
    assert setting.startswith(said)
    assert linear_merge_of(config, tmp_path / "merge.yml") is None


@pytest.mark.parametrize(
    "field", [{"tokenizer_source": "union"}, {"tokenizer": {"source": "union"}}], ids=str
)
def test_a_search_takes_over_the_union_of_a_merge_config(models, tmp_path, field):
    path = tmp_path / "merge.yml"
    config = merge_config(models, path, **field)
    (tmp_path / "x.jsonl").write_text('{"text": "aaa"}\n', encoding="utf-8")
    (tmp_path / "objective.yaml").write_text("terms: [{text: x.jsonl}]", encoding="utf-8")
    assert study_of_merge_config(path, tmp_path / "objective.yaml").vocabulary == "union"
    assert unsearched_settings(config, Path("c.yml")) == []
    assert linear_merge_of(config, path).is_union


def test_a_tokenizer_with_other_tokens_is_left_to_mergekit(models, tmp_path):
    file = models["it"] / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    tokens = data["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    file.write_text(json.dumps(data), encoding="utf-8")
    merge_config(models, tmp_path / "merge.yml", tokenizer_source="./it")
    with pytest.raises(ConfigError, match=r"gives the token 'a' the id \d+, but the base gives it"):
        merge(tmp_path / "merge.yml", tmp_path / "ours", engine="native")
    assert merge(tmp_path / "merge.yml", tmp_path / "theirs") == "mergekit"
    assert_is_instruct(tmp_path / "theirs")
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs").get_vocab()["a"] == tokens["a"]


# -- runs and the Hub ------------------------------------------------------------------------------


def test_a_run_refuses_before_it_trains_what_could_not_be_scored(models, tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    training = {"name": "ja", "base_model": str(models["base"]), "corpus": {"path": "x.jsonl"}}
    terms = {"terms": [{"text": "x.jsonl", "hash_range": [0, 0.5]}]}
    sealed = {"terms": [{"text": "x.jsonl", "hash_range": [0.5, 1]}]}
    study = {
        "base_model": str(models["base"]),
        "vectors": {"ja": {"train": "train-ja.yaml"}},
        "tokenizer_source": "ja",
        "objective": terms,
        "test": sealed,
    }
    rows = [json.dumps({"text": f"text {n}"}) for n in range(20)]
    (folder / "x.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "train-ja.yaml").write_text(yaml.safe_dump(training), encoding="utf-8")
    (folder / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    result = CliRunner().invoke(main, ["run", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "tokenizer_source: the vector 'ja' is trained here" in result.output
    study["tokenizer_source"] = "base"
    for asked in ("objective", "test"):
        study[asked] = study[asked] | {"apply_chat_template": True}
    (folder / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    result = CliRunner().invoke(main, ["run", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "apply_chat_template: the tokenizer of" in result.output
    assert not (tmp_path / "out" / "vectors").exists()


def test_a_published_recipe_names_no_tokenizer_of_this_machine(models, tmp_path):
    pinned = f"org/model@{'0' * 40}"
    recipe = {
        "name": "chat",
        "base_model": pinned,
        "dtype": "bfloat16",
        "vectors": {"it": {"source": f"org/it@{'1' * 40}", "weight": 1.0}},
        "objective": {},
        "scores": {},
        "study": {},
    }
    lock = Lock(base={}, vectors={"it": {}}, kinds={"it": "checkpoint"}, weights={}, dtype="")
    lock.write(tmp_path / "recipe.lock.json")
    file = tmp_path / "recipe.yaml"
    chosen = f"org/tokenizer@{'2' * 40}"
    for named, reference in {"it": f"org/it@{'1' * 40}", chosen: chosen}.items():
        file.write_text(yaml.safe_dump(recipe | {"tokenizer_source": named}), encoding="utf-8")
        publication = choose_files(tmp_path)
        assert yaml.safe_load(publication.text("optimer.yml"))["tokenizer_source"] == reference
        assert f"generation_config.json of {reference} into" in publication.text(
            "mergekit_config.yml"
        )
        assert publication.lender == (None if named == "it" else chosen)
        assert reference in publication.inputs and len(publication.inputs) == len(
            set(publication.inputs)
        )
        assert check_pulled("recipe", tmp_path).tokenizer_source == named
    for named, error in {str(models["it"]): HubError, "org/it": HubError}.items():
        file.write_text(yaml.safe_dump(recipe | {"tokenizer_source": named}), encoding="utf-8")
        with pytest.raises(error, match=r"recipe\.yaml: tokenizer_source: "):
            choose_files(tmp_path)
        with pytest.raises(error, match=r"tokenizer_source: found .* may not name local files"):
            check_pulled("recipe", tmp_path)
