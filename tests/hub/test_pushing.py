"""Pushing, against a real Hub server (tests/support/minihub) with the real client."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

from optimer_hf import hub as hubs
from optimer_hf.errors import HubError
from optimer_hf.files.digest import sha256_file
from optimer_hf.hub import pushing as pushes
from optimer_hf.hub.card import split_card
from optimer_hf.models.layout import weight_digests
from optimer_hf.recipes.build import build, verify
from optimer_hf.report.captions import (
    CAPTIONS,
    CARD_FIGURES,
    Captions,
    dark_file,
    light_file,
)
from optimer_hf.report.page import write_figures
from tests.support.hub import ALICE, BOB, change_record
from tests.support.publishing import results_of_row


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


@pytest.mark.parametrize("kind", ["delta", "adapter", "checkpoint"])
def test_unmodified_mergekit_runs_the_command_of_the_card(hub, make_recipe, name, tmp_path, kind):
    folder = make_recipe(kind)
    build(folder / "recipe.yaml", tmp_path / "mine")
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    hubs.pull(f"alice/{name}", tmp_path / "merge", token=ALICE)
    config = tmp_path / "merge" / "mergekit_config.yml"
    text = config.read_text()
    assert f"alice/{name}-v0@" in text
    (command,) = re.findall(r"`(mergekit-yaml .*)`", (config.parent / "README.md").read_text())
    in_file = text.splitlines()[0].replace(config.name, f"merge/{config.name}")
    assert in_file.replace(" OUT", " merged") == f"# Run: {command}"
    scripts = Path(sys.executable).parent
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ALICE}
    env["PATH"] = f"{scripts}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        shlex.split(command), env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ours = load_file(tmp_path / "mine" / "model.safetensors")
    theirs = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    assert ours.keys() == theirs.keys()
    same = [(ours[key] == theirs[key]).float().mean() for key in ours]
    assert min(same) > 0.999  # both round once, from float32


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
    assert "license: gemma" in done.card and not done.unchecked
    assert not hub.calls("^(POST|PUT) ")


@pytest.fixture(params=["offline", "unreachable", "no token"])
def silent_hub(hub, request, monkeypatch):
    """A Hub that says nothing about a repository; returns the reason."""
    if request.param == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return "HF_HUB_OFFLINE is set"
    if request.param == "no token":
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        return "no token, or a wrong one"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return "the Hub cannot be reached"


@pytest.mark.parametrize("options", [{}, {"licence": "mit"}, {"at": {"v0": "alice/zero"}}])
def test_a_dry_run_needs_no_hub_and_says_what_it_did_not_ask(
    make_recipe, name, silent_hub, options
):
    folder, repo_id = make_recipe("adapter"), f"alice/{name}"
    token = None if silent_hub.startswith("no token") else ALICE
    if token is None:  # what others have is public
        options = {key: value for key, value in options.items() if key != "at"}
    done = hubs.push(folder, repo_id, token=token, vectors=True, dry_run=True, **options)
    sent = [part.repo_id for part in (*done.vectors, done)]
    ours = [f"{repo_id}-v0"] * ("at" not in options) + [f"{repo_id}-v1", repo_id]
    assert sent == ours and "recipe.yaml" in done.sent and done.commit is None
    licence = options.get("licence") or ("gemma" if token is None else None)
    assert split_card(done.card)[0].get("license") == licence
    commits, first, *others = done.unchecked
    places = [options["at"]["v0"] if "at" in options else f"{repo_id}-v0", f"{repo_id}-v1"]
    assert (
        commits
        == f"the commits of {', '.join(places)}, for which the card has {'0' * 40} until the push"
    )
    assert all(f"{place}@{'0' * 40}" in done.card for place in places)
    assert first == f"whether {repo_id} is new, and you may write to it ({silent_hub})"
    inputs = "alice/base, alice/zero" if "at" in options else "alice/base"
    seen = f"whether others can see {inputs}, and under which licences ({silent_hub})"
    unlicensed = (
        "which licence the card names: without --license, that of the card on the Hub, or of the "
        f"inputs; a push that finds none is refused ({silent_hub})"
    )
    licence_line = [unlicensed] * ("licence" not in options)
    weights = ["whether alice/zero have the weights of v0"] * ("at" in options)
    assert others == ([] if token is None else [seen, *licence_line, *weights])
    parts = [unlicensed in part.unchecked for part in done.vectors]
    assert parts == [token is not None and "licence" not in options] * len(parts)


def test_a_dry_run_of_an_unknown_input_and_a_push_still_need_the_hub(
    hub, make_recipe, name, monkeypatch
):
    folder = make_recipe("adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="found no input of that name"):
        hubs.push(folder, f"alice/{name}", at={"v9": "alice/nine"}, dry_run=True)
    with pytest.raises(HubError, match="the Hub is offline"):
        hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("token", "namespace", "said"),
    [
        (BOB, "alice", r"bob may not write to 'alice', only to bob\. .*\(`hf auth login`\)\.$"),
        (ALICE, "bob", r"alice may not write to 'bob', only to alice, acme\."),
        ("hf_alice_read", "alice", "the token of alice is for reading only"),
        (ALICE, "acme", None),
        (ALICE, "Alice", None),  # the Hub does not tell case apart
        ("hf_reader", "acme", r"carol may not write to 'acme', only to carol\."),
        ("hf_member", "acme", None),  # a resource group gives more than the organisation
    ],
)
def test_a_push_that_may_not_write_is_refused_before_any_work(
    hub, make_vector, name, monkeypatch, token, namespace, said, dry_run
):
    carol = {"name": "carol", "orgs": {"acme": "read"}, "role": "write"}
    monkeypatch.setitem(hub.tokens, "hf_reader", carol | {"groups": {"acme": {"a": "read"}}})
    groups = {"groups": {"acme": {"a": "read", "b": "write"}}}
    monkeypatch.setitem(hub.tokens, "hf_member", carol | groups)
    begun = []
    monkeypatch.setattr(pushes, "choose_files", lambda *_: begun.append(1) or pytest.skip("began"))
    before = len(hub.calls("."))
    if said is None:
        with pytest.raises(pytest.skip.Exception):
            hubs.push(make_vector("adapter"), f"{namespace}/{name}", token=token, dry_run=dry_run)
        assert begun
        return
    with pytest.raises(HubError, match=said):
        hubs.push(make_vector("adapter"), f"{namespace}/{name}", token=token, dry_run=dry_run)
    assert not begun
    assert all(call.method == "GET" for call in hub.calls(".")[before:])
    with pytest.raises(HfHubHTTPError):  # as the Hub itself would say, once it has the files
        HfApi(token=token).create_repo(f"{namespace}/{name}")


def test_without_a_token_a_push_is_refused_before_any_work(hub, make_vector, name, monkeypatch):
    monkeypatch.setattr(pushes, "choose_files", lambda *_: pytest.fail("it began"))
    with pytest.raises(HubError, match=r"token is wrong or missing \(401\)\. Log in"):
        hubs.push(make_vector("adapter"), f"alice/{name}", token="hf_nobody")


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 503}, {"drop": True}], ids=str)
@pytest.mark.parametrize("private", [False, True], ids=["public", "private"])
def test_a_dry_run_that_cannot_ask_who_one_is_differs_by_one_line(
    hub, make_recipe, name, fault, private
):
    folder, repo_id = make_recipe("adapter"), f"alice/{name}"
    hubs.push(folder, repo_id, token=ALICE, vectors=True, private=private)
    usual = hubs.push(folder, repo_id, token=ALICE, vectors=True, dry_run=True)
    assert usual.unchanged
    hub.inject("GET /api/whoami-v2", times=99, **fault)
    try:
        done = hubs.push(folder, repo_id, token=ALICE, vectors=True, dry_run=True)
    finally:
        hub.faults.clear()
    *others, line = done.unchecked
    assert line.startswith("whether you may write to 'alice' (the Hub does not say")
    assert replace(done, unchecked=tuple(others)) == usual


def test_a_dry_run_without_a_token_reads_the_card_of_a_public_repository(
    hub, make_vector, name, monkeypatch
):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE, licence="mit")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = hubs.push(vector, f"alice/{name}", dry_run=True)
    assert (done.sent, split_card(done.card)[0]["license"]) == ({}, "mit")
    assert done.unchecked == ("whether you may write to 'alice' (no token, or a wrong one)",)


def test_whoami_is_asked_again_after_a_passing_fault(hub, make_vector, name):
    hub.inject("GET /api/whoami-v2", 503, times=2)
    done = hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE, dry_run=True)
    assert not done.unchecked


def test_a_proposal_to_nothing_is_not_told_to_propose(hub, make_vector, name):
    with pytest.raises(HubError, match=r"no such repository to propose a change to") as caught:
        hubs.push(make_vector("adapter"), f"alice/{name}", token=BOB, create_pr=True)
    assert "--create-pr" not in str(caught.value)


def test_a_refused_proposal_is_not_told_to_propose(hub, make_vector, name):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE)
    change_record(vector, name="other")
    hub.inject("POST .*/commit/", 403, body="pull requests are off")
    with pytest.raises(HubError, match=r"the token may not do this \(403") as caught:
        hubs.push(vector, f"alice/{name}", token=BOB, create_pr=True)
    assert "--create-pr" not in str(caught.value)


def test_a_proposal_needs_no_right_to_write(hub, make_vector, name):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE)
    change_record(vector, name="other")
    done = hubs.push(vector, f"alice/{name}", token=BOB, create_pr=True)
    assert done.pull_request


def test_the_card_of_a_recipe_shows_the_results_beside_it(hub, make_recipe, name):
    folder = make_recipe("delta")
    results_of_row("mine").write(folder / "results.json")
    done = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True, dry_run=True)
    assert "Gain over the base on the sealed test:\n\n| weights | mine (6 items) |" in done.card
    row = "| mine (chosen after the seal was opened) | +20.00 % | +10.00 % |"
    assert row in done.card.replace("\N{NO-BREAK SPACE}", " ")


def test_what_people_write_into_the_card_is_kept(hub, make_vector, name):
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


def test_a_local_or_unpinned_input_is_refused(hub, make_recipe, name):
    folder = make_recipe()
    with pytest.raises(HubError, match=r"vectors\.v0\.source: .* is on this machine.*--vectors"):
        hubs.push(folder, f"alice/{name}", token=ALICE)
    recipe = folder / "recipe.yaml"
    data = yaml.safe_load(recipe.read_text()) | {"base_model": "alice/base"}
    recipe.write_text(yaml.safe_dump(data))
    with pytest.raises(HubError, match=r"base_model: 'alice/base' is not pinned"):
        hubs.push(folder, f"alice/{name}", token=ALICE)


def test_a_path_on_this_machine_or_a_token_is_refused(hub, make_vector, name):
    vector = make_vector("adapter")
    config = vector / "adapter_config.json"
    clean = json.loads(config.read_text())
    config.write_text(json.dumps(clean | {"base_model_name_or_path": str(vector)}, indent=2))
    with pytest.raises(HubError, match=r"adapter_config\.json: line \d+: contains a path on this"):
        hubs.push(vector, f"alice/{name}", token=ALICE)
    config.write_text(json.dumps(clean | {"revision": "hf_" + "a" * 34}, indent=2))
    with pytest.raises(HubError, match=r"contains a token \(hf_aaa\.\.\.\)"):
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
    with pytest.raises(HubError, match="is private, so others could not build a public recipe"):
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
    with pytest.raises(HubError, match="is private, so others could not build a public recipe"):
        hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert not HfApi(token=ALICE).repo_exists(f"alice/{name}")


def test_an_unclear_licence_has_to_be_given(hub, make_vector, name, make_base):
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
    with pytest.raises(HubError, match=r"the inputs do not determine the licence .* --license"):
        hubs.push(vector, f"alice/{name}", token=ALICE)
    assert hubs.push(vector, f"alice/{name}", token=ALICE, licence="mit").commit


def test_a_repository_of_another_kind_or_visibility_is_refused(hub, make_vector, make_recipe, name):
    hubs.push(make_vector("adapter", 7), f"alice/{name}", token=ALICE)
    with pytest.raises(HubError, match="contains a vector, and this is a recipe"):
        hubs.push(make_recipe(), f"alice/{name}", token=ALICE, vectors=True)
    with pytest.raises(HubError, match="is public, and --private was given"):
        hubs.push(make_vector("adapter", 8), f"alice/{name}", token=ALICE, private=True)


def test_a_tag_comes_last_and_does_not_move(hub, make_vector, name):
    vector = make_vector("adapter")
    first = hubs.push(vector, f"alice/{name}", token=ALICE, tag="v1.0")
    order = [record.path for record in hub.calls("POST .*/(commit|tag)/")]
    assert "/commit/" in order[0] and "/tag/" in order[-1]
    assert hubs.push(vector, f"alice/{name}", token=ALICE, tag="v1.0").commit == first.commit
    record = json.loads((vector / "vector.json").read_text())
    (vector / "vector.json").write_text(json.dumps(record | {"norm": 5.0}))
    with pytest.raises(HubError, match=r"tag 'v1\.0' is already at .*, and a push does not move"):
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


def test_a_proposal_is_made_once(hub, make_vector, make_recipe, name):
    vector = make_vector("adapter", 3)
    hubs.push(vector, f"alice/{name}", token=ALICE)
    change_record(vector, norm=5.0)
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


def test_another_model_is_not_replaced_and_a_licence_file_is_kept(
    hub, make_vector, name, published_base
):
    vector = make_vector("checkpoint")
    with pytest.raises(HubError, match=r"contains another model \(config\.json"):
        hubs.push(vector, "alice/base", token=ALICE)
    hubs.push(vector, f"alice/{name}", token=ALICE)
    api = HfApi(token=ALICE)
    api.upload_file(path_or_fileobj=b"terms", path_in_repo="LICENSE", repo_id=f"alice/{name}")
    (vector / "generation_config.json").unlink()
    done = hubs.push(vector, f"alice/{name}", token=ALICE)
    assert done.deleted == ("generation_config.json",)
    assert "LICENSE" in api.list_repo_files(f"alice/{name}")


def test_a_licence_that_was_given_once_is_kept(hub, make_vector, name, caplog):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE, licence="mit")
    assert "--license says mit, but its inputs are under gemma" in caplog.text
    change_record(vector, norm=5.0)
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
    assert "| ja | bits per byte | 1.5000 |" in again.card
    assert split_card(again.card)[0]["base_model"] == ["alice/base", f"alice/{name}-v0"]


def test_vectors_are_private_if_the_account_makes_the_recipe_private(hub, make_recipe, name):
    """The recipe exists already and is private; its vectors follow it without --private."""
    HfApi(token=ALICE).create_repo(f"alice/{name}", private=True)
    folder = make_recipe()
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert HfApi(token=ALICE).model_info(f"alice/{name}-v1").private
    again = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True, dry_run=True)
    assert not any(each.sent for each in again.vectors)


def test_nothing_is_sent_if_one_vector_cannot_be_sent(hub, make_recipe, name, tmp_path):
    folder = make_recipe("delta")
    config = tmp_path / "delta-1" / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps(data | {"tokenizer_file": "/scratch/ann/gemma"}))
    with pytest.raises(HubError, match=r"tokenizer_file: contains a path \(/scratch/ann/gemma\)"):
        hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    config.write_text(json.dumps(data))
    (tmp_path / "delta-0" / "vector.json").unlink()
    with pytest.raises(HubError, match=r"vectors\.v0: .* has no vector\.json"):
        hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert not hub.calls("POST .*/(commit|repos/create)")


@pytest.mark.parametrize("kind", ["recipe", "vector"])
def test_a_card_that_cannot_be_written_stops_a_push_before_anything_is_sent(
    hub, make_recipe, name, monkeypatch, kind
):
    original = pushes._render_card

    def fail(repo_id, publication, *rest):
        if publication.kind == kind:
            raise HubError(f"{repo_id}: no card")
        return original(repo_id, publication, *rest)

    monkeypatch.setattr(pushes, "_render_card", fail)
    with pytest.raises(HubError, match="no card"):
        hubs.push(make_recipe(), f"alice/{name}", token=ALICE, vectors=True)
    assert not hub.calls("POST .*/(commit|repos/create)")


def test_two_people_who_push_at_once_lose_nothing(hub, make_vector, name, monkeypatch, caplog):
    hubs.push(make_vector("adapter", 1), f"alice/{name}", token=ALICE)
    api, original = HfApi(token=ALICE), pushes._changes
    calls = []

    def changes(*arguments):
        operations = original(*arguments)
        if not calls:
            api.create_commit(
                f"alice/{name}",
                [CommitOperationAdd("theirs.md", b"meanwhile")],
                commit_message="another person",
            )
        calls.append(1)
        return operations

    monkeypatch.setattr(pushes, "_changes", changes)
    done = hubs.push(make_vector("adapter", 2), f"alice/{name}", token=ALICE)
    assert len(calls) == 2
    assert "somebody else has pushed" in caplog.text
    there = api.list_repo_files(f"alice/{name}", revision=done.commit)
    assert {"theirs.md", "vector.json"} <= set(there)


def test_a_push_that_was_killed_resumes(hub, make_vector, name):
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


def test_a_card_that_cannot_be_read_now_is_not_overwritten(hub, make_vector, name):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE)
    change_record(vector, norm=5.0)
    hub.inject("(GET|HEAD) /alice/.*README.md", 503, times=99)
    with pytest.raises(HubError, match="the Hub answered 503"):
        hubs.push(vector, f"alice/{name}", token=ALICE)
    assert len(hub.calls("POST .*/commit/")) == 1
    hub.faults.clear()
    hub.inject("(GET|HEAD) /alice/.*README.md", 503, times=2)
    assert hubs.push(vector, f"alice/{name}", token=ALICE).sent


def test_figures_are_pushed_with_a_recipe_and_shown_in_its_card(hub, drawn_recipe, name, tmp_path):
    folder = drawn_recipe
    (folder / "figures" / "notes.png").write_text("mine")
    captions = Captions.read(folder / "figures" / "captions.json")
    kept = {name: text for name, text in captions.captions.items() if name != "front"}
    captions.model_copy(update={"captions": kept}).write(folder / "figures" / "captions.json")
    hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    there = HfApi(token=ALICE).list_repo_files(f"alice/{name}")
    shown = [name for name in CARD_FIGURES if name in kept]
    assert {"progress", "slices", "terms", "weights"} == set(shown)
    files = {of(name) for name in shown for of in (light_file, dark_file)}
    assert {f for f in there if "/" in f} == files | {CAPTIONS}
    hubs.pull(f"alice/{name}", tmp_path / "theirs", token=BOB)
    card = (tmp_path / "theirs" / "README.md").read_text()
    texts = Captions.read(folder / "figures" / "captions.json").captions
    for figure in shown:
        assert texts[figure].shows.replace("`", chr(92) + "`")[:60] in card
        for of, mode in ((light_file, "light"), (dark_file, "dark")):
            assert f"]({of(figure)}#hf-{mode}-mode-only)" in card
            written = (folder / of(figure)).read_bytes()
            assert (tmp_path / "theirs" / of(figure)).read_bytes() == written


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
    assert "(figures/weights.png#hf-light-mode-only)" in done.card
    assert {
        "figures/weights.png",
        "figures/weights-dark.png",
        "figures/captions.json",
    } <= done.sent.keys()


def test_figures_of_another_merge_are_not_pushed(hub, drawn_recipe, name, caplog):
    folder = drawn_recipe
    captions = folder / "figures" / "captions.json"
    Captions.read(captions).model_copy(update={"weights": {"v0": 1.0, "v1": 0.0}}).write(captions)
    done = hubs.push(folder, f"alice/{name}", token=ALICE, vectors=True)
    assert not any(file.startswith("figures/") for file in done.sent)
    assert "figures/" not in done.card
    assert "belongs to other weights than recipe.yaml" in caplog.text
