"""From texts of one's own to a merge that others can build: train, resume, search, report, push."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants

from optimer_hf.models.layout import weight_digests
from optimer_hf.vectors.training_record import read_training
from tests.support.journeys import Person
from tests.support.pages import sections

PAGE = "docs/how-to/pre-train.md"
SMALLER = {  # what the page shows -> what a test has time for
    "block_size: 1024": "block_size: 32",
    "max_tokens: 1_000_000": "max_tokens: 8192",
    "save_steps: 100": "save_steps: 8, per_device_train_batch_size: 4",
    "n_trials: 30": "n_trials: 4",
}
TRAIN = "optimer train train-math.yaml vectors/math"
PUSH = "optimer push my-study you/my-merge --vectors --license gemma"
TEXTS = {  # of the page, and which of the made-up languages each is in
    "held_out": "aaa.search",
    "sealed": "aaa.test",
    "held_out.code": "xyz.search",
    "sealed.code": "xyz.test",
    "english": "mix.search",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory, make_base, corpus_dir) -> Path:
    """The folder of a team: a base, corpora of two files each, held-out texts, the page's YAML."""
    folder = tmp_path_factory.mktemp("team")
    shutil.copytree(make_base("llama").path, folder / "my-model")
    for name, language in (("math", "aaa"), ("code", "xyz")):
        (folder / "corpora" / name).mkdir(parents=True)
        lines = (corpus_dir / f"{language}.train.jsonl").read_text().splitlines(keepends=True)
        for part in range(2):
            (folder / f"corpora/{name}/part-{part}.jsonl").write_text("".join(lines[part::2] * 8))
    for name, source in TEXTS.items():
        shutil.copy(corpus_dir / f"{source}.jsonl", folder / f"{name}.jsonl")
    (page,) = (section for section in sections() if section.name == PAGE)
    for text, name in zip(page.blocks("yaml"), ("train-math.yaml", "study.yaml"), strict=True):
        for shown, smaller in SMALLER.items():
            text = text.replace(shown, smaller)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def ann(start, tmp_path, hub, monkeypatch) -> Person:
    shutil.copytree(start, tmp_path / "ann")
    for repo in [repo for repo in hub.store.repos.values() if repo.id.startswith("you/")]:
        hub.store.delete(repo)
    for cached in Path(constants.HF_HUB_CACHE).glob("models--you--*"):
        shutil.rmtree(cached)
    person = Person("you", tmp_path / "ann")
    person.sign_in(monkeypatch)
    return person


def kill_at_its_second_checkpoint(person: Person, line: str, out: Path) -> None:
    """Start a training, and kill it with all its processes when it writes a second checkpoint."""
    process = person.types_in_shell(line)
    while not list(out.rglob("checkpoint-16")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_team_trains_resumes_searches_reports_and_publishes(ann, caplog):
    assert ann.types_in_shell("sed 's/math/code/g' train-math.yaml > train-code.yaml").wait() == 0
    ann.types("optimer validate train-math.yaml train-code.yaml")
    kill_at_its_second_checkpoint(ann, TRAIN, ann.folder / "vectors/math")
    assert read_training(ann.folder / "vectors/math") is None
    assert "begun, checkpoint of step" in ann.types("optimer status vectors/math").output
    ann.types(TRAIN)
    assert "train math: resuming from checkpoint-" in caplog.text
    ann.runs("optimer train train-math.yaml at-once")
    assert weight_digests(ann.folder / "at-once") == weight_digests(ann.folder / "vectors/math")
    ann.types("optimer train train-code.yaml vectors/code")
    for line in (
        "optimer vectors vectors/math vectors/code --base ./my-model",
        "optimer check-overlap train-math.yaml train-code.yaml study.yaml",
        "optimer plan study.yaml",
    ):
        ann.types(line)
    printed = yaml.safe_load(ann.types("optimer search study.yaml my-study").stdout)
    assert printed["merge_method"] == "task_arithmetic"  # mergekit alone runs it
    assert {entry["model"] for entry in printed["models"]} <= {
        "./my-model+./vectors/math",
        "./my-model+./vectors/code",
    }
    for line in (
        "optimer compare my-study",
        "optimer report my-study",
        "optimer build my-study/recipe.yaml merged",
    ):
        ann.types(line)
    ann.types(f"{PUSH} --dry-run")
    assert not HfApi().repo_exists("you/my-merge")
    ann.types(PUSH)
    there = {
        name
        for name in ("", "-base", "-math", "-code")
        if HfApi().repo_exists(f"you/my-merge{name}")
    }
    assert there == {"", "-base", "-math", "-code"}


def test_one_folder_does_all_of_it(ann):
    line = "optimer init my-recipe math=corpora/math code=corpora/code --base ./my-model"
    ann.types(f"{line} --text held_out.jsonl")
    for file in ann.folder.glob("my-recipe/*.yaml"):
        text = file.read_text().replace("max_tokens: 1000000", "max_tokens: 2048\nblock_size: 32")
        file.write_text(text.replace("n_trials: 30", "n_trials: 4"))
    ann.types("optimer run my-recipe")
    assert (ann.folder / "runs/my-recipe/merged/model.safetensors").exists()
