"""build.py: recipe and lock to model, and models against locks."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from optimer_hf.errors import ConfigError, ModelError, OutputError
from optimer_hf.files.digest import sha256_file
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import weight_digests
from optimer_hf.recipes.build import build, verify
from optimer_hf.recipes.record import Lock, Recipe
from optimer_hf.vectors.opening import open_vector
from tests.support.recipes import WEIGHTS, change_weights


def test_a_recipe_over_all_three_kinds_builds_the_weighted_sum(recipe, pool, tmp_path):
    base, sources = pool
    build(recipe, tmp_path / "out")
    vectors = [open_vector(name, str(source), base) for name, source in sources.items()]
    assert [vector.kind for vector in vectors] == ["adapter", "delta", "checkpoint"]
    write_merged(base, vectors, WEIGHTS, tmp_path / "expected", out_dtype="bfloat16")
    assert weight_digests(tmp_path / "out") == weight_digests(tmp_path / "expected")
    assert weight_digests(tmp_path / "out") != weight_digests(base.path)


def test_the_first_build_locks_the_model_and_the_second_gives_it_again(recipe, tmp_path):
    with pytest.raises(ModelError, match=r"records no built model\. Run `optimer build"):
        verify(recipe, tmp_path / "one")
    build(recipe, tmp_path / "one")
    locked = Lock.read(recipe.with_suffix(".lock.json"))
    assert locked.output == {
        "model.safetensors": sha256_file(tmp_path / "one" / "model.safetensors")
    }
    build(recipe, tmp_path / "two")
    with pytest.raises(ModelError, match=r"none: no such model\. Build it"):
        verify(recipe, tmp_path / "none")
    with pytest.raises(ModelError, match=r"recipe\.yaml: found a file, expected the directory"):
        verify(recipe, recipe)
    verify(recipe, tmp_path / "one")
    verify(recipe, tmp_path / "two")
    assert Lock.read(recipe.with_suffix(".lock.json")) == locked


@pytest.mark.parametrize("part", ["base_model", "vectors.ja", "vectors.math", "vectors.it"])
def test_build_refuses_weights_that_are_not_the_locked_ones(recipe, pool, tmp_path, part):
    base, sources = pool
    directory = base.path if part == "base_model" else sources[part.removeprefix("vectors.")]
    change_weights(directory)
    with pytest.raises(
        ModelError,
        match=rf"demo: {part}: the weights in .*{directory.name} are not the locked ones\. Fetch",
    ):
        build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_build_refuses_a_vector_that_the_lock_does_not_know(recipe, tmp_path):
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data["vectors"]["code"] = {"source": "./vectors/it", "weight": 0.1}
    recipe.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    with pytest.raises(ModelError, match="demo: the weights or the dtype are not the locked ones"):
        build(recipe, tmp_path / "out")


def test_a_recipe_whose_weights_were_changed_does_not_match_its_lock(recipe, tmp_path):
    build(recipe, tmp_path / "one")
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data["vectors"]["ja"]["weight"] = 0.5
    recipe.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    with pytest.raises(ModelError, match="demo: the weights or the dtype are not the locked ones"):
        build(recipe, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    with pytest.raises(ModelError, match="demo: the weights or the dtype are not the locked ones"):
        verify(recipe, tmp_path / "one")


def test_a_recipe_without_a_lock_builds_and_writes_none(recipe, tmp_path):
    recipe.with_suffix(".lock.json").unlink()
    build(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not recipe.with_suffix(".lock.json").exists()


def test_another_dtype_builds_without_touching_the_lock(recipe, tmp_path):
    before = recipe.with_suffix(".lock.json").read_text(encoding="utf-8")
    build(recipe, tmp_path / "float32", out_dtype="float32")
    assert Checkpoint(tmp_path / "float32").dtype("model.norm.weight") == torch.float32
    assert recipe.with_suffix(".lock.json").read_text(encoding="utf-8") == before


@pytest.mark.parametrize("sizes", [(5 * 10**9, 20_000), (20_000, 5 * 10**9), (20_000, 30_000)])
def test_a_model_in_any_shards_is_verified_by_every_lock_of_its_recipe(recipe, tmp_path, sizes):
    models = [tmp_path / "one", tmp_path / "two"]
    for model, size in zip(models, sizes, strict=True):
        build(recipe, model, max_shard_size=size)
    assert len({len(list(model.glob("*.safetensors"))) for model in models}) == 2
    for path in (recipe, *(model / "recipe.yaml" for model in models)):
        for model in models:
            verify(path, model)
    assert Lock.read(recipe.with_suffix(".lock.json")).output == weight_digests(models[0])
    change_weights(models[1])
    for path in (recipe, *(model / "recipe.yaml" for model in models)):
        with pytest.raises(ModelError, match="sha256 differs from"):
            verify(path, models[1])


def test_a_build_in_other_shards_is_compared_with_the_first(recipe, tmp_path):
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del data["vectors"]["ja"]  # an adapter, which may round differently elsewhere: a warning
    recipe.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    lock = recipe.with_suffix(".lock.json")
    first = {
        "weights": {name: weight for name, weight in WEIGHTS.items() if name != "ja"},
        "output": {"model.safetensors": "0" * 64},
    }
    Lock.read(lock).model_copy(update=first).write(lock)
    with pytest.raises(ModelError, match="differs from the model that this recipe built first"):
        build(recipe, tmp_path / "two", max_shard_size=20_000)


def test_build_refuses_a_directory_with_another_model_or_files(recipe, tmp_path):
    out = tmp_path / "out"
    build(recipe, out, out_dtype="float32")
    for other in ({}, {"out_dtype": "float16"}, {"out_dtype": "float32", "max_shard_size": 9000}):
        with pytest.raises(OutputError, match="already exists and is not empty"):
            build(recipe, out, **other)
    verify(out / "recipe.yaml", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="already exists and is not empty"):
        build(recipe, tmp_path / "mine")


@pytest.mark.parametrize("lost", [[], ["recipe.yaml"], ["recipe.yaml", "recipe.lock.json"]])
def test_a_model_that_is_built_already_is_completed(recipe, tmp_path, caplog, lost):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "captions.json").write_text("{}")
    build(recipe, tmp_path / "out")
    expected = contents(tmp_path / "out")
    assert {"recipe.yaml", "recipe.lock.json", "figures/captions.json"} < expected.keys()
    changed = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    for name in lost:
        (tmp_path / "out" / name).unlink()
    shutil.rmtree(tmp_path / "out" / "figures")
    with caplog.at_level("INFO"):
        build(recipe, tmp_path / "out")
    assert "out: holds the model of this recipe already" in caplog.text
    assert contents(tmp_path / "out") == expected
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == changed


def test_a_model_whose_build_was_killed_before_it_was_locked_is_locked(recipe, tmp_path):
    lock = recipe.with_suffix(".lock.json")
    unlocked = lock.read_bytes()
    build(recipe, tmp_path / "out")
    locked = lock.read_bytes()
    lock.write_bytes(unlocked)
    build(recipe, tmp_path / "out")
    assert lock.read_bytes() == locked != unlocked


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_model_that_lost_a_file_is_not_taken_as_built(recipe, tmp_path, name):
    build(recipe, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(OutputError, match="already exists and is not empty"):
        build(recipe, tmp_path / "out")
    build(recipe, tmp_path / "out", replace=True)
    verify(recipe, tmp_path / "out")
    assert (tmp_path / "out" / name).is_file()


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_model_is_kept_until_the_one_that_replaces_it_is_whole(recipe, tmp_path, monkeypatch):
    build(recipe, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    kept = contents(tmp_path / "out")
    monkeypatch.setattr("optimer_hf.merging.writer.copy_beside_weights", full_disk)
    with pytest.raises(OutputError, match=r"out: .*No space left.*The old state was kept"):
        build(recipe, tmp_path / "out", replace=True)
    assert contents(tmp_path / "out") == kept
    assert not list(tmp_path.glob(".partial-*"))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_is_built_is_hashed_before_it_is_moved_into_place(recipe, tmp_path, monkeypatch):
    move = os.replace

    def damaging(source, target):
        move(source, target)
        if Path(target).name == "out":  # as another writer of the same files would
            change_weights(Path(target))

    monkeypatch.setattr(os, "replace", damaging)
    build(recipe, tmp_path / "out")
    with pytest.raises(ModelError, match="sha256 differs from"):
        verify(recipe, tmp_path / "out")


def test_verify_names_a_changed_and_a_lost_file_and_passes_one_that_is_not_read(recipe, tmp_path):
    out = tmp_path / "out"
    build(recipe, out)
    verify(recipe, out)
    shutil.copyfile(out / "model.safetensors", out / "other.safetensors")
    verify(recipe, out)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(
        ModelError, match=r"out/model\.safetensors: sha256 differs from recipe\.lock\.json"
    ):
        verify(recipe, out)
    (out / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"out/model\.safetensors"):
        verify(recipe, out)


def test_verify_refuses_a_file_that_is_read_instead_of_the_shards(recipe, pool, tmp_path):
    build(recipe, tmp_path / "out", max_shard_size=20_000)
    shutil.copyfile(pool[0].path / "model.safetensors", tmp_path / "out" / "model.safetensors")
    with pytest.raises(ModelError, match=r"sha256 differs from recipe\.lock\.json"):
        verify(recipe, tmp_path / "out")


def test_verify_says_what_is_lacking(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such recipe file"):
        verify(tmp_path / "gone.yaml", tmp_path)
    recipe.with_suffix(".lock.json").unlink()
    with pytest.raises(ConfigError, match=r"has no .*lock\.json beside it\. `optimer recipe"):
        verify(recipe, tmp_path)


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"--device: found 'gpu', which torch cannot use here"):
        build(recipe, tmp_path / "out", device="gpu")
    assert not (tmp_path / "out").exists()


def test_a_recipe_moves_with_its_folder(recipe, tmp_path):
    build(recipe, tmp_path / "out")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("base", "vectors", "recipe.yaml", "recipe.lock.json"):
        shutil.move(tmp_path / name, moved / name)
    build(moved / "recipe.yaml", moved / "out")
    verify(moved / "recipe.yaml", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vektors": {}}, r"recipe\.yaml:\d+: unknown field 'vektors'\. Did you mean 'vectors'\?"),
        ({"dtype": "int8"}, r"recipe\.yaml:\d+: dtype: found 'int8'"),
        (
            {"vectors": {"ja": {"source": "./x"}}},
            r"recipe\.yaml:\d+: vectors\.ja\.weight: it is missing; give the weight",
        ),
        (
            {"vectors": {"ja": {"source": "./x", "weight": float("nan")}}},
            r"vectors\.ja\.weight: found nan",
        ),
        ({"format_version": 2}, r"format_version: found 2"),
    ],
)
def test_mistakes_in_a_recipe_are_named_by_file_and_field(recipe, change, message):
    data = yaml.safe_load(recipe.read_text(encoding="utf-8")) | change
    recipe.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Recipe.read(recipe)


def test_the_weights_of_a_recipe_are_those_in_the_file(recipe):
    assert Recipe.read(recipe).weights == WEIGHTS
    assert set(
        json.loads(recipe.with_suffix(".lock.json").read_text(encoding="utf-8"))["vectors"]
    ) == set(WEIGHTS)
