"""From models of one's own to a page that others trust: search, push; pull, verify, re-target."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants
from transformers import AutoTokenizer

from optimer_hf.hub.uploads import find_earlier_uploads
from optimer_hf.models.layout import weight_digests
from optimer_hf.models.resolve import resolve_model
from optimer_hf.recipes.record import Lock, Recipe
from optimer_hf.study.directory import load_study
from optimer_hf.vectors.record import read_record
from tests.support.added_tokens import END, START, save_tuned, with_tokens
from tests.support.journeys import Person

PUSH = "optimer push my-study you/my-merge --vectors --license gemma"
STUDY = {
    "base_model": "./models/base",
    "vectors": {
        "math": "./models/math",
        "code": {"source": "./my-code-lora", "bounds": [0.0, 1.2]},
    },
    "objective": {
        "terms": [
            {"text": "held_out.jsonl", "name": "zh"},
            {"text": "held_out.en.jsonl", "name": "en", "weight": 0.5},
        ]
    },
    "test": {"terms": [{"text": "sealed.jsonl"}]},
    "search": {"n_trials": 6, "rescore_top": 0},
}
OTHER = {"terms": [{"text": "held_out.jsonl", "name": "zh"}]}


@pytest.fixture(scope="module")
def searched(tmp_path_factory, make_base, make_tuned, make_adapter, corpus_dir) -> Path:
    """The folder of somebody who has trained, searched, compared and built, all on one machine."""
    folder = tmp_path_factory.mktemp("a")
    base = make_base()
    shutil.copytree(base.path, folder / "models/base")
    shutil.copytree(make_tuned(base, "gemma", 1), folder / "models/math")
    shutil.copytree(make_adapter(base, 4), folder / "my-code-lora")  # it names a folder as its base
    for name, source in {"held_out": "xyz.search", "held_out.en": "mix.search"}.items():
        shutil.copy(corpus_dir / f"{source}.jsonl", folder / f"{name}.jsonl")
    shutil.copy(corpus_dir / "xyz.test.jsonl", folder / "sealed.jsonl")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    patch = pytest.MonkeyPatch()
    ann = Person("you", folder)
    ann.sign_in(patch)
    for line in (
        "optimer search study.yaml my-study",
        "optimer compare my-study",
        "optimer build my-study/recipe.yaml merged",
    ):
        ann.types(line)
    patch.undo()
    return folder


@pytest.fixture
def ann(searched, tmp_path, hub, monkeypatch) -> Person:
    """Her, in a copy of that folder, signed in; nothing of hers is on the Hub."""
    for repo in [repo for repo in hub.store.repos.values() if repo.id.startswith("you/")]:
        hub.store.delete(repo)
    for cached in Path(constants.HF_HUB_CACHE).glob("models--you--*"):
        shutil.rmtree(cached)
    shutil.copytree(searched, tmp_path / "ann")
    person = Person("you", tmp_path / "ann")
    person.sign_in(monkeypatch)
    return person


def upload(repo_id: str, folder: Path) -> None:
    """Upload a folder without our help, and without the card that PEFT wrote."""
    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns="README.md")


def follow_as_reader(folder: Path, monkeypatch) -> str:
    """Pull, build, verify and re-target as somebody else; return what re-targeting printed."""
    folder.mkdir()
    (folder / "other-objective.yaml").write_text(yaml.safe_dump(OTHER))
    shutil.copy(folder.parent / "ann/held_out.jsonl", folder)
    shutil.rmtree(folder.parent / "ann")  # another machine
    bob = Person("bob", folder)
    bob.sign_in(monkeypatch)
    bob.types("optimer pull you/my-merge theirs")
    assert not (folder / "theirs/report.html").exists()  # a page of others is not pulled
    for line in (
        "optimer build theirs/recipe.yaml model",
        "optimer verify theirs/recipe.yaml model",
        "optimer report theirs",
    ):
        bob.types(line)
    return bob.types("optimer retarget theirs other-objective.yaml").output


def test_local_models_are_searched_published_and_rebuilt_by_others(ann, tmp_path, monkeypatch):
    best = load_study(ann.folder / "my-study").best_trial
    foreseen = ann.types(f"{PUSH} --dry-run").output
    assert not HfApi().repo_exists("you/my-merge")
    pushed = ann.types(PUSH).output
    for text in (foreseen, pushed):
        assert "/you/my-merge: readers\n  can build it" in text
        assert "can re-target it from its 6 trials: optimer retarget my-merge" in text
    assert ann.types(PUSH).output.count("already has everything") == 4
    api = HfApi()
    there = {name: set(api.list_repo_files(f"you/my-merge{name}")) for name in ("", "-base")}
    assert {"report.html", "results.json", "study/trials.jsonl"} <= there[""]
    assert {"figures/sealed.png", "figures/weights.png"} <= there[""]
    assert "model.safetensors" in there["-base"] and "README.md" in there["-base"]
    retargeted = follow_as_reader(tmp_path / "bob", monkeypatch)
    assert re.search(r"math .*\d", retargeted)
    bob = Person("bob", tmp_path / "bob")
    asked = "optimer retarget theirs other-objective.yaml verified --n-trials 1"
    assert "verified: value" in bob.runs(asked).output  # on his own copy of the items
    theirs = load_study(tmp_path / "bob/theirs").best_trial
    assert (theirs.weights, theirs.terms) == (best.weights, best.terms)


def test_a_push_without_a_licence_asks_for_one(ann):
    refused = ann.runs("optimer push my-study you/my-merge --vectors", ok=False)
    assert "the inputs do not determine the licence. Give it: --license" in refused.output


def test_an_adapter_on_the_hub_names_the_base_on_the_hub(ann, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    ann.types(PUSH)
    config = Path(HfApi().snapshot_download("you/my-merge-code")) / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == "you/my-merge-base"
    AutoPeftModelForCausalLM.from_pretrained("you/my-merge-code")


def test_a_model_takes_the_vectors_that_came_with_its_study(ann, hub, tmp_path, monkeypatch):
    ann.runs(PUSH)
    hub.log.clear()
    ann.runs("optimer push merged you/my-merge-bf16 --vectors --license gemma")
    assert hub.calls("POST .*/you/my-merge-bf16/commit/")
    assert not hub.calls("POST .*/you/my-merge(-bf16)?-(base|math|code)/commit/")
    assert not any(repo.id.startswith("you/my-merge-bf16-") for repo in hub.store.repos.values())
    recipe = Recipe.read(Path(HfApi().snapshot_download("you/my-merge-bf16")) / "recipe.yaml")
    assert {name: source.partition("@")[0] for name, source in recipe.sources.items()} == {
        "math": "you/my-merge-math",
        "code": "you/my-merge-code",
    }
    assert recipe.base_model.startswith("you/my-merge-base@")
    shutil.rmtree(ann.folder)
    (tmp_path / "bob").mkdir()
    bob = Person("bob", tmp_path / "bob")
    bob.sign_in(monkeypatch)
    bob.runs("optimer pull you/my-merge-bf16 model")
    bob.runs("optimer build model/recipe.yaml again")
    bob.runs("optimer verify again/recipe.yaml model")


def test_other_weights_under_the_earlier_name_are_not_taken(ann, hub, make_tuned, make_base):
    upload("you/my-merge-math", make_tuned(make_base(), "gemma", 7))
    ann.runs("optimer push merged you/my-merge-bf16 --vectors --license gemma")
    assert hub.calls("POST .*/you/my-merge-bf16-math/commit/")


def test_other_files_beside_the_same_weights_are_not_taken(ann, hub):
    ann.runs(PUSH)
    api = HfApi()

    def look_up() -> set[str]:
        at = ann.folder / "merged", "you/my-merge-bf16"
        return set(find_earlier_uploads(api, *at, is_private=False))

    everything = {"base_model", "math", "code"}
    assert look_up() == everything
    vector = json.loads(Path(api.hf_hub_download("you/my-merge-math", "vector.json")).read_text())
    vector["base"]["files"] = {"model.safetensors": "0" * 64}
    for name, file, content in (
        ("base_model", "config.json", "{}"),
        ("base_model", "tokenizer_config.json", "{}"),
        ("base_model", "tokenizer.json", "{}"),
        ("base_model", "chat_template.jinja", "{{ messages }}"),
        ("math", "chat_template.jinja", "{{ messages }}"),
        ("math", "vector.json", json.dumps(vector)),
        ("code", "vector.json", "{}"),
    ):
        repo_id = f"you/my-merge-{name.removesuffix('_model')}"
        before = api.model_info(repo_id).sha
        api.upload_file(path_or_fileobj=content.encode(), path_in_repo=file, repo_id=repo_id)
        assert look_up() == everything - {name}, file
        if file in api.list_repo_files(repo_id, revision=before):
            old = Path(api.hf_hub_download(repo_id, file, revision=before)).read_bytes()
            api.upload_file(path_or_fileobj=old, path_in_repo=file, repo_id=repo_id)
        else:
            api.delete_file(file, repo_id)
    assert look_up() == everything


def test_models_that_are_on_the_hub_are_named_and_not_sent_again(
    ann, hub, tmp_path, monkeypatch, caplog
):
    config = ann.folder / "my-code-lora/adapter_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"base_model_name_or_path": "you/base"}))
    for name, path in (("base", "models/base"), ("math", "models/math"), ("code", "my-code-lora")):
        upload(f"you/{name}", ann.folder / path)
    config.write_text(before)
    hub.log.clear()
    at = " ".join(f"--at {name}=you/{name}" for name in ("base", "math", "code"))
    ann.runs(f"optimer push my-study you/my-merge {at} --license mit")
    assert not hub.calls("POST .*/you/(base|math|code)/commit/")
    lock = Lock.read(Path(HfApi().snapshot_download("you/my-merge")) / "recipe.lock.json")
    assert lock.vectors["code"] != weight_digests(ann.folder / "my-code-lora")
    follow_as_reader(tmp_path / "bob", monkeypatch)


def test_a_chat_model_with_its_own_tokens_is_published_and_built_by_others(
    ann, tmp_path, monkeypatch
):
    base = resolve_model(str(ann.folder / "models/base"))
    save_tuned(base, ann.folder / "chat", with_tokens(base.path, [START, END]), seed=1)
    study = STUDY | {
        "vectors": {
            **{"math": "./models/math", "code": "./my-code-lora", "chat": "./chat"},
            "delta": "./chat-delta",
        },
        "vocabulary": "union",
        "tokenizer_source": "chat",
        "search": {"n_trials": 4, "rescore_top": 0},
    }
    (ann.folder / "chat.yaml").write_text(yaml.safe_dump(study))
    other = save_tuned(base, ann.folder / "other", with_tokens(base.path, [END]), seed=2)
    ann.runs(f"optimer extract {other} --base models/base chat-delta --dtype int8")
    ann.runs("optimer search chat.yaml my-chat")
    ann.runs("optimer build my-chat/recipe.yaml chatty")
    built = weight_digests(ann.folder / "chatty")
    ann.runs("optimer push my-chat you/my-chat --vectors --license gemma")
    for name in ("math", "code", "chat", "delta"):
        record = read_record(Path(HfApi().snapshot_download(f"you/my-chat-{name}")))
        assert record is not None and record.base.files == weight_digests(base.path)
        assert record.base.reference == "you/my-chat-base"
    shutil.rmtree(ann.folder)  # another machine
    monkeypatch.setenv("OPTIMER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bob").mkdir()
    bob = Person("bob", tmp_path / "bob")
    bob.sign_in(monkeypatch)
    for line in (
        "optimer pull you/my-chat theirs",
        "optimer build theirs/recipe.yaml model",
        "optimer verify theirs/recipe.yaml model",
    ):
        bob.runs(line)
    assert weight_digests(bob.folder / "model") == built
    assert {START, END} <= AutoTokenizer.from_pretrained(bob.folder / "model").get_vocab().keys()


@pytest.mark.parametrize("name", ["math", "code", "base"])
def test_other_weights_on_the_hub_are_refused(ann, name, make_tuned, make_base, make_adapter):
    other = {"code": make_adapter(make_base(), 5)}.get(name, make_tuned(make_base(), "gemma", 7))
    upload("you/other", other)
    refused = ann.runs(f"optimer push my-study you/my-merge --at {name}=you/other", ok=False)
    assert re.search(r"weights are not those of .*: found [0-9a-f]{64}, exp", refused.output)


def test_another_rank_on_the_hub_is_refused(ann):
    config = ann.folder / "my-code-lora/adapter_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"lora_alpha": 99}))
    upload("you/other", config.parent)
    config.write_text(before)
    refused = ann.runs("optimer push my-study you/my-merge --at code=you/other", ok=False)
    assert "in lora_alpha. Only the name of the base may differ" in refused.output


def test_weights_by_group_are_published_and_rebuilt_and_retargeted_by_others(
    ann, tmp_path, monkeypatch
):
    study = STUDY | {
        "vectors": {
            "math": {"source": "./models/math", "by": ["self_attn", "mlp", "else"]},
            "code": {"source": "./my-code-lora", "by": {"layers": 2}, "bounds": [0.0, 1.2]},
        },
        "search": {"n_trials": 8, "rescore_top": 0, "gradients": "always"},
    }
    (ann.folder / "study.yaml").write_text(yaml.safe_dump(study))
    shutil.rmtree(ann.folder / "my-study")
    ann.runs("optimer search study.yaml my-study --workers 1")
    ann.runs("optimer compare my-study")
    shutil.rmtree(ann.folder / "merged")
    ann.runs("optimer build my-study/recipe.yaml merged")
    ann.runs(PUSH)
    retargeted = follow_as_reader(tmp_path / "bob", monkeypatch)
    assert re.search(r"math.self_attn .*\d", retargeted)
    card = Path(HfApi().snapshot_download("you/my-merge")) / "README.md"
    assert "\n| math.self\\_attn | " in card.read_text(encoding="utf-8")
