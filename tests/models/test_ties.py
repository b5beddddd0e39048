"""Head and embedding, one tensor or two, in base and fine-tune: at weight 1 a merge is the tuned
model, or it is refused by the name of the tensor.
"""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.merging.engines import merge
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel, weight_digests
from optimer_hf.models.ties import ties_of
from optimer_hf.recipes.build import build
from optimer_hf.recipes.record import Lock
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.run import train
from optimer_hf.vectors.delta import extract, extract_any_adapter, measure_norms
from optimer_hf.vectors.opening import open_vector
from tests.support.tiny import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FORMS = ["tied by the config", "tied by the class", "untied", "tied, with a copy"]
IDS = torch.arange(3, 35)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(input_ids=IDS, use_cache=False).logits


def logits_of(path: Path, auto=transformers.AutoModelForCausalLM) -> torch.Tensor:
    return logits(auto.from_pretrained(path, dtype=torch.float64))


def assert_equal_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def edit_config(path: Path, **changes) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(kept), encoding="utf-8")


def edit_weights(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def randomised(model, seed: int):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def store_copy(tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


@pytest.fixture(scope="module")
def saved(save_model):
    """Return a function form, seed -> directory of a tiny Gemma, which ties by its class."""
    made = {}

    def save(form: str, seed: int) -> Path:
        if (form, seed) not in made:
            config = transformers.GemmaConfig(**SIZES, tie_word_embeddings=form != "untied")
            path = save_model(randomised(transformers.GemmaForCausalLM(config), seed))
            edit_config(path, tie_word_embeddings=form != "untied")
            if form == "tied by the class":
                edit_config(path, tie_word_embeddings=None)
            if form == "tied, with a copy":
                edit_weights(path, store_copy)
            assert (HEAD in Checkpoint(path).names) == (form in ("untied", "tied, with a copy"))
            made[form, seed] = path
        return made[form, seed]

    return save


@pytest.fixture(scope="module")
def reference(saved):
    """Return a function form, seed -> logits of the model in float64."""
    made = {}

    def logits(form: str, seed: int) -> torch.Tensor:
        if (form, seed) not in made:
            made[form, seed] = logits_of(saved(form, seed))
        return made[form, seed]

    return logits


def write_config(path: Path, base: Path, source: Path, method: str = "optimer") -> Path:
    config = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(source), "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def write_recipe(folder: Path, base: Path, source: Path) -> Path:
    path = folder / "recipe.yaml"
    data = {
        "format_version": 1,
        "name": "demo",
        "base_model": str(base),
        "dtype": "float32",
        "vectors": {"v": {"source": str(source), "weight": 1.0}},
        "objective": {},
        "scores": {},
        "study": {},
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    lock = Lock(
        base=weight_digests(base),
        vectors={"v": weight_digests(source)},
        weights={"v": 1.0},
        dtype="float32",
    )
    lock.write(path.with_suffix(".lock.json"))
    return path


def by_writer(base: Path, source: Path, folder: Path) -> torch.Tensor:
    assert merge(write_config(folder / "m.yml", base, source), folder / "out") == "native"
    return logits_of(folder / "out")


def by_mergekit(base: Path, source: Path, folder: Path) -> torch.Tensor:
    merge(write_config(folder / "m.yml", base, source), folder / "out", engine="mergekit")
    return logits_of(folder / "out")


def by_recipe(base: Path, source: Path, folder: Path) -> torch.Tensor:
    build(write_recipe(folder, base, source), folder / "out")
    return logits_of(folder / "out")


def by_search(base: Path, source: Path, folder: Path) -> torch.Tensor:
    resolved = ResolvedModel(base, "base")
    pool = [open_vector("v", str(source), resolved)]
    resident = ResidentModel(resolved, pool, dtype="float32")
    resident.set_weights({"v": 0.3})
    resident.set_weights({"v": 1.0})
    return logits(resident.model)


def by_delta(base: Path, source: Path, folder: Path) -> torch.Tensor:
    resolved = ResolvedModel(base, "base")
    vector = open_vector("v", str(source), resolved)
    record = extract(vector, resolved, folder / "delta", dtype="float32")
    assert record.norm == pytest.approx(measure_norms(vector, Checkpoint(base))[0])
    return by_writer(base, folder / "delta", folder)


def by_delta_and_mergekit(base: Path, source: Path, folder: Path) -> torch.Tensor:
    resolved = ResolvedModel(base, "base")
    extract(open_vector("v", str(source), resolved), resolved, folder / "delta", dtype="float32")
    return by_mergekit(base, folder / "delta", folder)


WAYS = {
    "writer": by_writer,
    "mergekit": by_mergekit,
    "recipe": by_recipe,
    "search": by_search,
    "delta": by_delta,
    "delta, mergekit": by_delta_and_mergekit,
}


# -- fine-tunes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_base", "of_tuned", "way"),
    [
        *itertools.product(FORMS, FORMS, ["writer", "mergekit", "search"]),
        *itertools.product(FORMS[1:], FORMS[1:], ["recipe", "delta", "delta, mergekit"]),
    ],
)
def test_weight_one_gives_the_fine_tune_or_is_refused_by_name(
    saved, reference, tmp_path, of_base, of_tuned, way
):
    base, tuned = saved(of_base, 0), saved(of_tuned, 1)
    stores_head = {form: HEAD in Checkpoint(saved(form, 0)).names for form in FORMS}
    would_drop = of_tuned == "untied" and of_base != "untied"
    by_name = way == "mergekit" and stores_head[of_base] != stores_head[of_tuned]
    by_name |= "mergekit" in way and of_base == "untied"  # its Gemma has no head
    if would_drop or by_name:
        with pytest.raises(ModelError, match=r"lm_head\.weight"):
            WAYS[way](base, tuned, tmp_path)
        assert not (tmp_path / "out").exists()
        return
    assert_equal_logits(WAYS[way](base, tuned, tmp_path), reference(of_tuned, 1))


# -- other classes ---------------------------------------------------------------------------------

COMMON = {key: size for key, size in SIZES.items() if key != "head_dim"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SHORT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


def gemma3(tied: bool):
    text = transformers.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8, sliding_window=32)
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text,
            vision_config=VISION,
            mm_tokens_per_image=4,
            tie_word_embeddings=tied,
        )
    )


