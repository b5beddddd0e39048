"""Kills: a command killed at any event of the file system and started again ends as one that nobody
interrupted, bit for bit but for times.

A sample of the events, unless `--every-event` is given.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, constants

from optimer_hf import hub as hubs
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.delta import write_record
from tests.support.added_tokens import START, save_adapter, with_tokens

ALICE = "hf_alice_write"
N_SAMPLED = 1  # event of a command
IGNORED = r"^(hf|cache)/"  # caches
OPTIONAL: dict[str, str] = {}  # files that a command does without where the disk refuses them
RESUMED = {  # files that a command that goes on adds to, and drops when it is done
    "train": r"^trained/(started\.json|blocks|checkpoints/)",
    "search": r"^study/",
    "run": r"^out/",
    "compare": r"^study/(decisions|sealed)\.jsonl",
    "update": r"^pulled/\.update/",  # the whole update, half in place
}
EXISTS = "already exists and is not empty"  # a finished output, which stays as it is

# command line; the command whose results it starts from
COMMANDS: dict[str, tuple[list[str], str]] = {
    "train": (["train", "train.yaml", "trained"], "inputs"),
    "extract": (["extract", "vectors/math", "--base", "base", "delta"], "inputs"),
    "merge": (["merge", "merge.yml", "merged"], "inputs"),
    "union": (["merge", "union.yml", "merged"], "inputs"),
    "mergekit": (["merge", "merge.yml", "merged", "--engine", "mergekit"], "inputs"),
    "search": (["search", "study.yaml", "study"], "inputs"),
    "report": (["report", "study", "report.html", "--figures", "drawn"], "search"),
    "compare": (["compare", "study", "--figure", "sealed.png"], "search"),
    "recipe": (["recipe", "study", "made/recipe.yaml", "--vanilla"], "search"),
    "rewrite": (["recipe", "study", "made/recipe.yaml", "--pick", "2"], "recipe"),
    "build": (["build", "made/recipe.yaml", "built"], "recipe"),
    "run": (["run", "tiny", "out"], "inputs"),
    "push": (["push", "vectors/ja", "alice/pushed"], "inputs"),
    "pull": (["pull", "alice/vector@FIRST", "pulled"], "inputs"),
    "update": (["pull", "alice/vector", "pulled", "--update"], "pull"),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def first_commit(scratch: Path, make_base, make_adapter, make_tuned, corpus_dir: Path) -> str:
    """Write the inputs of all commands; return the older commit of alice/vector."""
    work, inputs = scratch / "work", scratch / "inputs"
    work.mkdir()
    base = ResolvedModel(work / "base", "base")
    shutil.copytree(make_base("gemma").path, base.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        api = HfApi(token=ALICE)
        api.create_repo("alice/killbase", exist_ok=True)
        (base.path / "README.md").write_text("---\nlicense: gemma\n---\n")
        commit = api.upload_folder(repo_id="alice/killbase", folder_path=base.path).oid
        published = ResolvedModel(base.path, "alice/killbase", commit)
        (work / "vectors").mkdir()
        shutil.copytree(make_adapter(base, 0), work / "vectors" / "ja")
        shutil.copytree(make_tuned(base, "gemma", 1), work / "vectors" / "math")
        file = work / "vectors" / "ja" / "adapter_config.json"
        config = json.loads(file.read_text()) | {"base_model_name_or_path": "alice/killbase"}
        file.write_text(json.dumps(config))
        save_adapter(base, work / "chat", with_tokens(base.path, [START]), seed=1)
        write_record(work / "vectors" / "ja", published, name="ja", kind="adapter")
        shutil.copytree(work / "vectors" / "ja", work / "other")
        first = hubs.push(work / "other", "alice/vector", token=ALICE).commit
        record = json.loads((work / "other" / "vector.json").read_text())
        (work / "other" / "vector.json").write_text(json.dumps(record | {"norm": 5.0}))
        hubs.push(work / "other", "alice/vector", token=ALICE)
    shutil.rmtree(work / "other")
    _write_configs(work, corpus_dir)
    work.rename(inputs)
    return str(first)


def _write_configs(work: Path, corpus_dir: Path) -> None:
    for name in ("aaa", "xyz"):
        for split in ("train", "search", "test"):
            shutil.copyfile(corpus_dir / f"{name}.{split}.jsonl", work / f"{name}.{split}.jsonl")

    def write(file: str, data: dict[str, Any]) -> None:
        (work / file).parent.mkdir(exist_ok=True)
        (work / file).write_text(yaml.safe_dump({"format_version": 1} | data))

    def terms(split: str, folder: str) -> list[dict[str, str]]:
        return [{"name": n, "text": f"{folder}/{n}.{split}.jsonl"} for n in ("aaa", "xyz")]

    trainer = {"learning_rate": 2e-2, "per_device_train_batch_size": 4, "bf16": False}
    training = {
        "name": "aaa",
        "block_size": 32,
        "max_tokens": 256,
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "trainer": trainer | {"save_steps": 1},
    }
    write("train.yaml", training | {"base_model": "./base", "corpus": {"path": "aaa.train.jsonl"}})
    there = {"base_model": "../base", "corpus": {"path": "../aaa.train.jsonl"}}
    write("tiny/train-aaa.yaml", training | there)
    search = {"n_trials": 5, "rescore_top": 2}
    study = {
        "objective": {"limit": 2, "terms": terms("search", ".")},
        "test": {"limit": 2, "terms": terms("test", ".")},
        "search": search,
    }
    sources = {name: {"source": f"./vectors/{name}"} for name in ("ja", "math")}
    steered = {"base_model": "./base", "vectors": sources}
    steered["search"] = search | {"gradients": "always"}
    write("study.yaml", study | steered)
    tiny = {
        "base_model": "../base",
        "vectors": {"aaa": {"train": "train-aaa.yaml"}, "math": {"source": "../vectors/math"}},
        "objective": {"limit": 2, "terms": terms("search", "..")},
        "test": {"limit": 2, "terms": terms("test", "..")},
        "search": search,
    }
    write("tiny/study.yaml", tiny)
    merge = {
        "merge_method": "optimer",
        "base_model": "./base",
        "models": [{"model": "./vectors/math", "parameters": {"weight": 0.5}}],
        "dtype": "bfloat16",
    }
    (work / "merge.yml").write_text(yaml.safe_dump(merge))
    both = [
        {"model": f"./{name}", "parameters": {"weight": 0.5}} for name in ("vectors/math", "chat")
    ]
    union = merge | {"models": both, "tokenizer_source": "union"}
    (work / "union.yml").write_text(yaml.safe_dump(union))


@pytest.fixture(scope="module")
def tried(scratch: Path, first_commit: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Return a function that kills a command, starts it again and says how that ended."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": ALICE,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(scratch / "work" / "hf"),
        "HF_DATASETS_CACHE": str(scratch / "work" / "cache" / "datasets"),
        "OPTIMER_CACHE": str(scratch / "work" / "cache" / "optimer"),
        "TMPDIR": str(scratch / "tmp"),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(hubs.__file__).parent.parent), *sys.path]),
    }
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, str(Path(__file__).with_name("support") / "kills.py"), str(scratch)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as driver:

        def ask(
            name: str, sample: int | None, seed: int = 0, is_refused: bool = False
        ) -> dict[str, Any]:
            arguments, start = COMMANDS[name]
            if start != "inputs" and not (scratch / start).exists():
                ask(start, 0)
            request = {
                "name": name,
                "start": start,
                "result": name,
                "arguments": [text.replace("FIRST", first_commit) for text in arguments],
                "sample": sample,
                "seed": seed,
                "ignored": IGNORED,
                "accepted": EXISTS if name in ("extract", "merge", "mergekit") else "(?!)",
                "is_refused": is_refused,
                "optional": OPTIONAL.get(name, "(?!)"),
                "resumed": RESUMED.get(name, "(?!)"),
                "repo": "alice/pushed" if name == "push" else None,
            }
            driver.stdin.write(json.dumps(request) + "\n")
            driver.stdin.flush()
            answer: dict[str, Any] = json.loads(driver.stdout.readline())
            return answer

        yield ask
        driver.stdin.close()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_anywhere_and_started_again_ends_as_if_it_had_not_been(
    tried, request: pytest.FixtureRequest, name: str
):
    every = request.config.getoption("--every-event")
    outcome = tried(name, None if every else N_SAMPLED)
    told = f"{name}: {outcome['n_events']} events, {outcome['tried']} killed, "
    sys.stderr.write(f"{told}{len(outcome['failed'])} failed\n")
    assert outcome["failed"] == []
    assert outcome["tried"] >= N_SAMPLED


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_whose_disk_takes_no_more_data_says_so_and_can_be_started_again(
    tried, request: pytest.FixtureRequest, name: str
):
    every = request.config.getoption("--every-event")
    outcome = tried(name, None if every else N_SAMPLED, seed=1, is_refused=True)
    assert not outcome["failed"], "\n".join(outcome["failed"])
    assert outcome["tried"] >= N_SAMPLED
