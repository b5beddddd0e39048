"""Tiny real models, tokenizers, adapters and corpora, built in milliseconds; no network."""

import gc
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tests.support.minihub.running import HOME, HUB, stop

# The client reads its endpoint when it is imported. The suite is offline; the tests of the Hub go
# online, to a server of our own and nowhere else.
os.environ["HF_ENDPOINT"] = HUB.endpoint
os.environ["HF_HOME"] = str(HOME)
os.environ["HF_TOKEN"] = ""
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process: some tests fork it
# Plain loops: for vectors, the compiler of C++ reads headers for 20 s, and tries the processor.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: more threads only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from optimer_hf.models.layout import ResolvedModel
from tests.support.experiments import finished, finished_once, recipe_dir  # noqa: F401 - fixtures
from tests.support.golden import golden  # noqa: F401 - a fixture
from tests.support.minihub import HubServer
from tests.support.tiny import BOS, EOS, PAD, tiny_model
from tests.support.warm import server, warm_workers  # noqa: F401 - fixtures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-event",
        action="store_true",
        help="Kill every command of test_kills.py at all events, not at a sample of them.",
    )


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory):
    """Keep converted models and prepared data sets out of the user's caches."""
    home = tmp_path_factory.mktemp("cache")
    os.environ["OPTIMER_CACHE"] = str(home / "optimer")
    os.environ["HF_DATASETS_CACHE"] = str(home / "datasets")
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _freeze_libraries() -> None:
    """Keep the objects of imported libraries out of later garbage collections, each of which would
    look at half a million of them: every model that is loaded begins with one.
    """
    importlib.import_module("hypothesis")  # it looks for referrers of its generators, frozen or not
    if len(gc.get_objects()) > 100_000:
        import hypothesis  # noqa: F401 - later, it would not find objects that are frozen

        gc.collect()
        gc.freeze()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The local Hub, online for one test; no token of a user may reach its storage hosts."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    HUB.faults.clear()
    HUB.log.clear()
    HUB.leaks.clear()
    yield HUB
    assert not HUB.leaks, HUB.leaks


def pytest_sessionfinish() -> None:  # not later: pytest-xdist ends its processes then
    stop()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer that puts BOS first, as Gemma's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS} | {
        char: 3 + i for i, char in enumerate(alphabet)
    }
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast):
    """Return a function that saves a model with the tokenizer and returns its directory."""

    def save(model, name: str = "model") -> Path:
        out = tmp_path_factory.mktemp(name)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return out

    return save


@pytest.fixture(scope="session", params=["gemma", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    """Architecture: Gemma 3 text (tied embeddings) or Llama (untied)."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_base(save_model):
    """Return a function kind, dtype -> ResolvedModel of a tiny base.

    The same arguments give the same directory.
    """
    made: dict[tuple[str, torch.dtype], ResolvedModel] = {}

    def base(kind: str = "gemma", dtype: torch.dtype = torch.bfloat16) -> ResolvedModel:
        if (kind, dtype) not in made:
            path = save_model(tiny_model(kind, dtype=dtype), f"base-{kind}")
            made[kind, dtype] = ResolvedModel(path, path.name)
        return made[kind, dtype]

    return base


@pytest.fixture(scope="session")
def make_tuned(save_model):
    """Return a function base, seed -> directory of a fine-tune (the base plus noise)."""

    def tuned(
        base: ResolvedModel,
        kind: str,
        seed: int,
        dtype: torch.dtype = torch.bfloat16,
        scale: float = 0.01,
    ) -> Path:
        model = tiny_model(kind, dtype=torch.float32).from_pretrained(
            base.path, dtype=torch.float32
        )
        torch.manual_seed(100 + seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
        return save_model(model.to(dtype), f"tuned-{kind}-{seed}")

    return tuned


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory):
    """Return a function base, seed, LoRA options -> directory of an adapter whose B is not zero."""

    def adapter(base: ResolvedModel, seed: int, **options) -> Path:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        torch.manual_seed(200 + seed)
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            | options
        )
        peft_model = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:
                    parameter.normal_(std=0.05)
        out = tmp_path_factory.mktemp(f"adapter-{seed}")
        peft_model.save_pretrained(out)
        return out

    return adapter


WORDS = {
    "aaa": ["aa", "ab", "ba", "aab", "abb", "baa", "aba", "bab"],
    "xyz": ["xx", "xy", "yx", "zz", "xz", "zy", "xyz", "zyx"],
    "mix": ["aa", "xy", "ba", "zz", "the", "of", "and"],
}


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of JSONL corpora in made-up languages: <name>.train, .search, .test."""
    import random

    out = tmp_path_factory.mktemp("corpora")
    for name, words in WORDS.items():
        rng = random.Random(name)
        for split, n in (("train", 120), ("search", 8), ("test", 8)):
            with open(out / f"{name}.{split}.jsonl", "w", encoding="utf-8") as file:
                for _ in range(n):
                    text = " ".join(rng.choice(words) for _ in range(rng.randint(5, 30)))
                    file.write(json.dumps({"text": text}) + "\n")
    return out
