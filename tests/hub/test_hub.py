"""Push and pull against a real Hub server (tests/support/minihub), with the real client."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants
from safetensors.torch import load_file

from optimer_hf import hub as hubs
from optimer_hf.errors import HubError, ModelError, OptimerError, OutputError
from optimer_hf.experiment.probe import list_downloads
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.locks import hold_place
from optimer_hf.hub import client as remote
from optimer_hf.hub import pulling as pulls
from optimer_hf.hub import pushing as pushes
from optimer_hf.hub.card import split as card_split
from optimer_hf.hub.private import refuse_private
from optimer_hf.hub.publication import publication
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.layout import ResolvedModel, copy_beside_weights, weight_digests
from optimer_hf.models.resolve import resolve_base, resolve_model
from optimer_hf.recipes.build import build, verify
from optimer_hf.recipes.record import Lock, Recipe
from optimer_hf.report.captions import Captions
from optimer_hf.report.page import write_figures
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.config import StudyConfig
from optimer_hf.vectors.delta import extract, write_record
from optimer_hf.vectors.opening import open_vector
from tests.support import landscapes
from tests.support.tiny import tiny_model

ALICE, BOB = "hf_alice_write", "hf_bob_write"


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def published_base(make_base):
    """alice/base: a tiny model with a licence, on the server; returns its pinned reference."""
    from huggingface_hub import constants

    patch = pytest.MonkeyPatch()
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    api = HfApi(token=ALICE)
    api.create_repo("alice/base", exist_ok=True)
    (make_base().path / "README.md").write_text("---\nlicense: gemma\n---\n")
    commit = api.upload_folder(repo_id="alice/base", folder_path=make_base().path).oid
    yield f"alice/base@{commit}"
    patch.undo()


@pytest.fixture
def base(hub, published_base):
    return resolve_model(published_base)


@pytest.fixture
def name(request):
    """A repository name of its own for every test."""
    return "r" + str(abs(hash(request.node.name)) % 10**8)


@pytest.fixture
def make_vector(base, make_adapter, make_tuned, tmp_path):
    """Return a function kind, seed -> directory of a complete vector of the published base."""

    def vector(kind: str, seed: int = 0) -> Path:
        out = tmp_path / f"{kind}-{seed}"
        if kind == "delta":
            tuned = make_tuned(base, "gemma", seed)
            extract(open_vector("v", str(tuned), base), base, out)
            return out
        made = make_adapter(base, seed) if kind == "adapter" else make_tuned(base, "gemma", seed)
        made.rename(out)
        config = out / "adapter_config.json"
        if config.exists():
            data = json.loads(config.read_text())
            config.write_text(json.dumps(data | {"base_model_name_or_path": "alice/base"}))
        write_record(out, base, name=f"v{seed}", kind=kind)
        return out

    return vector


@pytest.fixture
def make_recipe(published_base, make_vector, base, tmp_path):
    """Return a function kind -> folder of a recipe over two local vectors of that kind."""

    def recipe(kind: str = "adapter", weights=(0.5, 0.25)) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        paths = {f"v{seed}": make_vector(kind, seed) for seed in range(2)}
        chosen = dict(zip(paths, weights, strict=True))
        data = {
            "format_version": 1,
            "name": "tiny",
            "base_model": published_base,
            "dtype": "bfloat16",
            "vectors": {
                key: {"source": str(path), "weight": chosen[key]} for key, path in paths.items()
            },
            "objective": {"terms": [{"text": "../private/ja.jsonl", "name": "ja"}]},
            "scores": {"sealed": {"value": 0.1, "terms": {"ja": 1.5}, "verdicts": ["better."]}},
            "study": {"sha256": "0" * 64, "n_trials": 4, "seed": 0, "incumbent": 3},
            "ledger": {"search": {"n": 4, "items": 20, "tokens": 100, "seconds": 3.0}},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
        lock = Lock(
            base=weight_digests(base.path),
            vectors={key: weight_digests(path) for key, path in paths.items()},
            kinds=dict.fromkeys(paths, kind),
            weights=chosen,
            dtype="bfloat16",
        )
        lock.write(folder / "recipe.lock.json")
        return folder

    return recipe


def run_cli(*arguments, hub, xet: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, online."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": ALICE,
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        **environment,
    }
    command = [sys.executable, "-m", "optimer_hf", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "delta", "checkpoint"])
def test_a_pushed_vector_comes_back_with_the_same_sha256(hub, make_vector, name, kind, tmp_path):
    vector = make_vector(kind)
    pushed = hubs.push(vector, f"alice/{name}", token=ALICE)
    pulled = hubs.pull(f"alice/{name}", tmp_path / "back", token=ALICE)
    assert pulled.kind == "vector"
    assert pulled.commit == pushed.commit
    assert weight_digests(tmp_path / "back") == weight_digests(vector)
    assert (tmp_path / "back" / "vector.json").read_bytes() == (vector / "vector.json").read_bytes()


@pytest.mark.parametrize("kind", ["adapter", "delta", "checkpoint"])
def test_a_stranger_builds_the_same_model_from_a_pushed_recipe(
    hub, make_recipe, name, kind, tmp_path
):
    folder = make_recipe(kind)
    build(folder / "recipe.yaml", tmp_path / "mine")
    done = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert [each.repo_id for each in done.vectors] == [f"alice/{name}-v0", f"alice/{name}-v1"]
    pulled = hubs.pull(f"alice/{name}", tmp_path / "theirs", token=BOB)
    assert pulled.kind == "recipe"
    assert len(pulled.inputs) == 3
    assert all(each.licence == "gemma" and each.n_bytes for each in pulled.inputs)
    recipe = tmp_path / "theirs" / "recipe.yaml"
    assert "gemma" in (tmp_path / "theirs" / "README.md").read_text()
    assert str(tmp_path) not in recipe.read_text()
    assert "private" not in recipe.read_text()
    build(recipe, tmp_path / "built")
    assert weight_digests(tmp_path / "built") == weight_digests(tmp_path / "mine")
    verify(recipe, tmp_path / "built")


@pytest.mark.parametrize("max_shard_size", [5 * 10**9, 30_000])
def test_a_built_model_is_pushed_verified_and_used(
    hub, make_recipe, name, tmp_path, max_shard_size
):
    from transformers import AutoModelForCausalLM

    folder = make_recipe("delta")
    build(folder / "recipe.yaml", tmp_path / "model", max_shard_size=max_shard_size)
    hubs.push(tmp_path / "model", f"alice/{name}", token=ALICE, vectors=True)
    pulled = hubs.pull(f"alice/{name}", tmp_path / "back", token=ALICE)
    assert pulled.kind == "model"
    verify(tmp_path / "back" / "recipe.yaml", tmp_path / "back")
    verify(folder / "recipe.yaml", tmp_path / "back")
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    info = HfApi(token=ALICE).model_info(f"alice/{name}")
    assert {"merge", "mergekit", "optimer", "license:gemma"} <= set(info.tags)
    assert info.model_index[0]["results"][0]["metrics"][0]["value"] == 1.5


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_the_command_line_pushes_and_pulls_over_both_transports(
    hub, make_vector, name, xet, tmp_path
):
    vector = make_vector("delta", seed=5 + xet)
    pushed = run_cli("push", vector, f"alice/{name}", hub=hub, xet=xet)
    assert pushed.returncode == 0, pushed.stderr
    assert bool(hub.calls("POST /cas/v1/xorbs")) == xet
    assert bool(hub.calls("PUT /_lfs/put")) != xet
    home = str(tmp_path / "home")  # an empty cache: the bytes come from the server
    pulled = run_cli("pull", f"alice/{name}", tmp_path / "back", hub=hub, xet=xet, HF_HOME=home)
    assert pulled.returncode == 0, pulled.stderr
    assert weight_digests(tmp_path / "back") == weight_digests(vector)
    assert ALICE not in pushed.stdout + pushed.stderr + pulled.stdout + pulled.stderr


def test_hf_download_and_git_clone_give_what_was_pushed(hub, make_vector, name, tmp_path):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE)
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ALICE}
    hf = str(Path(sys.executable).with_name("hf"))
    out = tmp_path / "out"
    command = [hf, "download", f"alice/{name}", "--local-dir", str(out), "--quiet"]
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert weight_digests(out) == weight_digests(vector)
    clone = tmp_path / "clone"
    git_env = {**os.environ, "GIT_LFS_SKIP_SMUDGE": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
    command = ["git", "clone", "-q", f"{hub.endpoint}/alice/{name}", str(clone)]
    subprocess.run(command, env=git_env, check=True)
    for path in out.rglob("*"):
        if path.is_file() and ".cache" not in path.parts:
            cloned = (clone / path.name).read_text()
            if path.suffix == ".safetensors":  # a pointer, as git-lfs keeps it
                assert f"oid sha256:{sha256_file(path)}" in cloned
            else:
                assert cloned == path.read_text()


def test_what_was_fetched_is_no_download_of_a_plan(base, published_base):
    objective = {"terms": [{"task": "none"}]}
    study = {"base_model": published_base, "vectors": {"v": {"source": "./v"}}}
    config = StudyConfig.model_validate(study | {"objective": objective})
    assert list_downloads(config) == ()
    shutil.rmtree(base.path.parents[1])
    assert [each.reference for each in list_downloads(config)] == [published_base]


def test_unmodified_mergekit_runs_the_exported_config(hub, make_recipe, name, tmp_path):
    folder = make_recipe("delta")
    build(folder / "recipe.yaml", tmp_path / "mine")
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    hubs.pull(f"alice/{name}", tmp_path / "theirs", token=ALICE)
    config = tmp_path / "theirs" / "mergekit_config.yml"
    assert f"alice/{name}-v0@" in config.read_text()
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ALICE}
    mergekit = str(Path(sys.executable).with_name("mergekit-yaml"))
    command = [
        mergekit,
        str(config),
        str(tmp_path / "vanilla"),
        "--lora-merge-cache",
        str(tmp_path),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = load_file(tmp_path / "mine" / "model.safetensors")
    theirs = load_file(next((tmp_path / "vanilla").glob("*.safetensors")))
    same = [
        torch.isclose(ours[key], theirs[key], rtol=2**-7, atol=0).float().mean() for key in ours
    ]
    assert min(same) > 0.995


# -- what a push leaves alone, and what it refuses -------------------------------------------------


def test_a_second_push_sends_nothing(hub, make_vector, name):
    vector = make_vector("adapter")
    first = hubs.push(vector, f"alice/{name}", token=ALICE)
    hub.log.clear()
    second = hubs.push(vector, f"alice/{name}", token=ALICE)
    assert (second.commit, second.sent, second.deleted) == (first.commit, {}, ())
    assert not hub.calls("POST .*/commit/")


def test_a_dry_run_sends_nothing_and_shows_the_card(hub, make_vector, name):
    done = hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE, dry_run=True)
    assert done.commit is None
    assert "adapter_model.safetensors" in done.sent
    assert "license: gemma" in done.card
    assert not hub.calls("^(POST|PUT) ")


def test_what_a_person_wrote_into_the_card_survives(hub, make_vector, name):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE)
    api = HfApi(token=ALICE)
    card = Path(api.hf_hub_download(f"alice/{name}", "README.md")).read_text()
    edited = card.replace("tags:\n", "tags:\n- japanese\n").replace(
        "---\n\n", "---\n\nMy words.\n\n"
    )
    edited = edited.replace("license:", "my_field: 7\nlicense:") + "\nMore words.\n"
    api.upload_file(
        path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=f"alice/{name}"
    )
    record = json.loads((vector / "vector.json").read_text())
    (vector / "vector.json").write_text(json.dumps(record | {"norm": 123.0}))
    hubs.push(vector, f"alice/{name}", token=ALICE)
    again = Path(api.hf_hub_download(f"alice/{name}", "README.md")).read_text()
    for kept in ("japanese", "My words.", "More words.", "my_field: 7", "| norm | 123 "):
        assert kept in again
    assert again.count(f"# {name}\n") == 1


def test_only_files_of_the_allow_list_travel(hub, make_vector, name):
    vector = make_vector("adapter")
    for file in (".env", "optimizer.pt", "training_args.bin", "notes.txt", "trainer_state.json"):
        (vector / file).write_text("secret")
    done = hubs.push(vector, f"alice/{name}", token=ALICE)
    there = set(HfApi(token=ALICE).list_repo_files(f"alice/{name}")) - {".gitattributes"}
    assert there == set(done.sent)
    assert there == {"README.md", "vector.json", "adapter_config.json", "adapter_model.safetensors"}


def test_a_local_or_unpinned_input_is_refused(hub, make_recipe, name):
    folder = make_recipe()
    with pytest.raises(HubError, match=r"vectors\.v0\.source: .* lies on this machine.*--vectors"):
        hubs.push(folder, f"alice/{name}", token=ALICE)
    recipe = folder / "recipe.yaml"
    data = yaml.safe_load(recipe.read_text()) | {"base_model": "alice/base"}
    recipe.write_text(yaml.safe_dump(data))
    with pytest.raises(HubError, match=r"base_model: 'alice/base' is not pinned"):
        hubs.push(folder, f"alice/{name}", token=ALICE)


def test_a_path_of_this_machine_or_a_token_is_refused(hub, make_vector, name):
    vector = make_vector("adapter")
    config = vector / "adapter_config.json"
    clean = json.loads(config.read_text())
    config.write_text(json.dumps(clean | {"base_model_name_or_path": str(vector)}, indent=2))
    with pytest.raises(HubError, match=r"adapter_config\.json: line \d+: holds a path of this"):
        hubs.push(vector, f"alice/{name}", token=ALICE)
    config.write_text(json.dumps(clean | {"revision": "hf_" + "a" * 34}, indent=2))
    with pytest.raises(HubError, match=r"holds a token \(hf_aaa\.\.\.\)"):
        hubs.push(vector, f"alice/{name}", token=ALICE)
    assert not hub.calls("/commit/")


def test_a_private_input_is_refused_in_a_public_recipe(hub, make_recipe, make_vector, name):
    folder = make_recipe()
    recipe = folder / "recipe.yaml"
    data = yaml.safe_load(recipe.read_text())
    for key in data["vectors"]:
        pushed = hubs.push(
            Path(data["vectors"][key]["source"]), f"alice/{name}-{key}", token=ALICE, private=True
        )
        data["vectors"][key]["source"] = f"{pushed.repo_id}@{pushed.commit}"
    recipe.write_text(yaml.safe_dump(data))
    with pytest.raises(HubError, match="is private, so a public recipe"):
        hubs.push(folder, f"alice/{name}", token=ALICE, private=False)
    assert hubs.push(folder, f"alice/{name}", token=ALICE, private=True).commit


def test_weights_that_are_not_the_locked_ones_are_refused(hub, make_recipe, name, tmp_path):
    folder = make_recipe("delta")
    build(folder / "recipe.yaml", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(HubError, match="its weights are not the locked ones"):
        hubs.push(tmp_path / "model", f"alice/{name}", token=ALICE, vectors=True)
    delta = tmp_path / "delta-1" / "model.safetensors"
    delta.write_bytes(delta.read_bytes()[:-1] + b"x")
    with pytest.raises(HubError, match=r"vectors\.v1: the weights .* are not the locked ones"):
        hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert not hub.calls("POST .*/commit/")


def test_private_vectors_of_an_earlier_push_do_not_end_in_a_public_recipe(hub, make_recipe, name):
    folder = make_recipe()
    for number in range(2):
        HfApi(token=ALICE).create_repo(f"alice/{name}-v{number}", private=True)
    with pytest.raises(HubError, match="is private, so a public recipe"):
        hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)


def test_a_licence_that_cannot_be_told_is_asked_for(hub, make_vector, name, make_base):
    api = HfApi(token=ALICE)
    api.create_repo(f"alice/{name}-base", exist_ok=True)
    weights = make_base().path / "model.safetensors"
    commit = api.upload_file(
        path_or_fileobj=weights, path_in_repo=weights.name, repo_id=f"alice/{name}-base"
    ).oid
    vector = make_vector("adapter")
    record = json.loads((vector / "vector.json").read_text())
    record["base"] |= {"reference": f"alice/{name}-base", "commit": commit}
    (vector / "vector.json").write_text(json.dumps(record))
    with pytest.raises(HubError, match=r"licence cannot be told .* --license"):
        hubs.push(vector, f"alice/{name}", token=ALICE)
    assert hubs.push(vector, f"alice/{name}", token=ALICE, licence="mit").commit


def test_a_repository_of_another_kind_or_visibility_is_refused(hub, make_vector, make_recipe, name):
    hubs.push(make_vector("adapter", 7), f"alice/{name}", token=ALICE)
    with pytest.raises(HubError, match="holds a vector, and this is a recipe"):
        hubs.push(make_recipe(), f"alice/{name}", token=ALICE, vectors=True)
    with pytest.raises(HubError, match="is public, and --private was asked"):
        hubs.push(make_vector("adapter", 8), f"alice/{name}", token=ALICE, private=True)


def test_a_tag_comes_last_and_does_not_move(hub, make_vector, name):
    vector = make_vector("adapter")
    first = hubs.push(vector, f"alice/{name}", token=ALICE, tag="v1.0")
    order = [record.path for record in hub.calls("POST .*/(commit|tag)/")]
    assert "/commit/" in order[0] and "/tag/" in order[-1]
    assert hubs.push(vector, f"alice/{name}", token=ALICE, tag="v1.0").commit == first.commit
    record = json.loads((vector / "vector.json").read_text())
    (vector / "vector.json").write_text(json.dumps(record | {"norm": 5.0}))
    with pytest.raises(HubError, match=r"tag 'v1\.0' is at .* already, and a tag does not move"):
        hubs.push(vector, f"alice/{name}", token=ALICE, tag="v1.0")


def test_a_branch_and_a_pull_request_leave_main_alone(hub, make_vector, name):
    vector = make_vector("adapter")
    first = hubs.push(vector, f"alice/{name}", token=ALICE)
    record = json.loads((vector / "vector.json").read_text())
    (vector / "vector.json").write_text(json.dumps(record | {"norm": 5.0}))
    hubs.push(vector, f"alice/{name}", token=ALICE, revision="next")
    proposed = hubs.push(vector, f"alice/{name}", token=BOB, create_pr=True)
    assert "/discussions/1" in proposed.pull_request
    assert HfApi(token=ALICE).model_info(f"alice/{name}").sha == first.commit


def _changed(vector: Path, **fields) -> None:
    record = json.loads((vector / "vector.json").read_text())
    (vector / "vector.json").write_text(json.dumps(record | fields))


def test_a_proposal_is_made_once(hub, make_vector, make_recipe, name):
    vector = make_vector("adapter", 3)
    hubs.push(vector, f"alice/{name}", token=ALICE)
    _changed(vector, norm=5.0)
    first = hubs.push(vector, f"alice/{name}", token=BOB, create_pr=True)
    again = hubs.push(vector, f"alice/{name}", token=BOB, create_pr=True)
    assert (again.pull_request, again.commit, again.sent) == (first.pull_request, first.commit, {})
    with pytest.raises(HubError, match="--vectors with --create-pr"):
        hubs.push(make_recipe(), f"alice/{name}", create_pr=True, vectors=True)


def test_a_branch_is_made_also_when_it_equals_main(hub, make_vector, name):
    vector = make_vector("adapter")
    first = hubs.push(vector, f"alice/{name}", token=ALICE)
    assert hubs.push(vector, f"alice/{name}", token=ALICE, revision="same").commit == first.commit
    branches = HfApi(token=ALICE).list_repo_refs(f"alice/{name}").branches
    assert {"main", "same"} == {branch.name for branch in branches}


def test_the_model_of_somebody_is_not_replaced_and_a_licence_file_stays(
    hub, make_vector, name, published_base
):
    vector = make_vector("checkpoint")
    with pytest.raises(HubError, match=r"holds files of somebody's model \(config\.json"):
        hubs.push(vector, "alice/base", token=ALICE)
    hubs.push(vector, f"alice/{name}", token=ALICE)
    api = HfApi(token=ALICE)
    api.upload_file(path_or_fileobj=b"terms", path_in_repo="LICENSE", repo_id=f"alice/{name}")
    (vector / "generation_config.json").unlink()
    done = hubs.push(vector, f"alice/{name}", token=ALICE)
    assert done.deleted == ("generation_config.json",)
    assert "LICENSE" in api.list_repo_files(f"alice/{name}")


def test_a_licence_that_was_said_once_stays(hub, make_vector, name, caplog):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE, licence="mit")
    assert "--license says mit, but its inputs are under gemma" in caplog.text
    _changed(vector, norm=5.0)
    assert "license: mit" in hubs.push(vector, f"alice/{name}", token=ALICE).card
    assert "its card says mit, but its inputs are under gemma" in caplog.text


def test_the_card_of_a_recipe_names_data_and_languages_of_its_vectors(hub, make_recipe, name):
    folder = make_recipe(weights=(0.5, 0.0))
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    api = HfApi(token=ALICE)
    card = Path(api.hf_hub_download(f"alice/{name}-v0", "README.md")).read_text()
    card = card.replace("tags:\n", "language: ja\ndatasets:\n- org/wiki\ntags:\n", 1)
    api.upload_file(
        path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=f"alice/{name}-v0"
    )
    again = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert "language:\n- ja\n" in again.card and "- org/wiki\n" in again.card
    assert "## Merge config for mergekit with optimer-hf installed" in again.card
    assert "ja 1.5000 (bits per byte); objective" in again.card
    assert card_split(again.card)[0]["base_model"] == ["alice/base", f"alice/{name}-v0"]


def test_vectors_of_an_account_that_is_private_by_default(hub, make_recipe, name):
    """The recipe exists already and is private; its vectors follow it without --private."""
    HfApi(token=ALICE).create_repo(f"alice/{name}", private=True)
    hubs.push(make_recipe(), f"alice/{name}", token=ALICE, vectors=True)
    assert HfApi(token=ALICE).model_info(f"alice/{name}-v1").private


def test_nothing_is_sent_when_one_vector_cannot_be(hub, make_recipe, name, tmp_path):
    folder = make_recipe("delta")
    config = tmp_path / "delta-1" / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps(data | {"_name_or_path": "/scratch/ann/gemma"}))
    with pytest.raises(HubError, match=r"_name_or_path: holds a path \(/scratch/ann/gemma\)"):
        hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    config.write_text(json.dumps(data))
    (tmp_path / "delta-0" / "vector.json").unlink()
    with pytest.raises(HubError, match=r"vectors\.v0: .* has no vector\.json"):
        hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert not hub.calls("POST .*/(commit|repos/create)")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer_config.json", '{"auth": "hf_%s"}' % ("a" * 34)),
        ("tokenizer.json", '{"model": "hf_%s"}' % ("a" * 34)),
        ("LICENSE", "signed: hf_" + "a" * 34),
        ("generation_config.json", '{"cache": "~/models/x"}'),
        ("generation_config.json", '{"cache": "file:///models/x"}'),
        ("adapter_config.json", '{"base_model_name_or_path": "/scratch/ann/gemma"}'),
    ],
)
def test_secrets_are_found_in_every_kind_of_file(make_vector, file, text):
    vector = make_vector("adapter")
    (vector / file).write_text(text)
    with pytest.raises(HubError, match=rf"{file}: .*holds a (token|path)"):
        publication(vector)


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "a1" * 17,
        "api_org_" + "Ab" * 17,
        "hf_jwt_eyJhbGciOiJFZERTQSJ9.eyJyZWFkIjp0cnVl",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN",
        "sk-proj-" + "x9" * 20,
        "AKIA" + "ABCD1234EFGH5678",
        "ghp_" + "a" * 36,
        "github_pat_" + "a" * 40,
        "glpat-" + "b" * 20,
        "xoxb-1234567890-abc",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("file", ["tokenizer.json", "README.md", "vector.json"])
def test_tokens_of_every_known_form_are_refused(file, token):
    text = json.dumps({"note": f"made with {token}"})
    with pytest.raises(HubError, match="holds a token") as error:
        refuse_private(Path(file), text.encode())
    assert token not in str(error.value)


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "SOME_TOKEN"])
def test_the_values_of_secret_variables_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "0123456789abcdef" * 2)
    monkeypatch.setenv("SSH_KEY_PATH", "/home/someone/key")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TOKENIZER_NAME", "google/gemma-3-270m")
    with pytest.raises(HubError, match=rf"holds the value of {name} \(012\.\.\.\)"):
        refuse_private(Path("recipe.yaml"), b"note: 0123456789abcdef0123456789abcdef")
    refuse_private(Path("recipe.yaml"), b"note: false, 0123456789, google/gemma-3-270m")
    refuse_private(Path("recipe.yaml"), b"corpus: sk-en-translation-corpus-of-web-pages-v1")


def test_the_token_in_use_is_refused_whatever_it_looks_like(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain-company-token")
    with pytest.raises(HubError, match=r"holds the (token in use|value of HF_TOKEN)"):
        refuse_private(Path("README.md"), b"see plain-company-token")


@pytest.mark.parametrize("field", ["api_key", "wandb_api_key", "hub_token", "auth.password"])
def test_a_field_that_is_called_a_secret_is_refused(field):
    data = {field: "5f" * 20}
    with pytest.raises(HubError, match=rf"{field}: holds what its name says is a secret"):
        refuse_private(Path("results.json"), json.dumps(data).encode())
    refuse_private(
        Path("results.json"), json.dumps({"eos_token": "<eos>", "commit": "5f" * 20}).encode()
    )


@pytest.mark.parametrize(
    "file",
    [
        *("LICENSE-MODEL", "LICENCE", "COPYING", "LICENSE.rst", "USE_POLICY.txt", "NOTICE.md"),
        *("spiece.model", "vocab.bpe", "chat_template.json", "qwen.tiktoken", "tekken.json"),
    ],
)
def test_what_a_build_copies_beside_weights_is_published(make_vector, tmp_path, file):
    vector = make_vector("adapter")
    (vector / file).write_text("{}")
    copy_beside_weights(vector, tmp_path)
    assert (tmp_path / file).is_file()
    assert file in publication(vector).files


def test_a_path_in_the_header_of_weights_is_found(make_vector):
    from safetensors.torch import save_file

    vector = make_vector("adapter")
    weights = vector / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"trained_in": "/scratch/ann/run"})
    with pytest.raises(HubError, match=r"trained_in: holds a path"):
        publication(vector)


@pytest.mark.parametrize(
    "file",
    [
        *("vocab.pkl", "LICENSE.env", "tokenizer_secrets.json", ".partial-model.safetensors"),
        *("LICENSE-tool.py", "tokenizer.py", "NOTICE.sh", "LICENSE_x.pkl"),
    ],
)
def test_only_exact_names_are_published(make_vector, file):
    vector = make_vector("adapter")
    (vector / file).write_bytes(b"x")
    if file.endswith("safetensors"):
        with pytest.raises(HubError, match="weights of unknown use"):
            publication(vector)
    else:
        assert file not in publication(vector).files


# -- bases from the Hub ----------------------------------------------------------------------------


def published(repo_id: str, files: dict[str, bytes | Path]) -> str:
    """Make a repository of these files and return its pinned reference."""
    api = HfApi(token=ALICE)
    api.create_repo(repo_id, exist_ok=True)
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return f"{repo_id}@{api.create_commit(repo_id, operations, commit_message='x').oid}"


@pytest.mark.parametrize("sharded", [False, True])
def test_of_weights_only_those_that_are_read_are_fetched_and_count(
    hub, make_base, name, sharded, tmp_path, monkeypatch
):
    source = make_base("llama")
    if sharded:
        write_merged(source, [], {}, tmp_path / "shards", max_shard_size=30_000)
        source = ResolvedModel(tmp_path / "shards", "shards")
    files: dict[str, bytes | Path] = {path.name: path for path in source.path.iterdir()}
    more = ("consolidated.safetensors", "onnx/model.safetensors", "onnx/x.safetensors")
    reference = published(f"alice/{name}", files | {each: each.encode() for each in more})
    found = resolve_model(reference)
    assert weight_digests(found.path) == weight_digests(source.path)
    assert (len(weight_digests(source.path)) > 1) == sharded
    fetched = {str(p.relative_to(found.path)) for p in found.path.rglob("*") if p.is_file()}
    assert not fetched & set(more)
    assert resolve_base(reference) == found
    hub.log.clear()
    assert resolve_model(reference) == found and hub.log == []  # all of a commit is in the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(reference) == found
    (found.path / sorted(weight_digests(found.path))[-1]).unlink()
    with pytest.raises(ModelError, match="cannot be fetched"):
        resolve_model(reference)


def test_an_adapter_and_a_repository_without_an_index_are_fetched_whole(
    hub, make_base, make_adapter, name
):
    adapter = make_adapter(make_base("llama"), 1)
    files: dict[str, bytes | Path] = {p.name: p for p in adapter.iterdir() if p.suffix != ".md"}
    found = resolve_model(published(f"alice/{name}", files))
    assert weight_digests(found.path) == weight_digests(adapter)
    weights = make_base("llama").path / "model.safetensors"
    found = resolve_model(published(f"alice/{name}-2", {"consolidated.safetensors": weights}))
    assert weight_digests(found.path).keys() == {"consolidated.safetensors"}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_repository_of_pickled_weights_is_named_with_the_way_to_convert_them(hub, name, file):
    reference = published(f"alice/{name}", {"config.json": b"{}", file: b"x"})
    message = rf"{reference}: has no safetensors weights.*{file}.*save_pretrained"
    with pytest.raises(ModelError, match=message):
        resolve_model(reference)


def test_weights_that_are_not_read_are_not_published(make_recipe, tmp_path):
    build(make_recipe("delta") / "recipe.yaml", tmp_path / "model")
    stale = ("model-00001-of-00002.safetensors", "consolidated.safetensors")
    for each in stale:
        (tmp_path / "model" / each).write_bytes(b"x")
    recipe = yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text())
    pins = {key: f"alice/{key}@{'0' * 40}" for key in recipe["vectors"]}
    found = publication(tmp_path / "model", pins)
    assert "model.safetensors" in found.files and not found.files.keys() & set(stale)


# -- faults of the Hub -----------------------------------------------------------------------------


def test_two_pushers_lose_nothing(hub, make_vector, name, monkeypatch, caplog):
    hubs.push(make_vector("adapter", 1), f"alice/{name}", token=ALICE)
    api, original = HfApi(token=ALICE), pushes._changes
    calls = []

    def changes(*arguments):
        found = original(*arguments)
        if not calls:
            api.create_commit(
                f"alice/{name}",
                [CommitOperationAdd("theirs.md", b"meanwhile")],
                commit_message="another person",
            )
        calls.append(1)
        return found

    monkeypatch.setattr(pushes, "_changes", changes)
    done = hubs.push(make_vector("adapter", 2), f"alice/{name}", token=ALICE)
    assert len(calls) == 2
    assert "somebody else pushed" in caplog.text
    there = api.list_repo_files(f"alice/{name}", revision=done.commit)
    assert {"theirs.md", "vector.json"} <= set(there)


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}], ids=["503", "dropped"])
def test_a_passing_fault_at_the_commit_is_tried_again(hub, make_vector, name, fault):
    hub.inject("POST .*/commit/main", times=2, **fault)
    done = hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE)
    assert HfApi(token=ALICE).model_info(f"alice/{name}").sha == done.commit


def test_a_used_up_commit_quota_says_when_to_go_on(hub, make_vector, name):
    vector = make_vector("adapter", 11)
    hub.inject(
        "POST .*/commit/main",
        429,
        times=99,
        headers={"RateLimit": '"api";r=12;t=1800'},
        body="You have exceeded our rate limit for repository commits",
    )
    with pytest.raises(HubError, match=r"commits of a repository is used up .* again in 1800 s"):
        hubs.push(vector, f"alice/{name}", token=ALICE)
    hub.faults.clear()
    hub.log.clear()
    assert hubs.push(vector, f"alice/{name}", token=ALICE).commit
    assert not hub.calls("POST /cas/v1/xorbs")  # the weights had arrived before


def test_a_request_quota_is_waited_for(hub, make_vector, name):
    hub.inject("GET /api/models/alice", 429, times=1, headers={"RateLimit": '"api";r=0;t=2'})
    assert hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE).commit


def test_a_push_killed_in_mid_upload_goes_on(hub, make_vector, name):
    vector = make_vector("delta", 21)
    hub.inject("POST .*/commit/main", 503, times=99, headers={"Retry-After": "30"})
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ALICE}
    command = [sys.executable, "-m", "optimer_hf", "push", str(vector), f"alice/{name}"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not hub.calls("POST .*/commit/main") and time.monotonic() < deadline:
        time.monotonic()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "vector.json" not in HfApi(token=ALICE).list_repo_files(f"alice/{name}")
    hub.faults.clear()
    hub.log.clear()
    hubs.push(vector, f"alice/{name}", token=ALICE)
    assert not hub.calls("POST /cas/v1/xorbs")
    assert "vector.json" in HfApi(token=ALICE).list_repo_files(f"alice/{name}")


def test_a_download_that_is_cut_goes_on(hub, make_vector, name, tmp_path):
    vector = make_vector("delta", 41)
    hubs.push(vector, f"alice/{name}", token=ALICE)
    hub.inject("GET /_cdn/", times=2, after_bytes=5000)
    home = str(tmp_path / "home")
    done = run_cli("pull", f"alice/{name}", tmp_path / "back", hub=hub, xet=False, HF_HOME=home)
    assert done.returncode == 0, done.stderr
    assert len(hub.calls("GET /_cdn/")) == 3
    assert weight_digests(tmp_path / "back") == weight_digests(vector)


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("hf_nobody", "alice/x", r"token is wrong or missing \(401\).*hf auth login"),
        ("hf_alice_read", "alice/x", r"403.*write"),
        (ALICE, "not a name", "no name of a repository"),
        (ALICE, "base", "expected a repository as name/repository"),
    ],
)
def test_a_refused_push_says_what_to_do(hub, make_vector, token, repo, said):
    with pytest.raises(HubError, match=said):
        hubs.push(make_vector("adapter"), repo, token=token, licence="mit")


def test_a_push_without_the_right_to_write_points_to_a_proposal(hub, make_vector, name):
    hubs.push(make_vector("adapter", 1), f"alice/{name}", token=ALICE)
    with pytest.raises(HubError, match=r"403.*--create-pr"):
        hubs.push(make_vector("adapter", 2), f"alice/{name}", token=BOB)


def test_a_refused_pull_says_what_to_do(hub, make_vector, name, tmp_path):
    with pytest.raises(HubError, match="404"):
        hubs.pull("alice/none-such", tmp_path / "out", token=ALICE)
    hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE)
    with pytest.raises(HubError, match="no such revision"):
        hubs.pull(f"alice/{name}@v9", tmp_path / "out", token=ALICE)
    HfApi(token=ALICE).update_repo_settings(f"alice/{name}", gated="auto")
    with pytest.raises(HubError, match=r"is gated \(403\)"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=BOB)
    assert not (tmp_path / "out").exists()


def test_a_renamed_repository_is_found_and_told(hub, make_vector, name, tmp_path, caplog):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE)
    HfApi(token=ALICE).move_repo(f"alice/{name}", f"alice/{name}-new")
    pulled = hubs.pull(f"alice/{name}", tmp_path / "back", token=ALICE)
    assert pulled.repo_id == f"alice/{name}-new"
    assert f"is called alice/{name}-new now" in caplog.text
    assert weight_digests(tmp_path / "back") == weight_digests(vector)


def test_a_card_that_cannot_be_read_now_is_not_overwritten(hub, make_vector, name):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE)
    _changed(vector, norm=5.0)
    hub.inject("(GET|HEAD) /alice/.*README.md", 503, times=99)
    with pytest.raises(HubError, match="the Hub answered 503"):
        hubs.push(vector, f"alice/{name}", token=ALICE)
    assert len(hub.calls("POST .*/commit/")) == 1
    hub.faults.clear()
    hub.inject("(GET|HEAD) /alice/.*README.md", 503, times=2)
    assert hubs.push(vector, f"alice/{name}", token=ALICE).sent


def test_a_pull_through_faults_ends_well_or_says_so(hub, make_vector, name, tmp_path):
    hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE)
    hub.inject("(GET|HEAD) /alice/.*vector.json", 503, times=99)
    with pytest.raises(HubError, match=r"503|cannot be reached|did not arrive"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)


# -- what a pull does not trust --------------------------------------------------------------------


def test_a_damaged_blob_is_refused_and_fetched_again(hub, make_vector, name, tmp_path):
    vector = make_vector("adapter", 31)
    hubs.push(vector, f"alice/{name}", token=ALICE)
    sha256 = weight_digests(vector)["adapter_model.safetensors"]
    blob = hub.materialize(sha256)
    right = blob.read_bytes()
    blob.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    env = {"HF_HOME": str(tmp_path / "home")}
    arguments = ("pull", f"alice/{name}", tmp_path / "back")
    done = run_cli(*arguments, hub=hub, xet=False, **env)
    assert done.returncode == 1
    assert "damaged" in done.stderr
    assert not (tmp_path / "back").exists()
    blob.write_bytes(right)
    assert run_cli(*arguments, hub=hub, xet=False, **env).returncode == 0


def test_a_moved_tag_is_refused_without_update(hub, make_recipe, name, tmp_path):
    folder = make_recipe()
    first = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True, tag="v1")
    out = tmp_path / "theirs"
    hubs.pull(f"alice/{name}@v1", out, token=ALICE)
    recipe = folder / "recipe.yaml"
    data = yaml.safe_load(recipe.read_text())
    data["vectors"]["v0"]["weight"] = 0.75
    recipe.write_text(yaml.safe_dump(data))
    lock = Lock.read(folder / "recipe.lock.json")
    weights = {"v0": 0.75, "v1": 0.25}
    lock.model_copy(update={"weights": weights}).write(folder / "recipe.lock.json")
    second = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    api = HfApi(token=ALICE)
    api.delete_tag(f"alice/{name}", tag="v1")
    api.create_tag(f"alice/{name}", tag="v1", revision=second.commit)
    with pytest.raises(HubError, match=rf"was pulled at {first.commit}.*--update"):
        hubs.pull(f"alice/{name}@v1", out, token=ALICE)
    moved = hubs.pull(f"alice/{name}@v1", out, token=ALICE, update=True).moved
    assert any("vectors.v0: 0.5 x " in line and "-> 0.75 x" in line for line in moved)
    assert Recipe.read(out / "recipe.yaml").weights == weights


def test_other_weights_behind_a_pinned_input_do_not_build(hub, make_recipe, name, tmp_path):
    folder = make_recipe("delta")
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    out = tmp_path / "theirs"
    hubs.pull(f"alice/{name}", out, token=ALICE)
    lock = json.loads((out / "recipe.lock.json").read_text())
    first = next(iter(lock["vectors"]["v0"]))
    lock["vectors"]["v0"][first] = "0" * 64
    (out / "recipe.lock.json").write_text(json.dumps(lock))
    with pytest.raises(ModelError, match=r"vectors\.v0: the weights .* not the locked ones"):
        build(out / "recipe.yaml", tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_a_repository_of_pickles_is_refused(hub, name, tmp_path):
    api = HfApi(token=ALICE)
    api.create_repo(f"alice/{name}")
    api.upload_file(
        path_or_fileobj=b"\x80\x04.", path_in_repo="pytorch_model.bin", repo_id=f"alice/{name}"
    )
    with pytest.raises(HubError, match="pickled weights only"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data | {"base_model": "/etc/passwd"}, "may not name local files"),
        (lambda data: data | {"base_model": "../../secret"}, "may not name local files"),
        (lambda data: data | {"base_model": "alice/base@main"}, "40-digit commit"),
        (lambda data: data | {"surprise": 1}, "unknown field 'surprise'"),
        (lambda data: data | {"vectors": {"v0": {"source": "hf://../x@y", "weight": 1}}}, "local"),
        (lambda data: BOMB, "aliases"),
        (lambda data: "x" * 2**21, "at most 1 MiB"),
        (lambda data: data | {"vectors": [1]}, "recipe"),
    ],
    ids=["absolute", "traversal", "unpinned", "unknown", "odd", "bomb", "oversized", "type"],
)
def test_a_hostile_recipe_is_refused(hub, make_recipe, name, tmp_path, change, said):
    hubs.push(make_recipe(), f"alice/{name}", token=ALICE, vectors=True)
    api = HfApi(token=ALICE)
    data = yaml.safe_load(Path(api.hf_hub_download(f"alice/{name}", "recipe.yaml")).read_text())
    changed = change(data)
    text = changed if isinstance(changed, str) else yaml.safe_dump(changed)
    api.upload_file(
        path_or_fileobj=text.encode(), path_in_repo="recipe.yaml", repo_id=f"alice/{name}"
    )
    with pytest.raises(OptimerError, match=said):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("recipe.lock.json", BOMB, "not valid JSON"),
        ("recipe.lock.json", "[" * 10**5, "nested too deeply"),
        ("recipe.yaml", "[" * 10**5, "nested too deeply|not valid YAML"),
        ("recipe.lock.json", '{"base": {}, "base": {}}', "given twice"),
    ],
    ids=["bomb", "deep-json", "deep-yaml", "twice"],
)
def test_a_hostile_file_is_refused(hub, make_recipe, name, tmp_path, file, text, said):
    hubs.push(make_recipe(), f"alice/{name}", token=ALICE, vectors=True)
    HfApi(token=ALICE).upload_file(
        path_or_fileobj=text.encode(), path_in_repo=file, repo_id=f"alice/{name}"
    )
    with pytest.raises(OptimerError, match=said) as raised:
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)
    assert "/tmp" not in str(raised.value) and f"alice/{name}" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_card_counts_as_small_and_is_refused_when_it_is_not(
    hub, make_vector, name, tmp_path, monkeypatch
):
    hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE)
    size = HfApi(token=ALICE).get_paths_info(f"alice/{name}", "README.md")[0].size
    monkeypatch.setattr(pulls, "LARGEST_TEXT", size - 1)
    with pytest.raises(HubError, match=rf"README\.md has {size} bytes, expected at most"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)


def test_a_model_with_other_weights_than_its_lock_is_refused(
    hub, make_recipe, name, tmp_path, monkeypatch
):
    folder = make_recipe("delta")
    hubs.push(folder, f"alice/{name}-r", token=ALICE, vectors=True)
    hubs.pull(f"alice/{name}-r", tmp_path / "recipe", token=ALICE)
    build(tmp_path / "recipe" / "recipe.yaml", tmp_path / "model")
    hubs.push(tmp_path / "model", f"alice/{name}", token=ALICE)
    other = (tmp_path / "delta-0" / "model.safetensors").read_bytes()
    HfApi(token=ALICE).upload_file(
        path_or_fileobj=other, path_in_repo="model.safetensors", repo_id=f"alice/{name}"
    )
    with pytest.raises(HubError, match=r"not those of its own recipe\.lock\.json"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"not those of its own recipe\.lock\.json"):
        hubs.pull(f"alice/{name}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_not_fetched(hub, make_vector, name, tmp_path, monkeypatch):
    hubs.push(make_vector("checkpoint", 41), f"alice/{name}", token=ALICE)
    usage = pulls.shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(pulls.shutil, "disk_usage", lambda path: usage)
    hub.log.clear()
    with pytest.raises(HubError, match=r"needs [\d,]+ bytes on the disk of .* 50,000 free"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)
    assert not hub.calls("model.safetensors")
    assert not (tmp_path / "out").exists()


def _two_versions(make_vector, name, out: Path) -> tuple[str, str]:
    """Push a vector, pull it to `out`, push a changed one; return both commits."""
    vector = make_vector("adapter")
    first = hubs.push(vector, f"alice/{name}", token=ALICE)
    hubs.pull(f"alice/{name}", out, token=ALICE)
    _changed(vector, norm=5.0)
    second = hubs.push(vector, f"alice/{name}", token=ALICE)
    return str(first.commit), str(second.commit)


def test_an_update_does_not_overwrite_edits(hub, make_vector, name, tmp_path):
    out = tmp_path / "out"
    _two_versions(make_vector, name, out)
    edited = (out / "adapter_config.json").read_text() + " "
    (out / "adapter_config.json").write_text(edited)
    with pytest.raises(HubError, match=r"adapter_config\.json changed here since the pull"):
        hubs.pull(f"alice/{name}", out, token=ALICE, update=True)
    assert (out / "adapter_config.json").read_text() == edited


def test_an_update_that_was_killed_is_finished(hub, make_vector, name, tmp_path, monkeypatch):
    out = tmp_path / "out"
    _, second = _two_versions(make_vector, name, out)
    old = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "mine.txt").write_text("mine")

    def killed(target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pulls, "_finish_update", killed)
        hubs.pull(f"alice/{name}", out, token=ALICE, update=True)
    assert {key: (out / key).read_bytes() for key in old} == old
    with pytest.raises(
        ModelError, match=rf"two commits\. Finish it: `optimer pull REPO {out} --up"
    ):
        resolve_model(str(out))
    assert hubs.pull(f"alice/{name}", out, token=ALICE, update=True).commit == second
    assert resolve_model(str(out)).path == out
    assert json.loads((out / "vector.json").read_text())["norm"] == 5.0
    assert json.loads((out / "hub.json").read_text())["commit"] == second
    assert {path.name for path in out.iterdir()} == {*old, "mine.txt"}


@pytest.mark.parametrize("lost", [[], ["hub.json"]])
def test_an_update_that_only_has_to_be_tidied_up_is_finished(
    hub, make_vector, name, tmp_path, monkeypatch, lost
):
    out = tmp_path / "out"
    _, second = _two_versions(make_vector, name, out)
    with monkeypatch.context() as patch:
        patch.setattr(pulls.shutil, "rmtree", lambda *_, **__: None)
        hubs.pull(f"alice/{name}", out, token=ALICE, update=True)
    assert not (out / ".update" / "hub.json").exists()
    for file in lost:  # with an update that is whole
        shutil.copytree(out, out / ".update", dirs_exist_ok=True, ignore=lambda *_: [".update"])
        (out / file).unlink()
    assert hubs.pull(f"alice/{name}", out, token=ALICE).commit == second
    assert json.loads((out / "hub.json").read_text())["commit"] == second
    assert not (out / ".update").exists()


def test_two_pulls_of_one_directory_do_not_mix(hub, make_vector, name, tmp_path):
    out = tmp_path / "out"
    _two_versions(make_vector, name, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with (
        hold_place(out, beside=out),
        pytest.raises(OutputError, match="out: another process is writing to it"),
    ):
        hubs.pull(f"alice/{name}", out, token=ALICE, update=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("file", ["../victim", "/etc/hosts", "notes.txt"])
def test_a_record_of_a_pull_cannot_name_other_files(hub, make_vector, name, tmp_path, file):
    out = tmp_path / "out"
    _two_versions(make_vector, name, out)
    record = json.loads((out / "hub.json").read_text())
    record["files"][file] = "0" * 64
    (out / "hub.json").write_text(json.dumps(record))
    (tmp_path / "victim").write_text("mine")
    with pytest.raises(OptimerError, match="is no file that a pull writes"):
        hubs.pull(f"alice/{name}", out, token=ALICE, update=True)
    assert (tmp_path / "victim").exists()


def test_an_update_does_not_follow_links_out_of_its_directory(hub, make_recipe, name, tmp_path):
    folder, out = make_recipe(), tmp_path / "out"
    (folder / "study").mkdir()
    (folder / "study" / "trials.jsonl").write_text('{"number": 0}\n')
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    hubs.pull(f"alice/{name}", out, token=ALICE)
    (out / "study").rename(tmp_path / "elsewhere")
    (out / "study").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HubError, match="lies behind a link"):
        hubs.pull(f"alice/{name}", out, token=ALICE, update=True)


def test_code_in_a_repository_is_neither_fetched_nor_run_and_named_by_a_build(
    hub, make_recipe, name, tmp_path
):
    folder = make_recipe("checkpoint")
    config = tmp_path / "checkpoint-0" / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps(data | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass Evil: pass\n"
    HfApi(token=ALICE).upload_file(
        path_or_fileobj=code.encode(), path_in_repo="evil.py", repo_id=f"alice/{name}-v0"
    )
    hubs.pull(f"alice/{name}-v0", tmp_path / "vector", token=ALICE)
    hubs.pull(f"alice/{name}", tmp_path / "theirs", token=ALICE)
    with pytest.raises(ModelError, match=r"config\.json: `auto_map` names code in the model"):
        build(tmp_path / "theirs" / "recipe.yaml", tmp_path / "built")
    assert not (tmp_path / "vector" / "evil.py").exists()
    assert not ran.exists()
    assert not (tmp_path / "built").exists()


def test_a_pull_and_a_build_work_offline_from_the_cache(
    hub, make_recipe, name, tmp_path, monkeypatch
):
    hubs.push(make_recipe("delta"), f"alice/{name}", token=ALICE, vectors=True)
    hubs.pull(f"alice/{name}", tmp_path / "online", token=ALICE)
    build(tmp_path / "online" / "recipe.yaml", tmp_path / "first")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    hubs.pull(f"alice/{name}", tmp_path / "offline")
    build(tmp_path / "offline" / "recipe.yaml", tmp_path / "second")
    assert weight_digests(tmp_path / "second") == weight_digests(tmp_path / "first")
    assert not hub.log
    with pytest.raises(HubError, match="not in the cache"):
        hubs.pull("alice/never-seen", tmp_path / "other")


def test_a_second_pull_changes_nothing_and_foreign_files_are_kept(hub, make_vector, name, tmp_path):
    hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE)
    out = tmp_path / "back"
    first = hubs.pull(f"alice/{name}", out, token=ALICE)
    assert hubs.pull(f"alice/{name}", out, token=ALICE).commit == first.commit
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(OptimerError, match="not empty"):
        hubs.pull(f"alice/{name}", tmp_path / "mine", token=ALICE)


def test_no_token_is_in_any_file(hub, make_recipe, name, tmp_path):
    folder = make_recipe()
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    hubs.pull(f"alice/{name}", tmp_path / "theirs", token=ALICE)
    for path in [*folder.rglob("*"), *(tmp_path / "theirs").rglob("*")]:
        assert not path.is_file() or ALICE.encode() not in path.read_bytes()


def test_recipes_on_the_hub_are_listed_by_their_tag(hub, make_recipe, name):
    hubs.push(make_recipe(), f"alice/{name}", token=ALICE, vectors=True)
    listed = dict(hubs.recipes(token=ALICE))
    assert f"alice/{name}" in listed
    assert f"alice/{name}-v0" not in listed


def test_a_directory_of_nothing_of_ours_is_refused(tmp_path, save_model):
    with pytest.raises(HubError, match=r"neither vector\.json nor recipe\.yaml"):
        publication(save_model(tiny_model()))


def test_the_command_line_lists_and_shows(hub, make_recipe, name, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from optimer_hf.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    (tmp_path / "recipes" / "mine").mkdir(parents=True)
    (tmp_path / "recipes" / "mine" / "study.yaml").write_text("")
    folder, token = make_recipe(), ["--token", ALICE]
    shown = CliRunner().invoke(
        main, ["push", str(folder), f"alice/{name}", "--vectors", "--dry-run", *token]
    )
    assert "would send 5 files" in shown.output
    assert f"to alice/{name}; nothing was sent" in shown.output
    pushed = CliRunner().invoke(
        main, ["push", str(folder), f"alice/{name}", "--vectors", "--format", "json", *token]
    )
    assert json.loads(pushed.stdout)["vectors"][0]["repo_id"] == f"alice/{name}-v0"
    again = CliRunner().invoke(main, ["push", str(folder), f"alice/{name}", "--vectors", *token])
    assert again.output.count("has everything already") == 3
    listed = CliRunner().invoke(main, ["recipes", "list", *token])
    assert "recipes/mine: run it with" in listed.output
    assert f"optimer pull alice/{name}" in listed.output
    pulled = CliRunner().invoke(main, ["pull", f"hf://alice/{name}", *token])
    assert "licence gemma" in pulled.output
    assert f"build it: optimer build {name}/recipe.yaml OUT" in pulled.output


def test_a_pulled_study_is_retargeted_without_its_data(hub, make_recipe, name, tmp_path):
    """The record travels with a recipe: its study opens where neither data nor vectors are."""
    from optimer_hf.study.config import StudyConfig
    from optimer_hf.study.directory import load_study
    from optimer_hf.study.trials import Trial

    folder = make_recipe()
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    config = StudyConfig.model_validate(
        {
            "base_model": recipe["base_model"],
            "vectors": {key: {"source": v["source"]} for key, v in recipe["vectors"].items()},
            "objective": {"terms": [{"text": str(tmp_path / "ja.jsonl"), "name": "ja"}]},
            "search": {"n_trials": 4, "rescore_top": 0},
        }
    )
    (folder / "study").mkdir()
    (folder / "study" / "study.json").write_text(config.model_dump_json(indent=2))
    term = {"items": [(1.0, 2.0)], "higher_is_better": False, "n_tokens": 3}
    with open(folder / "study" / "trials.jsonl", "w") as file:
        for number in range(4):
            weights = {"v0": 0.1 * number, "v1": 0.2 * (number > 0)}
            trial = {
                "number": number,
                "origin": "search",
                "fidelity": "search",
                "weights": weights,
                "status": "ok",
                "terms": {"ja": term},
                "seconds": {},
                "worker": "tcp://node7:1",
            }
            file.write(json.dumps(trial) + "\n")
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    hubs.pull(f"alice/{name}", tmp_path / "theirs", token=ALICE)
    study = tmp_path / "theirs" / "study"
    assert "node7" not in (study / "trials.jsonl").read_text()
    assert str(tmp_path) not in (study / "study.json").read_text()
    opened = load_study(study)
    assert [trial.weights["v1"] for trial in opened.log.trials] == [0.0, 0.2, 0.2, 0.2]
    assert isinstance(opened.log.trials[0], Trial)


class FunctionPool(landscapes.FunctionPool):
    """Scores two weights."""

    def score(self, weights, asked):
        return super().score(dict(weights) | {"y": 0.0, "z": 0.0}, asked)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A real search over two vectors, and the folder of its figures."""
    folder = tmp_path_factory.mktemp("drawn")
    vectors = {name: {"source": f"a/{name}"} for name in ("v0", "v1")}
    config = landscapes.config_of(vectors=vectors, search={"n_trials": 5, "rescore_top": 0})
    study = search(config, folder / "search", runner=InProcess(FunctionPool))
    write_figures(study, folder / "figures")
    return study, folder / "figures"


