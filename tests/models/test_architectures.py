"""Merges of many architectures: the writer works from tensor names and knows none of them."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ModelError
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.resolve import resolve_base
from optimer_hf.searching.loop import search
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.run import train
from optimer_hf.vectors.delta import extract, write_record
from optimer_hf.vectors.opening import open_vector
from tests.support.tiny import GROUPED, VOCABULARY, WIDE, bits, gemma3_multimodal, qwen35_multimodal

EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


ARCHITECTURES = {
    "Gemma3ForConditionalGeneration": lambda: gemma3_multimodal(head_dim=16),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "Qwen3ForCausalLM": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "MistralForCausalLM": lambda: transformers.MistralConfig(**GROUPED),
    "GPTNeoXForCausalLM": lambda: transformers.GPTNeoXConfig(**WIDE),
    "MambaForCausalLM": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2
    ),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**GROUPED, **EXPERTS),
    "Qwen3MoeForCausalLM": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2, head_dim=8
    ),
    "GptOssForCausalLM": lambda: transformers.GptOssConfig(**GROUPED, **EXPERTS, head_dim=8),
}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda name: name)
def models(request, tmp_path_factory):
    """Class, base and two fine-tunes of an architecture, in bfloat16."""
    cls = getattr(transformers, request.param)
    torch.manual_seed(0)
    model = cls(ARCHITECTURES[request.param]()).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "base")
    for name in ("ja", "math"):
        tuned = cls.from_pretrained(folder / "base", dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        tuned.save_pretrained(folder / name)
    return cls, ResolvedModel(folder / "base", "base"), [folder / "ja", folder / "math"]


@pytest.mark.parametrize("stored", ["checkpoint", "delta", "int8"])
def test_every_architecture_is_merged_by_its_tensor_names_and_loads(models, stored, tmp_path):
    cls, base, tuned = models
    pool = [open_vector(path.name, str(path), base) for path in tuned]
    weights = {"ja": 0.7123, "math": -0.4057}  # of 0.7 times five steps, half is a tie
    exact = {
        name: Checkpoint(base.path).read(name).double()
        + sum(
            weights[path.name]
            * (Checkpoint(path).read(name).double() - Checkpoint(base.path).read(name).double())
            for path in tuned
        )
        for name in Checkpoint(base.path).names
    }
    if stored != "checkpoint":
        dtype = "int8" if stored == "int8" else "float32"
        for vector in pool:
            extract(vector, base, tmp_path / vector.name, dtype=dtype)
        pool = [open_vector(path.name, str(tmp_path / path.name), base) for path in tuned]
    write_merged(base, pool, weights, tmp_path / "out", max_shard_size=30_000)
    merged = Checkpoint(tmp_path / "out")
    assert merged.names == Checkpoint(base.path).names
    right = []
    for name in merged.names:
        assert merged.shape(name) == Checkpoint(base.path).shape(name)
        written, expected = merged.read(name), exact[name].to(torch.bfloat16)
        if stored == "int8":
            torch.testing.assert_close(written, expected, rtol=2e-2, atol=1e-3)
        else:
            right.append((written == expected).flatten())
    assert stored == "int8" or torch.cat(right).double().mean().item() >= 0.999
    loaded, information = cls.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    out = loaded(input_ids=torch.tensor([[2, 70, 71]])).logits
    assert out.shape == (1, 3, loaded.config.get_text_config().vocab_size)
    assert out.isfinite().all()


def test_weights_set_in_place_equal_written_ones_for_every_architecture(models, tmp_path):
    _, base, tuned = models
    pool = [open_vector(path.name, str(path), base) for path in tuned]
    resident = ResidentModel(base, pool, dtype="bfloat16")
    names = set(Checkpoint(base.path).names)
    for number, weights in enumerate(({"ja": 0.7, "math": -0.4}, {"ja": 0.0, "math": 0.0})):
        write_merged(base, pool, weights, tmp_path / f"written-{number}")
        resident.set_weights(weights)
        resident.model.save_pretrained(tmp_path / f"held-{number}")  # float32 on some machines
        written, held = (Checkpoint(tmp_path / f"{kind}-{number}") for kind in ("written", "held"))
        assert names <= {*held.names, "lm_head.weight"}
        for name in names.intersection(held.names):
            assert torch.equal(bits(held.read(name).to(torch.bfloat16)), bits(written.read(name)))


RENAMED = {
    "Gemma3ForConditionalGeneration": lambda: gemma3_multimodal(head_dim=16),
    "MixtralForCausalLM": ARCHITECTURES["MixtralForCausalLM"],
    "Qwen3_5ForConditionalGeneration": qwen35_multimodal,
}


@pytest.mark.parametrize("name", RENAMED)
def test_adapters_of_models_that_transformers_renames_are_merged_as_peft_merges_them(
    name, tmp_path
):
    torch.manual_seed(0)
    getattr(transformers, name)(RENAMED[name]()).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj", "o_proj"], "r": 4, "lora_alpha": 8}
    adapted = get_peft_model(model, LoraConfig(**targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    base = ResolvedModel(tmp_path / "base", "base")
    vector = open_vector("v", str(tmp_path / "adapter"), base)
    assert vector.names <= set(Checkpoint(base.path).names)
    write_merged(base, [vector], {"v": 1.0}, tmp_path / "out", out_dtype="float32")
    adapted.merge_and_unload().save_pretrained(tmp_path / "expected")
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "expected")
    for key in vector.names:
        torch.testing.assert_close(ours.read(key), theirs.read(key))
        assert not torch.equal(ours.read(key), Checkpoint(base.path).read(key))
    resident = ResidentModel(base, [vector], dtype="float32")
    resident.set_weights({"v": 1.0})
    ids = torch.tensor([[2, 70, 71]])
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "expected")(ids).logits
    torch.testing.assert_close(resident.model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_multimodal_gemma_is_trained_and_searched(save_model, corpus_dir, tmp_path):
    torch.manual_seed(0)
    path = save_model(transformers.Gemma3ForConditionalGeneration(gemma3_multimodal(head_dim=16)))
    for name in ("aaa", "xyz"):
        config = TrainConfig(
            name=name,
            base_model=str(path),
            corpus=CorpusConfig(path=corpus_dir / f"{name}.train.jsonl"),
            block_size=32,
            max_tokens=512,
            lora={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            trainer={"learning_rate": 2e-2, "per_device_train_batch_size": 4, "bf16": False},
        )
        train(config, tmp_path / name)
        write_record(tmp_path / name, resolve_base(str(path)), name=name, kind="adapter")
    terms = [{"text": str(corpus_dir / f"{name}.search.jsonl")} for name in ("aaa", "xyz")]
    study = search(
        StudyConfig.model_validate(
            {
                "base_model": str(path),
                "dtype": "float32",
                "vectors": {name: {"source": str(tmp_path / name)} for name in ("aaa", "xyz")},
                "objective": {"limit": 4, "terms": terms},
                "search": {"n_trials": 4, "rescore_top": 0},
            }
        ),
        tmp_path / "study",
    )
    alone = study.trials[1]
    assert alone.origin == "aaa alone"
    own = next(label for label in alone.terms if label.startswith("aaa"))
    assert alone.terms[own].score < study.base[own].score, "the vector helps its own domain"


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern:RuntimeWarning"
)  # PEFT's own
def test_a_lora_of_fused_experts_is_refused_before_it_is_trained(save_model, corpus_dir, tmp_path):
    torch.manual_seed(0)
    path = save_model(transformers.MixtralForCausalLM(ARCHITECTURES["MixtralForCausalLM"]()))
    config = TrainConfig(
        name="aaa",
        base_model=str(path),
        corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
        block_size=32,
        max_tokens=128,
        lora={"r": 4, "target_modules": "all-linear"},
        trainer={"bf16": False},
    )
    told = r"adapts 'model\.layers\.0\.mlp\.experts.*: \[gate, k_proj, o_proj, q_proj, v_proj\]\."
    with pytest.raises(ModelError, match=told):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    named = {"r": 4, "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"]}
    train(config.model_copy(update={"lora": named}), tmp_path / "out")
    open_vector("aaa", str(tmp_path / "out"), resolve_base(str(path)))