def of_kind(name: str):
    """Return a function tied -> fresh model, of a class called name."""
    head = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    sizes = SHORT if "GPT2" in name else {"n_layer": 1, "n_head": 2, **COMMON}
    config_class = getattr(transformers, name)

    def make(tied: bool):
        config = config_class(**sizes, tie_word_embeddings=tied)
        return head[config_class](config)

    return make


CLASSES = {  # and the file's name for a head of its own
    "a head called otherwise": (of_kind("GPTNeoXConfig"), "embed_out.weight"),
    "a class that ties by default": (of_kind("CohereConfig"), HEAD),
    "an embedding called otherwise": (of_kind("GPT2Config"), HEAD),
    "a bias of the head": (of_kind("PhiConfig"), HEAD),
    "no attention": (of_kind("MambaConfig"), HEAD),
    "text and images": (gemma3, "language_model.lm_head.weight"),
}


@pytest.mark.parametrize(("make", "head"), CLASSES.values(), ids=CLASSES.keys())
def test_every_class_keeps_its_head(save_model, tmp_path, make, head):
    tied, untied = save_model(randomised(make(True), 0)), save_model(randomised(make(False), 1))
    other = save_model(randomised(make(True), 2))
    auto = transformers.AutoModelForCausalLM
    for base, tuned in ((tied, other), (untied, tied)):
        folder = tmp_path / tuned.name
        folder.mkdir()
        assert_equal_logits(by_writer(base, tuned, folder), logits_of(tuned, auto))
    assert ties_of(Checkpoint(untied)).head == head
    with pytest.raises(ModelError, match=f"has a separate tensor '{head}'"):
        open_vector("v", str(untied), ResolvedModel(tied, "base"))


