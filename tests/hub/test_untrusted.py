"""What comes from others is validated before it is put in place."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants

from optimer_hf import hub as hubs
from optimer_hf.errors import HubError, OptimerError
from optimer_hf.recipes.build import build
from tests.support.hub import ALICE

BOMB = "a0: &a0 x\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data | {"base_model": "/etc/passwd"}, "may not name local files"),
        (lambda data: data | {"base_model": "../../secret"}, "may not name local files"),
        (lambda data: data | {"base_model": "alice/base@main"}, "40-digit commit"),
        (lambda data: data | {"surprise": 1}, "unknown field 'surprise'"),
        (lambda data: data | {"vectors": {"v0": {"source": "hf://../x@y", "weight": 1}}}, "local"),
        (lambda data: BOMB, "stands for more than 100,000 values"),
        (lambda data: "x" * 2**21, "has more than 1,048,576 bytes"),
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
    with pytest.raises(HubError, match=r"not those in its own recipe\.lock\.json"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=ALICE)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"not those in its own recipe\.lock\.json"):
        hubs.pull(f"alice/{name}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
