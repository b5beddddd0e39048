"""Pulling, against a real Hub server: what a pull does not trust, and what it leaves alone."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants

from optimer_hf import hub as hubs
from optimer_hf.errors import HubError, ModelError, OptimerError, OutputError
from optimer_hf.files.locks import hold_place
from optimer_hf.hub import pulling as pulls
from optimer_hf.models.layout import weight_digests
from optimer_hf.models.resolve import resolve_model
from optimer_hf.recipes.build import build
from optimer_hf.recipes.record import VANILLA_CONFIG, Lock, Recipe
from optimer_hf.recipes.write import refuse_foreign_files, write_recipe
from optimer_hf.study.config import StudyConfig
from tests.support.hub import ALICE, change_record, run_cli


def test_a_download_that_was_cut_resumes(hub, make_vector, name, tmp_path):
    vector = make_vector("delta", 41)
    hubs.push(vector, f"alice/{name}", token=ALICE)
    hub.inject("GET /_cdn/", times=2, after_bytes=5000)
    home = str(tmp_path / "home")
    done = run_cli("pull", f"alice/{name}", tmp_path / "back", hub=hub, xet=False, HF_HOME=home)
    assert done.returncode == 0, done.stderr
    assert len(hub.calls("GET /_cdn/")) == 3
    assert weight_digests(tmp_path / "back") == weight_digests(vector)


def test_a_pull_through_faults_ends_well_or_says_so(hub, make_vector, name, tmp_path):
    hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE)
    hub.inject("(GET|HEAD) /alice/.*vector.json", 503, times=99)
    with pytest.raises(HubError, match=r"503|cannot be reached|did not arrive"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)


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
    with pytest.raises(HubError, match="only pickled weights"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)


def test_a_card_counts_as_small_and_is_refused_when_it_is_not(
    hub, make_vector, name, tmp_path, monkeypatch
):
    hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE)
    size = HfApi(token=ALICE).get_paths_info(f"alice/{name}", "README.md")[0].size
    monkeypatch.setattr(pulls, "LARGEST_TEXT", size - 1)
    with pytest.raises(HubError, match=rf"README\.md has {size} bytes, expected at most"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)


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
    change_record(vector, norm=5.0)
    second = hubs.push(vector, f"alice/{name}", token=ALICE)
    return str(first.commit), str(second.commit)


def test_an_update_does_not_overwrite_edits(hub, make_vector, name, tmp_path):
    out = tmp_path / "out"
    _two_versions(make_vector, name, out)
    edited = (out / "adapter_config.json").read_text() + " "
    (out / "adapter_config.json").write_text(edited)
    with pytest.raises(HubError, match=r"adapter_config\.json was edited here since the pull"):
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
    with pytest.raises(OptimerError, match="is not a file that a pull writes"):
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
    with pytest.raises(HubError, match="is behind a link"):
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


def test_a_pulled_study_opens_without_its_data_and_its_recipe_is_written_again(
    hub, make_recipe, name, tmp_path
):
    """The record travels with a recipe: its study opens where neither data nor vectors are."""
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
    theirs = tmp_path / "theirs" / "recipe.yaml"
    plain = theirs.with_name(VANILLA_CONFIG)
    assert plain.read_text().startswith("# Run: mergekit-yaml ")
    refuse_foreign_files(theirs.with_name("second.yaml"))  # what lies beside it is ours
    write_recipe(opened, theirs, name="again", pick=opened.log.trials[1])
    models = yaml.safe_load(plain.read_text())["models"]
    assert [each["parameters"]["weight"] for each in models][-2:] == [0.1, 0.2]
