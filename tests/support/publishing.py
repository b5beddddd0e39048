"""Fixtures for the tests of the Hub: a base on the server, and vectors and recipes to push."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants

from optimer_hf.comparison.results_file import Results
from optimer_hf.models.layout import weight_digests
from optimer_hf.models.resolve import resolve_model
from optimer_hf.recipes.record import Lock
from optimer_hf.vectors.delta import extract, write_record
from optimer_hf.vectors.opening import open_vector
from tests.support.hub import ALICE


@pytest.fixture(scope="module")
def published_base(make_base):
    """alice/base: a tiny model with a licence, on the server; returns its pinned reference."""

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


def results_of_row(name: str) -> Results:
    """The results of the base and of a row with a name."""
    base = {
        **{"kind": "base", "subject": "", "weights": {}, "chosen_after_seal": False, "value": 0.0},
        **{"over_base": {"difference": 0.0}, "merge_minus": {"difference": 0.0}},
        "terms": {name: {"score": 1.25, "n_items": 6, "gain": {"difference": 0.0}}},
    }
    term = {"score": 1.0, "n_items": 6, "gain": {"difference": 0.2}}
    row = base | {"name": name, "kind": "model", "value": 0.1, "terms": {name: term}}
    rows = [base | {"name": "base"}, row | {"chosen_after_seal": True}]
    return Results.model_validate({"rows": rows, "limited": [name]})
