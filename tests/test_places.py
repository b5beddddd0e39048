"""Where outputs go: links, other file systems, folders that vanish or are taken, and outputs within
inputs. A command does what it is asked, or says in a line why not, and leaves what was there.
"""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from optimer_hf.files import staging
from optimer_hf.study.directory import lock_directory
from tests.support.experiments import run_optimer
from tests.support.golden import VERSIONS, copy_golden

ALICE = "hf_alice_write"
ENDS = {  # command -> the file without which its output is not whole
    "train": "training.json",
    "extract": "vector.json",
    "merge": "model.safetensors",
    "build": "recipe.lock.json",
    "pull": "adapter_model.safetensors",
    "run": "done.json",
}
SHORT = [kind for kind in ENDS if kind != "run"]  # run is the others, one after another


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with a base, vectors, a finished run and corpora."""
    return copy_golden(VERSIONS[-1], tmp_path / "world")


@pytest.fixture
def command(world: Path, hub):
    """Return a function that runs a command of a kind with an output at a place."""
    base, adapter = world / "base", world / "vectors" / "adapter"
    merge = {
        "merge_method": "optimer",
        "base_model": str(base),
        "models": [{"model": str(adapter), "parameters": {"weight": 0.5}}],
    }
    (world / "merge.yml").write_text(yaml.safe_dump(merge))
    train = {
        "format_version": 1,
        "name": "aaa",
        "base_model": str(base),
        "corpus": {"path": str(world / "corpora" / "aaa.train.jsonl")},
        "block_size": 32,
        "max_tokens": 128,
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "trainer": {"learning_rate": 2e-2, "per_device_train_batch_size": 4, "bf16": False},
    }
    (world / "train.yaml").write_text(yaml.safe_dump(train))
    _publish(adapter)

    def run(kind: str, out: object):
        arguments = {
            "train": ["train", world / "train.yaml", out],
            "extract": ["extract", adapter, "--base", base, out],
            "merge": ["merge", world / "merge.yml", out],
            "build": ["build", world / "runs" / "tiny" / "recipe.yaml", out],
            "pull": ["pull", "alice/placed", out],
            "run": ["run", world / "recipes" / "tiny", out],
        }[kind]
        return run_optimer(*arguments)

    return run


def _publish(adapter: Path) -> None:
    """Put a vector on the Hub, trained on a base that is there, too."""
    api = HfApi(token=ALICE)
    api.create_repo("alice/placed", exist_ok=True)
    api.upload_folder(repo_id="alice/placed", folder_path=adapter, ignore_patterns="vector.json")
    record = json.loads((adapter / "vector.json").read_text())
    record["base"]["reference"] = "alice/base@" + "0" * 40
    data = json.dumps(record).encode()
    api.upload_file(repo_id="alice/placed", path_in_repo="vector.json", path_or_fileobj=data)


def is_refused(result, *said: str) -> bool:
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    told = len(errors) == 1 and all(text in errors[0] for text in said)
    assert result.exit_code == 1 and told, (result.exit_code, result.output, result.exception)
    return True


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob(".partial-*"))


def test_a_file_is_written_where_a_link_leads(tmp_path):
    real, out = tmp_path / "real.html", tmp_path / "out.html"
    for text in ("old\n", "new\n"):  # the first: behind a link to nothing
        out.unlink(missing_ok=True)
        out.symlink_to(real)
        staging.write_text(out, text)
        assert out.is_symlink() and real.read_text() == text


@pytest.mark.parametrize(
    ("kind", "place"),
    [*itertools.product(SHORT, ("slash", "link", "dangling")), ("run", "dangling")],
)
def test_an_output_may_be_named_with_a_slash_or_through_a_link(command, tmp_path, kind, place):
    real, out = tmp_path / "disk" / "real", tmp_path / "out"
    real.parent.mkdir()
    if place == "link":
        real.mkdir()
    if place == "slash":
        real = out
    else:
        out.symlink_to(real)
    result = command(kind, f"{out}/")
    assert result.exit_code == 0, (result.output, result.exception)
    assert (real / ENDS[kind]).is_file() and out.is_symlink() == (place != "slash")
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("kind", SHORT)
def test_a_file_system_that_does_not_move_files_is_named(command, tmp_path, monkeypatch, kind):
    out = tmp_path / "out"

    def refuse(source, target, **_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        patch.setattr(os, "replace", refuse)
        assert is_refused(command(kind, out), "Invalid cross-device link")
    assert not leftovers(tmp_path)
    assert not out.exists() or not any(out.iterdir())
    assert command(kind, out).exit_code == 0


@pytest.mark.parametrize("kind", ["extract", "merge", "build", "pull"])
def test_a_folder_that_is_removed_meanwhile_is_named(command, tmp_path, monkeypatch, kind):
    out, sync_all = tmp_path / "gone" / "out", staging.sync_all

    def remove(folder: Path) -> None:
        shutil.rmtree(out.parent)
        sync_all(folder)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "sync_all", remove)
        assert is_refused(command(kind, out), str(out), "removed")
    assert not out.exists()
    assert command(kind, out).exit_code == 0


def test_a_training_whose_folder_is_removed_says_so(command, tmp_path, monkeypatch):
    from optimer_hf.training import run as training

    out, save = tmp_path / "out", training._save

    def remove(*arguments):
        shutil.rmtree(out)
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", remove)
        assert is_refused(command("train", out), str(out), "removed")
    assert not (out / "training.json").exists()


def test_the_second_run_into_a_folder_says_so(command, world, tmp_path):
    out = world / "runs" / "tiny"
    (out / "done.json").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    with lock_directory(out):
        assert is_refused(command("run", out), "another process is working in it")
    assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before


def test_results_of_a_run_within_its_folder_are_none_of_its_inputs(world):
    from optimer_hf.experiment.folder import Run

    folder = world / "recipes" / "tiny"
    run = Run(folder, folder / "runs" / "tiny")
    before = run.inputs_digest()
    shutil.copytree(world / "runs" / "tiny", run.out)
    assert run.inputs_digest() == before
    (folder / "more.yaml").write_text("a: 1")
    assert run.inputs_digest() != before