def test_a_fine_tune_that_scales_its_logits_differently_is_refused(save_model):
    base, tuned = (save_model(of_kind("CohereConfig")(True), f"scaled-{seed}") for seed in range(2))
    open_vector("v", str(tuned), ResolvedModel(base, "base"))
    edit_config(tuned, logit_scale=0.5)
    with pytest.raises(ModelError, match=r"logit_scale: 0\.5, base 0\.0625"):
        open_vector("v", str(tuned), ResolvedModel(base, "base"))


@pytest.fixture
def copied(saved, tmp_path):
    """Return a function form -> copy of a directory, to be changed."""

    def copy(form: str, seed: int = 0) -> Path:
        return Path(shutil.copytree(saved(form, seed), tmp_path / f"copy-{seed}"))

    return copy


def test_a_head_that_is_neither_stored_nor_tied_is_refused(copied):
    base = copied("untied")
    edit_weights(base, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(ModelError, match=r"lacks tensor 'lm_head\.weight'.*with random numbers"):
        ties_of(Checkpoint(base))


def test_a_rounded_copy_is_another_tensor(copied):
    base = copied("tied, with a copy")

    def round_head(tensors):
        tensors[HEAD] = tensors[HEAD].bfloat16()

    edit_weights(base, round_head)
    with pytest.raises(ModelError, match=r"'lm_head\.weight' differs from .*tie_word_embeddings"):
        ties_of(Checkpoint(base))


def test_a_file_that_stores_the_head_instead_of_the_embedding_is_read(saved, copied, tmp_path):
    base, tuned = saved("tied by the class", 0), copied("tied, with a copy", 1)
    edit_weights(tuned, lambda tensors: tensors.pop(EMBEDDING))
    expected = logits_of(saved("tied, with a copy", 1))
    assert_equal_logits(by_writer(base, tuned, tmp_path), expected)


@pytest.mark.parametrize("is_silent", [True, False])
def test_without_a_known_class_the_config_and_the_names_decide_what_is_tied(copied, is_silent):
    base = copied("tied by the config")
    edit_config(base, model_type="new", **({"tie_word_embeddings": None} if is_silent else {}))
    ties = ties_of(Checkpoint(base))
    assert (ties.groups, ties.is_assumed) == (((EMBEDDING, HEAD),), is_silent)
    untied = copied("untied", 1)
    edit_config(untied, model_type="new", tie_word_embeddings=None)
    assert ties_of(Checkpoint(untied)).groups == ()
    resolved = ResolvedModel(untied, "base")
    if is_silent:
        with pytest.raises(ModelError, match=r"lacks tensor 'lm_head\.weight'.*neither its config"):
            open_vector("v", str(base), resolved)
    else:
        open_vector("v", str(base), resolved)


# -- adapters --------------------------------------------------------------------------------------

TIED = {"ensure_weight_tying": True}
PLAIN = {"target_modules": ["q_proj"]}
ADAPTERS = {
    "factors, embedding": {"target_modules": ["embed_tokens"]},
    "factors, head": {"target_modules": ["lm_head"]},
    "factors, both": {"target_modules": ["embed_tokens", "lm_head"]},
    "factors, embedding, tied": {"target_modules": ["embed_tokens"], **TIED},
    "factors, head, tied": {"target_modules": ["lm_head", "q_proj"], **TIED},
    "saved embedding": {**PLAIN, "modules_to_save": ["embed_tokens"]},
    "saved head": {**PLAIN, "modules_to_save": ["lm_head"]},
    "saved both": {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved embedding, tied": {**PLAIN, "modules_to_save": ["embed_tokens"], **TIED},
    "tokens": {**PLAIN, "trainable_token_indices": [5, 9]},
    "tokens of the head": {**PLAIN, "trainable_token_indices": {"lm_head": [5, 9]}},
    "tokens of both": {
        **PLAIN,
        "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]},
    },
}
MOVE_BOTH = {"factors, embedding, tied", "factors, head, tied", "saved embedding, tied"}
MERGED_BY_PEFT = {"saved embedding, tied", "tokens", "tokens of both"}
NAMES = r"lm_head|embed_tokens|trainable_token"
QUIET = [
    pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested .ensure_weight_tying:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer:UserWarning"),
]


@pytest.fixture(scope="module")
def adapter(saved, tmp_path_factory):
    """Return a function form of the base, kind -> directory of an adapter and the logits of the
    model that PEFT trained, not merged, in float64.
    """
    made = {}

    def make(form: str, kind: str) -> tuple[Path, torch.Tensor]:
        if (form, kind) not in made:
            base = saved(form, 0)
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            options = json.loads(json.dumps(ADAPTERS[kind]))  # PEFT changes the lists
            lora = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)
            model = get_peft_model(model, lora)
            torch.manual_seed(3)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.3 * torch.randn_like(parameter))
            path = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(path)
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
            made[form, kind] = path, logits(PeftModel.from_pretrained(model, str(path)))
        return made[form, kind]

    return make


