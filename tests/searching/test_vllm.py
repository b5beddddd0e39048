"""engine.py, vllm_model.py, vllm_worker.py: a real engine of vLLM on tiny models.

`.ci/vllm` runs these in an environment of their own; elsewhere they are skipped.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.comparison.sealed import compare, with_pool
from optimer_hf.errors import ConfigError, EvaluationError, StudyError
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.recipes.adapter import build_adapter
from optimer_hf.recipes.build import build
from optimer_hf.recipes.write import write_recipe
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.tasks import load_tasks
from optimer_hf.searching.engine import keep_engine, open_engine
from optimer_hf.searching.loop import search
from optimer_hf.searching.one_model import score_model
from optimer_hf.searching.trial import ResidentPool
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.engine import OWN_OPTIONS, TRANSFORMERS, EngineConfig
from optimer_hf.vectors.extraction import extract_vector
from optimer_hf.vectors.opening import open_vector
from tests.support.added_tokens import (
    END,
    START,
    save_adapter,
    save_tuned,
    with_tokens,
    write_chat_task,
)
from tests.support.engines import (
    ENGINE,
    engine_model,
    engine_processes,
    needs_vllm,
    write_generation_task,
)

pytestmark = [
    needs_vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of vLLM and its many dependencies
]
CLOSE = {"rel": 2e-4, "abs": 2e-3}  # two engines, float32, in nats or bits


@pytest.fixture(scope="module")
def study_file(tmp_path_factory, save_model, make_adapter, corpus_dir) -> Path:
    """A study with four LoRA vectors whose terms are of each kind: rolling log-likelihood, choices
    and generation.
    """
    folder = tmp_path_factory.mktemp("vllm")
    path = save_model(engine_model("gemma"), "engine-base")
    base = ResolvedModel(path, path.name)
    write_generation_task(folder)
    terms = [
        {"text": str(corpus_dir / "aaa.search.jsonl")},
        {"text": str(corpus_dir / "xyz.search.jsonl")},
        {"task": "tiny_choice", "metric": "acc"},
        {"task": "tiny_generate", "metric": "exact_match"},
    ]
    config = {
        "format_version": 1,
        "base_model": str(path),
        "dtype": "float32",
        "engine": ENGINE,
        "vectors": {f"v{seed}": str(make_adapter(base, seed)) for seed in range(4)},
        "objective": {"include_path": str(folder), "terms": terms, "limit": 4},
        "test": {"terms": [{"name": "aaa", "text": str(corpus_dir / "aaa.test.jsonl")}]},
        "search": {"n_trials": 9, "rescore_top": 1},
        "baselines": {"models": {"another": str(make_adapter(base, 9))}},
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="module")
def searched(study_file: Path, tmp_path_factory):
    """The finished study."""
    return search(StudyConfig.read(study_file), tmp_path_factory.mktemp("searched") / "s")


def test_a_study_in_vllm_scores_what_transformers_scores(searched):
    """The reference: the same trials in the engine transformers, in float32."""
    config = searched.config.model_copy(update={"engine": TRANSFORMERS})
    pool = ResidentPool(config)
    for trial in searched.trials[:4]:
        scores = pool.score(trial.weights, config.objective.asked_terms("search")).terms
        assert trial.status == "ok"
        assert trial.n_tokens > 0
        for label, term in trial.terms.items():
            tops = [top for top, _ in term.items]
            assert tops == pytest.approx([top for top, _ in scores[label].items], **CLOSE)
    assert len({trial.terms["aaa"].score for trial in searched.trials}) == len(searched.trials)


def test_a_killed_study_goes_on_to_the_same_trials_and_leaves_no_engine(
    searched, study_file, tmp_path
):
    command = [sys.executable, "-m", "optimer_hf", "search", str(study_file), str(tmp_path / "s")]
    process = subprocess.Popen(command)
    trials = tmp_path / "s" / "trials.jsonl"
    _wait_until(lambda: trials.exists() and trials.read_bytes().count(b"\n") >= 4)
    engine = engine_processes(process.pid)
    assert len(engine) >= 1
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = trials.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert kept.count(b"\n") < 10
    _wait_until(lambda: not any(each.is_running() for each in engine), seconds=20)
    resumed = search(StudyConfig.read(study_file), tmp_path / "s")
    assert trials.read_bytes().startswith(kept)
    assert len(resumed.log.trials) == len(searched.log.trials)
    for one, other in zip(resumed.log.trials, searched.log.trials, strict=True):
        assert_same_trial(one, other)


def assert_same_trial(one, other) -> None:
    """Trials are the same but for rounding: vLLM forms its batches by the time that items arrive,
    and a sum of another batch is rounded in another way.
    """
    assert (one.number, one.origin, one.fidelity) == (other.number, other.origin, other.fidelity)
    assert one.status == other.status == "ok"
    assert one.weights == pytest.approx(other.weights, abs=1e-3)
    assert one.terms.keys() == other.terms.keys()
    for label, term in one.terms.items():
        tops = [top for top, _ in term.items]
        assert tops == pytest.approx([top for top, _ in other.terms[label].items], **CLOSE)


def _wait_until(is_true, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_built_merge_scores_in_vllm_what_its_trial_scored(searched, tmp_path):
    write_recipe(searched, tmp_path / "recipe.yaml", name="tiny")
    build(tmp_path / "recipe.yaml", tmp_path / "built")
    best = searched.best_trial
    objective = searched.config.objective.model_copy(update={"limit": None})
    scores = score_model(
        str(tmp_path / "built"), objective, dtype="float32", engine=searched.config.engine
    )
    assert best.fidelity == "rescore"
    assert {label: term.items for label, term in scores.items()} == {
        label: term.items for label, term in best.terms.items()
    }


def test_the_sealed_test_is_scored_in_the_engine_of_the_study(searched):
    rows = {row.kind: row for row in compare(searched).rows}
    config = searched.config.model_copy(update={"engine": TRANSFORMERS})
    pool = ResidentPool(config)
    asked = config.test.asked_terms("rescore")
    for row in (rows["base"], rows["merge"]):
        scores = pool.score(row.weights, asked).terms
        assert row.scores["aaa"].score == pytest.approx(scores["aaa"].score, rel=2e-4)
    another = score_model_of("another", config, asked)
    assert rows["model"].scores["aaa"].score == pytest.approx(another["aaa"].score, rel=2e-4)


def score_model_of(name: str, config: StudyConfig, asked) -> dict:
    """Score a model of the baselines at weight 1, in the engine of a config."""
    pool = ResidentPool(with_pool(config, {name: config.baselines.models[name]}, {}))
    return pool.score({name: 1.0}, asked).terms


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma", {"tensor_parallel_size": 2}),
        ("llama", {}),
        ("tied llama", {"enable_prefix_caching": True}),
    ],
)
def test_weights_of_all_kinds_of_vectors_are_set(
    kind, options, save_model, make_adapter, corpus_dir, tmp_path
):
    """A LoRA of two modules, so that fused layers are reloaded in part, and a whole model; the
    reference is the model of transformers with the same sums, in float64.
    """
    path = save_model(engine_model(kind), f"engine-{kind}")
    base = ResolvedModel(path, path.name)
    tuned = engine_model(kind)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    sources = {
        "lora": make_adapter(base, 1, target_modules=["q_proj", "down_proj"]),
        "whole": save_model(tuned, "engine-tuned"),
    }
    vectors = [open_vector(name, str(source), base) for name, source in sources.items()]
    write_generation_task(tmp_path)
    objective = Objective.model_validate(
        {
            "include_path": str(tmp_path),
            "terms": [
                {"text": str(corpus_dir / "mix.search.jsonl")},
                {"task": "tiny_choice", "metric": "acc"},
                {"task": "tiny_generate", "metric": "exact_match"},
            ],
        }
    )
    asked, tasks = objective.asked_terms("rescore"), load_tasks([objective])
    tokenizer = AutoTokenizer.from_pretrained(path)
    with keep_engine():
        engine = open_engine(
            EngineConfig(**ENGINE | options),
            base,
            vectors,
            dtype="float32",
            scoring_tokenizer=tokenizer,
        )
        evaluator = Evaluator.of(engine.lm, tasks, [objective])
        scored = []
        for weights in ({}, {"lora": 0.7}, {"lora": 0.3, "whole": 1.0}, {"whole": -0.5}, {}):
            engine.set_weights(weights)
            scored.append((weights, evaluator.evaluate(asked)))
        for process in engine_processes():  # as the system does when memory runs out
            process.kill()
        with pytest.raises(StudyError, match="vLLM's engine has died"):
            engine.set_weights({})
    assert scored[0][1] == scored[-1][1]  # the base again, bit for bit
    for weights, scores in scored:
        model = _merged_in_float64(path, vectors, weights)
        expected = Evaluator(model, tokenizer, [objective]).evaluate(asked)
        for label, term in scores.items():
            tops, reference = ([top for top, _ in each.items] for each in (term, expected[label]))
            assert tops == pytest.approx(reference, **CLOSE), (weights, label)


def _merged_in_float64(path: Path, vectors, weights):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            total = parameter.double()
            for vector in vectors:
                if name in vector.names:
                    rows = slice(0, len(parameter))
                    delta = vector.delta(name, rows, "cpu")
                    dense = _dense(delta, parameter).reshape(parameter.shape)
                    total = total + weights.get(vector.name, 0.0) * dense
            parameter.copy_(total)
    return model


def _dense(delta, parameter):
    from optimer_hf.vectors.forms import LowRank

    if isinstance(delta, LowRank):
        return delta.scale * (delta.b.double() @ delta.a.double())
    return delta.tensor.double() - parameter.double()


def test_every_option_of_llm_reaches_it(study_file, monkeypatch):
    """All but those that follow from the rest of the study, which are refused."""
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    from optimer_hf.scoring.vllm_model import make_vllm_model

    given = {field.name: 7 for field in fields(EngineArgs) if field.name not in OWN_OPTIONS}
    config = EngineConfig.model_validate({"name": "vllm"} | given)

    class StartedError(Exception):
        pass

    def start(**options):
        assert {name: options[name] for name in given} == given
        raise StartedError

    path = Path(yaml.safe_load(study_file.read_text())["base_model"])
    with pytest.raises(StartedError), monkeypatch.context() as patch:
        patch.setattr("lm_eval.models.vllm_causallms.LLM", start)
        make_vllm_model(path, None, config.options)
    assert len(given) > 100


# -- a weight for each group -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "of_lora"),
    [
        (["self_attn", "mlp", "else"], ["q_proj", "else"]),
        ({"layers": 2}, {"gradient": 2}),
        ({"gradient": 2}, ["layers.0:1", "layers.1:2"]),
    ],
)
def test_groups_in_vllm_score_what_transformers_scores(
    by, of_lora, tmp_path, save_model, make_adapter, corpus_dir
):
    path = save_model(engine_model("llama"), "groups-base")
    base = ResolvedModel(path, path.name)
    save_tuned(base, tmp_path / "math", AutoTokenizer.from_pretrained(path), seed=1)
    data = {
        "base_model": str(path),
        "dtype": "float32",
        "engine": ENGINE,
        "vectors": {
            "math": {"source": str(tmp_path / "math"), "by": by},
            "lora": {"source": str(make_adapter(base, 1)), "by": of_lora},
        },
        "objective": {"terms": [{"text": str(corpus_dir / "aaa.search.jsonl"), "limit": 4}]},
    }
    config = StudyConfig.model_validate(data)
    asked = config.objective.asked_terms("search")
    weights = {name: (-1) ** n * (0.4 + 0.3 * n) for n, name in enumerate(config.weight_names)}
    plain = ResidentPool(config.model_copy(update={"engine": TRANSFORMERS}))
    with keep_engine():
        pool = ResidentPool(config)
        for each in ({}, weights, dict.fromkeys(weights, 0.5)):
            expected = [top for top, _ in plain.score(each, asked).terms["aaa"].items]
            tops = [top for top, _ in pool.score(each, asked).terms["aaa"].items]
            assert tops == pytest.approx(expected, **CLOSE)


# -- tokens that the base lacks --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_union_in_vllm_scores_what_transformers_scores(kind, tmp_path, save_model, corpus_dir):
    """Its rows of embedding and head, in the order of the base, come with a checkpoint, an int8
    delta and the factors of an adapter.
    """
    path = save_model(engine_model(kind), "union-base")
    base = ResolvedModel(path, path.name)
    save_tuned(base, tmp_path / "chat", with_tokens(path, [START, END]), seed=1)
    save_tuned(base, tmp_path / "other", with_tokens(path, [END, START]), seed=2)
    extract_vector(tmp_path / "other", path, tmp_path / "delta", dtype="int8")
    options = {"target_modules": ["q_proj", "embed_tokens"] + ["lm_head"] * (kind == "llama")}
    options |= {} if kind == "llama" else {"ensure_weight_tying": True}
    save_adapter(base, tmp_path / "lora", with_tokens(path, [END]), seed=3, **options)
    task = write_chat_task(tmp_path)
    data = {
        "base_model": str(path),
        "dtype": "float32",
        "engine": ENGINE,
        "vectors": {name: str(tmp_path / name) for name in ("chat", "delta", "lora")},
        "vocabulary": "union",
        "tokenizer_source": "chat",
        "objective": {
            "include_path": str(task.parent),
            "terms": [
                {"text": str(corpus_dir / "aaa.search.jsonl"), "limit": 4},
                {"task": "chatty", "metric": "acc"},
            ],
            "apply_chat_template": True,
        },
    }
    config = StudyConfig.model_validate(data)
    asked = config.objective.asked_terms("search")
    weights = ({}, {"chat": 0.6, "delta": -0.3, "lora": 0.8})
    plain = ResidentPool(config.model_copy(update={"engine": TRANSFORMERS}))
    expected = [plain.score(each, asked).terms for each in weights]
    with keep_engine():
        pool = ResidentPool(config)
        scored = [pool.score(each, asked).terms for each in weights]
    for one, other in zip(scored, expected, strict=True):
        for label, term in one.items():
            tops = [top for top, _ in term.items]
            assert tops == pytest.approx([top for top, _ in other[label].items], **CLOSE)
    assert expected[0]["aaa"].score != pytest.approx(expected[1]["aaa"].score, rel=1e-2)


# -- a merged adapter ------------------------------------------------------------------------------


def test_a_merged_adapter_in_vllm_has_the_log_probabilities_of_peft(
    tmp_path, save_model, make_adapter
):
    """`optimer build --as adapter`: vLLM serves the base, with the adapter for one request."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    path = save_model(engine_model("llama"), "adapter-base")
    base = ResolvedModel(path, path.name)
    vectors = {
        f"v{seed}": {"source": str(make_adapter(base, seed)), "weight": weight}
        for seed, weight in enumerate((0.8, -0.4))
    }
    recipe = {"format_version": 1, "name": "sum", "base_model": str(path), "dtype": "float32"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"vectors": vectors}))
    build_adapter(tmp_path / "recipe.yaml", tmp_path / "adapter")
    ids = torch.randint(3, 259, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    options = {key: value for key, value in ENGINE.items() if key != "name"}
    engine = LLM(model=str(path), dtype="float32", enable_lora=True, max_lora_rank=8, **options)
    try:
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0.0)
        adapter = LoRARequest("sum", 1, str(tmp_path / "adapter"))
        found = [
            [
                each[token].logprob
                for token, each in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
            ]
            for request in (None, adapter)
            for answer in engine.generate(
                {"prompt_token_ids": ids}, sampling, lora_request=request, use_tqdm=False
            )
        ]
    finally:
        engine.llm_engine.engine_core.shutdown()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = [log_probabilities(model, ids)]
    expected.append(log_probabilities(PeftModel.from_pretrained(model, tmp_path / "adapter"), ids))
    assert found[0] == pytest.approx(expected[0], abs=2e-4)
    assert found[1] == pytest.approx(expected[1], abs=2e-4)
    assert max(abs(a - b) for a, b in zip(*expected, strict=True)) > 0.1