@pytest.fixture
def drawn_recipe(drawn, make_recipe) -> Path:
    """The folder of a recipe of what a search found, with its figures."""
    study, figures = drawn
    folder = make_recipe("delta", tuple(study.best_trial.weights.values()))
    shutil.copytree(figures, folder / "figures")
    return folder


def test_figures_travel_with_a_recipe_and_stand_in_its_card(hub, drawn_recipe, name, tmp_path):
    folder = drawn_recipe
    (folder / "figures" / "notes.png").write_text("mine")
    captions = Captions.read(folder / "figures" / "captions.json")
    kept = {name: text for name, text in captions.captions.items() if name != "front"}
    captions.model_copy(update={"captions": kept}).write(folder / "figures" / "captions.json")
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    there = HfApi(token=ALICE).list_repo_files(f"alice/{name}")
    drawn = ["captions.json", "progress.png", "slices.png", "terms.png", "weights.png"]
    assert sorted(f for f in there if "/" in f) == [f"figures/{file}" for file in drawn]
    hubs.pull(f"alice/{name}", tmp_path / "theirs", token=BOB)
    card = (tmp_path / "theirs" / "README.md").read_text()
    texts = Captions.read(folder / "figures" / "captions.json").captions
    for file in drawn[1:]:
        said = texts[file.removesuffix(".png")].conclusion
        assert f"![{said.replace('`', chr(92) + '`')}](figures/{file})" in card
        written = (folder / "figures" / file).read_bytes()
        assert (tmp_path / "theirs" / "figures" / file).read_bytes() == written