def by_peft(base: Path, source: Path, folder: Path) -> torch.Tensor:
    resolved = ResolvedModel(base, "base")
    extract_any_adapter(
        "v", ResolvedModel(source, "v"), resolved, folder / "delta", dtype="float32"
    )
    return by_writer(base, folder / "delta", folder)


def quiet(function):
    for mark in QUIET:
        function = mark(function)
    return function


def is_accepted(form: str, kind: str, way: str) -> bool:
    """Whether an adapter has a delta: a tied pair is moved alike, and PEFT's own merge does so."""
    accepted = MERGED_BY_PEFT if way == "from-adapter" or "tokens" in kind else MOVE_BOTH
    return form == "untied" or kind in accepted


@quiet
@pytest.mark.parametrize(
    ("form", "kind", "way"),
    [
        *itertools.product(FORMS, ADAPTERS, ["writer"]),
        *itertools.product(FORMS[1:3], ADAPTERS, ["from-adapter"]),
        *itertools.product(FORMS[1:3], sorted(MOVE_BOTH), ["search"]),
    ],
)
def test_weight_one_gives_the_adapter_as_trained_or_is_refused_by_name(
    saved, adapter, tmp_path, form, kind, way
):
    base, (path, expected) = saved(form, 0), adapter(form, kind)
    run = by_peft if way == "from-adapter" else WAYS[way]
    if is_accepted(form, kind, way):
        assert_equal_logits(run(base, path, tmp_path), expected)
        return
    with pytest.raises(ModelError, match=NAMES):
        run(base, path, tmp_path)
    assert not (tmp_path / "out").exists()


@quiet
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *(("tied by the class", kind) for kind in ADAPTERS if "tokens" not in kind),
        ("untied", "factors, both"),
        ("untied", "saved both"),
    ],
)
def test_a_run_is_refused_before_it_packs_or_trains_what_a_merge_gives(
    saved, corpus_dir, tmp_path, form, kind
):
    base = saved(form, 0)
    config = TrainConfig(
        format_version=1,
        name="v",
        base_model=str(base),
        corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
        block_size=16,
        max_tokens=16,
        lora={"r": 2, "lora_alpha": 4, **json.loads(json.dumps(ADAPTERS[kind]))},
        trainer={"learning_rate": 0.1, "bf16": False, "warmup_steps": 0, "save_strategy": "no"},
    )
    if form == "tied by the class" and kind != "saved embedding, tied":
        with pytest.raises((ModelError, ConfigError), match=NAMES):
            train(config, tmp_path / "v")
        assert not (tmp_path / "v").exists()
        return
    train(config, tmp_path / "v")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    expected = logits(PeftModel.from_pretrained(model, str(tmp_path / "v")))
    assert (expected - logits_of(base)).norm() > 1e-3 * expected.norm()
    assert_equal_logits(by_writer(base, tmp_path / "v", tmp_path), expected)