def log_probabilities(model, ids: list[int]) -> list[float]:
    """Return the log-probability of each token but the first."""
    with torch.no_grad():
        rows = model.eval()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return rows[range(len(ids) - 1), ids[1:]].tolist()


# -- bad input -------------------------------------------------------------------------------------


def refused(study_file: Path, tmp_path: Path, **changes) -> str:
    """Search a changed study, and return why nothing was scored."""
    data = yaml.safe_load(study_file.read_text()) | changes
    with pytest.raises((ConfigError, EvaluationError, StudyError)) as error:
        search(StudyConfig.model_validate(data), tmp_path / "s")
    assert not (tmp_path / "s" / "trials.jsonl").exists()
    assert not engine_processes()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "must be divisible by tensor parallel size"),
        ({"max_model_length": 64}, r"no option 'max_model_length'. Did you mean 'max_model_len'"),
        ({"max_model_len": "many"}, "max_model_len"),
        ({"max_model_len": 10**6}, "max_model_len"),
    ],
)
def test_options_that_vllm_cannot_use_are_refused_before_it_starts(
    options, message, study_file, tmp_path
):
    text = refused(study_file, tmp_path, engine=ENGINE | options)
    assert text.startswith("engine: ")
    assert message in text


def test_a_model_that_vllm_does_not_know_is_refused_before_it_starts(
    study_file, tmp_path, save_model
):
    from transformers import XGLMConfig, XGLMForCausalLM

    config = XGLMConfig(
        vocab_size=259, d_model=32, num_layers=1, attention_heads=4, ffn_dim=32, pad_token_id=0
    )
    path = save_model(XGLMForCausalLM(config), "unknown")
    text = refused(study_file, tmp_path, base_model=str(path))
    assert "['XGLMForCausalLM'] are not supported" in text
    assert len(text) < 400


def test_generation_that_vllm_does_not_have_is_refused_before_it_starts(study_file, tmp_path):
    data = yaml.safe_load(study_file.read_text())["objective"]
    data["terms"][3]["generation"] = {"num_beams": 2}
    text = refused(study_file, tmp_path, objective=data)
    assert text.startswith("term 'tiny_generate': vLLM cannot generate with")
    assert "'num_beams'" in text


def test_another_version_of_the_engine_does_not_continue_a_study(searched, monkeypatch):
    monkeypatch.setattr("optimer_hf.searching.engine.vllm_version", lambda: "vllm 9.9.9")
    from optimer_hf.searching.engine import engine_version

    own = engine_version(searched.config.engine)
    with pytest.raises(StudyError, match=r"vllm 9\.9\.9.*never compared"):
        searched.record_inputs({**searched.read_inputs(), "engine": own})