def test_figures_that_were_drawn_again_are_not_sent_again(hub, drawn, drawn_recipe, name):
    folder = drawn_recipe
    first = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    shutil.rmtree(folder / "figures")
    write_figures(drawn[0], folder / "figures")
    second = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert (second.commit, second.sent, second.deleted) == (first.commit, {}, ())
    assert "figures/weights.png" in second.unchanged


def test_a_built_model_takes_the_figures_of_its_recipe_along(hub, drawn_recipe, name, tmp_path):
    folder = drawn_recipe
    build(folder / "recipe.yaml", tmp_path / "model")
    done = hubs.push(tmp_path / "model", f"alice/{name}", token=ALICE, vectors=True)
    assert "(figures/weights.png)" in done.card
    assert {"figures/weights.png", "figures/captions.json"} <= done.sent.keys()


def test_figures_of_another_merge_stay_at_home(hub, drawn_recipe, name, caplog):
    folder = drawn_recipe
    captions = folder / "figures" / "captions.json"
    Captions.read(captions).model_copy(update={"weights": {"v0": 1.0, "v1": 0.0}}).write(captions)
    done = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert not any(file.startswith("figures/") for file in done.sent)
    assert "figures/" not in done.card
    assert "is of other weights than recipe.yaml" in caplog.text


def test_a_torn_record_is_pushed_without_its_torn_line(make_recipe, make_vector):
    folder = make_recipe()
    (folder / "study").mkdir()
    crash = {"number": 1, "worker": "tcp://node7:1", "error": "RuntimeError: on node7\nTraceback"}
    lines = [json.dumps({"number": 0, "error": "  "}), json.dumps(crash), '{"number": 2, "wei']
    (folder / "study" / "trials.jsonl").write_text("\n".join(lines))
    pushed = {f"v{n}": f"alice/v{n}@{'0' * 40}" for n in range(2)}
    written = publication(folder, pushed).text("study/trials.jsonl").splitlines()
    assert [json.loads(line)["error"] for line in written] == [None, "RuntimeError"]
    (folder / "study" / "trials.jsonl").write_text("\n".join([lines[2], lines[0]]))
    with pytest.raises(HubError, match="line 1 is no trial"):
        publication(folder, pushed)
