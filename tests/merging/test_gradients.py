"""gradients.py: the derivative in every weight against central differences in float64."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from optimer_hf.merging.gradients import Derivatives
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.union import open_base
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.head_loss import differentiable_log_probabilities
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.plain_head import plain_weight, softcap_of
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.extraction import extract_vector
from optimer_hf.vectors.opening import open_vector
from tests.support.added_tokens import END, START, save_adapter, save_tuned, with_tokens
from tests.support.tiny import GROUPED, VOCABULARY, WIDE, qwen35_multimodal

WEIGHTS = {"ja": 0.8, "math": -0.35, "it": 0.0}
STEP = 0.005
IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "gemma2, softcap": lambda: transformers.Gemma2Config(
        **GROUPED, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=10.0
    ),
    "llama, untied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama, tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gpt2, input-first": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
    "gpt neox, fused": lambda: transformers.GPTNeoXConfig(**WIDE),
    "mixtral, experts": lambda: transformers.MixtralConfig(**GROUPED, **EXPERTS),
    "gpt-oss, experts": lambda: transformers.GptOssConfig(**GROUPED, **EXPERTS, head_dim=8),
    "qwen3.5, renamed": qwen35_multimodal,
}
CLASSES = {"qwen3.5, renamed": transformers.Qwen3_5ForConditionalGeneration}
POOLS = {
    "checkpoint": ("checkpoint", "checkpoint", "checkpoint"),
    "mixed": ("int8", "delta", "checkpoint"),
    "adapter": ("adapter", "adapter", "adapter"),
    "adapter and delta": ("adapter", "delta", "adapter with a saved norm"),
    "wide adapter": ("wide adapter", "adapter", "adapter"),
}
CASES = [
    *((name, "checkpoint") for name in ARCHITECTURES),
    *(("gemma2, softcap", pool) for pool in POOLS if pool != "checkpoint"),
    ("llama, untied", "adapter"),
    ("llama, untied", "mixed"),
    ("gpt2, input-first", "adapter"),
]


@pytest.fixture(scope="module")
def make_pool(tmp_path_factory):
    """Return a function architecture, kinds, dtype -> base and vectors that change its loss."""
    made: dict[tuple[str, str], Path] = {}

    def base_of(architecture: str) -> Path:
        if (architecture, "") not in made:
            torch.manual_seed(0)
            config = ARCHITECTURES[architecture]()
            cls = CLASSES.get(architecture)
            model = cls(config) if cls else transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            made[architecture, ""] = tmp_path_factory.mktemp("base")
            model.save_pretrained(made[architecture, ""])
        return made[architecture, ""]

    def source(base: ResolvedModel, architecture: str, kind: str, seed: int) -> Path:
        key = (architecture, f"{kind} {seed}")
        if key in made:
            return made[key]
        torch.manual_seed(seed + 1)
        made[key] = out = tmp_path_factory.mktemp("vector") / "vector"
        cls = CLASSES.get(architecture, transformers.AutoModelForCausalLM)
        if "adapter" in kind:
            rank = 24 if "wide" in kind else 3
            model = transformers.AutoModelForCausalLM.from_pretrained(base.path)
            saved = ["norm"] if "saved" in kind else None
            config = LoraConfig(
                r=rank,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
                modules_to_save=saved,
                fan_in_fan_out="gpt2" in architecture,
            )
            model = get_peft_model(model, config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name or "modules_to_save" in name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(out)
        elif kind == "checkpoint":
            model = cls.from_pretrained(base.path, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            model.save_pretrained(out)
        else:
            tuned = source(base, architecture, "checkpoint", seed)
            stored = "int8" if kind == "int8" else "float32"
            extract(open_vector("x", str(tuned), base), base, out, dtype=stored)
        return out

    def pool(architecture: str, kinds: tuple[str, ...]):
        path = base_of(architecture)
        base = ResolvedModel(path, path.name)
        paths = [source(base, architecture, kind, seed) for seed, kind in enumerate(kinds)]
        pairs = zip(WEIGHTS, paths, strict=True)
        return base, [open_vector(name, str(path), base) for name, path in pairs]

    return pool


def log_likelihood(model, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-likelihood of the tokens, from whole logits."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).sum()


def derivatives_of(resident: ResidentModel, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, float]:
    """Return the derivatives of the log-likelihood, and itself, through the head without logits."""
    derivatives, model = Derivatives(resident), resident.model
    with derivatives.active():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        values, _ = differentiable_log_probabilities(
            hidden.flatten(0, 1), plain_weight(model), ids[:, 1:].flatten(), softcap_of(model)
        )
        values.sum().backward()
        return derivatives.take(), values.sum().item()


def central_difference(base, vectors, weights, name: str, folder: Path, ids=IDS) -> float:
    """Return the derivative from two written merges, in float64."""

    def value(step: float) -> float:
        moved = weights | {name: weights[name] + step * STEP}
        write_merged(base, vectors, moved, folder, out_dtype="float32", replace=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        with torch.no_grad():
            return log_likelihood(model.eval().double(), ids).item()

    return (value(1) - value(-1)) / (2 * STEP)


@pytest.mark.parametrize(("architecture", "pool"), CASES)
def test_derivatives_equal_central_differences(make_pool, architecture, pool, tmp_path):
    base, vectors = make_pool(architecture, POOLS[pool])
    resident = ResidentModel(base, vectors, dtype="float32")
    resident.set_weights(WEIGHTS)
    found, _ = derivatives_of(resident)
    expected = [
        central_difference(base, vectors, WEIGHTS, name, tmp_path / "merged") for name in WEIGHTS
    ]
    largest = max(map(abs, expected))
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4 * largest)
    assert largest > 0.1, "a pool that changes nothing shows nothing"


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_derivatives_of_a_union_equal_central_differences(make_base, kind, tmp_path):
    base = make_base(kind, torch.float32)
    tuned = save_tuned(base, tmp_path / "ja", with_tokens(base.path, [START, END]), seed=1)
    other = save_tuned(base, tmp_path / "other", with_tokens(base.path, [END, START]), seed=2)
    extract_vector(other, base.path, tmp_path / "math", dtype="float32")
    options = {"target_modules": ["q_proj", "embed_tokens"] + ["lm_head"] * (kind == "llama")}
    options |= {"ensure_weight_tying": True} if kind == "gemma" else {}
    save_adapter(
        base, tmp_path / "it", with_tokens(base.path, [END]), seed=3, lora_alpha=1, **options
    )
    sources = {"ja": str(tuned)} | {name: str(tmp_path / name) for name in ("math", "it")}
    grown, _ = open_base(base, sources, None, "union")
    vectors = [open_vector(name, source, grown) for name, source in sources.items()]
    ids = torch.cat([IDS, torch.tensor([[259, 260, 259], [260, 259, 260]])], dim=1)
    resident = ResidentModel(grown, vectors, dtype="float32")
    resident.set_weights(WEIGHTS)
    found, _ = derivatives_of(resident, ids)
    expected = [
        central_difference(grown, vectors, WEIGHTS, name, tmp_path / "merged", ids)
        for name in WEIGHTS
    ]
    largest = max(map(abs, expected))
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4 * largest)
    assert largest > 0.1


def test_a_gradient_that_is_a_part_of_other_memory_counts_where_it_begins(make_pool):
    """Autograd may hand over such a part, for instance where a model joins two weights."""
    base, vectors = make_pool("llama, untied", POOLS["checkpoint"])
    resident = ResidentModel(base, vectors, dtype="float32")
    derivatives = Derivatives(resident)
    with derivatives.active():
        leaf = derivatives._hooked[0]
        memory = torch.randn(2 * leaf.numel())
        totals = []
        for gradient in (memory[leaf.numel() :].clone(), memory[leaf.numel() :]):
            leaf.grad = gradient.view(leaf.shape)
            derivatives._collect(leaf)
            totals.append(derivatives.take())
    assert totals[0].abs().min() > 0
    assert torch.equal(*totals)
