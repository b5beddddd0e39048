"""union.py: merges of vectors whose tokenizers have tokens that the base lacks."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from optimer_hf.comparison.sealed import compare
from optimer_hf.errors import ConfigError, ModelError, VocabularyError
from optimer_hf.merging.engines import merge
from optimer_hf.merging.mergekit_pool import optimer_config
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.union import open_base
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.stored import stored_views
from optimer_hf.models.union import UnionRecord
from optimer_hf.recipes.build import build, verify
from optimer_hf.recipes.record import Lock
from optimer_hf.recipes.vanilla import write_vanilla
from optimer_hf.recipes.write import write_recipe
from optimer_hf.report.evidence import read_evidence
from optimer_hf.report.vector_panels import cosines_panel
from optimer_hf.searching.loop import search
from optimer_hf.searching.trial import ResidentPool, base_of_study
from optimer_hf.searching.workers import Workers
from optimer_hf.study.config import Baselines, StudyConfig
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.extraction import extract_vector
from optimer_hf.vectors.forms import LowRank
from optimer_hf.vectors.opening import open_vector
from tests.support.added_tokens import (
    END,
    START,
    TEMPLATE,
    TOOL,
    logits_by_token,
    logits_with_peft,
    rows_by_token,
    save_adapter,
    save_merged_by_peft,
    save_tuned,
    turned_round,
    with_tokens,
    write_chat_task,
)
from tests.support.merges import (
    TORCH_DTYPES,
    assert_same_bits,
    merged_by,
    read_all,
    without_tokenizer,
    write_config,
)
from tests.support.tiny import bits

TOKENS = {
    "end": [START, END],
    "other order": [END, TOOL, START],
    "all moved": [TOOL, START],
    "none": [],
}
PLACES = {
    "end": with_tokens,
    "other order": with_tokens,
    "all moved": turned_round,
    "none": lambda base, _: AutoTokenizer.from_pretrained(base),
}


@pytest.fixture(scope="module")
def pool_of(make_base, tmp_path_factory):
    """Return a function kind, dtype -> base and sources: fine-tunes with tokens in all places."""
    made = {}

    def pool(kind, dtype=torch.float32):
        if (kind, dtype) not in made:
            base, folder = make_base(kind, dtype), tmp_path_factory.mktemp("union")
            made[kind, dtype] = (
                base,
                {
                    name: save_tuned(
                        base, folder / name, make(base.path, TOKENS[name]), seed=seed, dtype=dtype
                    )
                    for seed, (name, make) in enumerate(PLACES.items())
                },
            )
        return made[kind, dtype]

    return pool


def open_union(base, sources, reference=None):
    grown, tokenizer = open_base(
        base, {name: str(path) for name, path in sources.items()}, reference, "union"
    )
    assert tokenizer is None
    return grown, [open_vector(name, str(path), grown) for name, path in sources.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_one_vector_at_weight_1_is_the_fine_tune_token_by_token(
    pool_of, kind, place, dtype, tmp_path
):
    base, sources = pool_of(kind, dtype)
    grown, vectors = open_union(base, sources)
    weights = {name: float(name == place) for name in sources}
    write_merged(grown, vectors, weights, tmp_path / "out", out_dtype="float32")
    tokens = [token for token in (START, END, TOOL) if token in TOKENS[place]]
    text = f"aab xy{'user ab'.join(tokens)}zz"
    merged = logits_by_token(tmp_path / "out", text)
    own = logits_by_token(sources[place], text)
    assert {*tokens} <= own.keys() <= merged.keys()
    for token, logits in own.items():
        assert torch.allclose(merged[token], logits, atol=1e-4), token


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_resident_model_equals_the_writer_bit_for_bit(pool_of, kind, dtype, tmp_path):
    grown, vectors = open_union(*pool_of(kind, torch.bfloat16))
    resident = ResidentModel(grown, vectors, dtype=dtype)
    for weights in ({}, {"end": 0.6, "other order": -0.3, "all moved": 0.4, "none": 0.2}):
        out = tmp_path / str(len(weights))
        resident.set_weights(weights)
        write_merged(
            grown,
            vectors,
            {v.name: weights.get(v.name, 0.0) for v in vectors},
            out,
            out_dtype=dtype,
        )
        live = stored_views(resident.model)
        for name, tensor in read_all(out).items():
            assert torch.equal(bits(tensor.float()), bits(live[name].float())), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_union_equals_that_of_mergekit_token_by_token(pool_of, kind, dtype, tmp_path):
    base, sources = pool_of(kind, TORCH_DTYPES[dtype])
    weights = dict(zip(sources, (0.6, -0.35, 0.4, 0.0), strict=True))
    config = optimer_config(
        str(base.path), {name: str(path) for name, path in sources.items()}, weights, dtype
    )
    merged_by(config | {"tokenizer_source": "union"}, tmp_path / "theirs", "mergekit")
    grown, vectors = open_union(base, sources)
    write_merged(grown, vectors, weights, tmp_path / "ours", out_dtype=dtype)
    theirs, ours = read_all(tmp_path / "theirs"), read_all(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if tensor.shape == Checkpoint(base.path).shape(name):
            assert torch.equal(bits(tensor), bits(ours[name])), name
        else:
            rows = rows_by_token(tmp_path / "ours", read_all, name)
            expected = rows_by_token(tmp_path / "theirs", read_all, name)
            assert rows.keys() == expected.keys() and {START, END, TOOL} < rows.keys()
            for token, row in expected.items():
                assert torch.equal(bits(row), bits(rows[token])), (name, token)


def test_rows_that_the_base_lacks_are_averaged_over_the_vectors_that_have_them(
    pool_of, kind, tmp_path
):
    base, sources = pool_of(kind)
    grown, vectors = open_union(base, sources)
    union = UnionRecord.of(grown.path)
    assert {token: added.vectors for token, added in union.added.items()} == {
        START: ["end", "other order", "all moved"],
        END: ["end", "other order"],
        TOOL: ["other order", "all moved"],
    }
    name = "model.embed_tokens.weight"
    rows = {key: rows_by_token(path, read_all, name) for key, path in sources.items()}
    found, old = (rows_by_token(path, read_all, name) for path in (grown.path, base.path))
    for token, added in union.added.items():
        mean = torch.stack([rows[key][token].double() for key in added.vectors]).mean(0)
        assert torch.allclose(found[token].double(), mean, atol=1e-7)
    assert all(torch.equal(found[token], row) for token, row in old.items())
    weights = {"end": 0.5, "other order": 0.25, "all moved": 0.0, "none": 0.0}
    write_merged(grown, vectors, weights, tmp_path / "out")
    merged = rows_by_token(tmp_path / "out", read_all, name)
    for token, row in found.items():
        deltas = [
            weights[key] * (rows[key][token].double() - row.double())
            for key in weights
            if token in rows[key]
        ]
        assert torch.allclose(merged[token].double(), row.double() + sum(deltas), atol=1e-6)


# -- adapters and deltas ---------------------------------------------------------------------------


ADAPTERS = {
    "resized": {},
    "whole embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "its tokens": {"tokens": [START, END]},
    "other tokens, too": {"tokens": [START, END, "a"]},
}


def adapter_options(form, kind):
    """Return what PEFT needs for a form of an adapter; a tied embedding is trained as one."""
    options = dict(ADAPTERS[form])
    if kind == "gemma" and form == "factors":
        options["target_modules"] = ["q_proj", "embed_tokens"]
    if kind == "gemma" and form in ("factors", "whole embedding"):
        options["ensure_weight_tying"] = True
    return options


@pytest.mark.parametrize("form", ADAPTERS)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
def test_an_adapter_at_weight_1_is_what_peft_computes(
    pool_of, kind, form, beside, tmp_path, caplog
):
    base, sources = pool_of(kind)
    options = adapter_options(form, kind)
    tokenizer = with_tokens(base.path, [END, START])
    adapter = save_adapter(base, tmp_path / "lora", tokenizer, seed=1, **options)
    pool = {"lora": adapter} | ({"other order": sources["other order"]} if beside else {})
    grown, vectors = open_union(base, pool)
    assert vectors[0].kind == "adapter" and "holds nothing for" not in caplog.text
    weights = {name: float(name == "lora") for name in pool}
    write_merged(grown, vectors, weights, tmp_path / "out", out_dtype="float32")
    text = f"aab xy{START}user ab{END}zz"
    merged = logits_by_token(tmp_path / "out", text)
    own = logits_with_peft(base, adapter, text)
    for token, logits in own.items():
        assert torch.allclose(merged[token], logits, atol=1e-4), token


def test_a_config_for_a_union_with_adapters_runs_natively(pool_of, tmp_path):
    base, sources = pool_of("llama")
    adapter = save_adapter(base, tmp_path / "lora", with_tokens(base.path, [START]), seed=2)
    pool = {"end": sources["end"], "lora": adapter}
    weights = {"end": 0.5, "lora": 0.75}
    config = optimer_config(
        str(base.path), {name: str(path) for name, path in pool.items()}, weights, "float32"
    )
    file = write_config(tmp_path / "optimer.yml", config | {"tokenizer_source": "union"})
    assert merge(file, tmp_path / "out") == "native"
    grown, vectors = open_union(base, pool)
    write_merged(grown, vectors, weights, tmp_path / "expected", out_dtype="float32")
    assert_same_bits(read_all(tmp_path / "out"), read_all(tmp_path / "expected"))
    assert {START, END} <= AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab().keys()


def test_factors_on_a_resized_embedding_stay_factors(make_base, tmp_path):
    base = make_base("llama", torch.float32)
    tokenizer = with_tokens(base.path, [END, START])
    adapter = save_adapter(
        base, tmp_path / "v", tokenizer, seed=1, **adapter_options("factors", "llama")
    )
    _, vectors = open_union(base, {"v": adapter})
    part = vectors[0].parts["model.embed_tokens.weight"]
    assert type(part) is LowRank and part.b.shape == (261, 4)  # 2 of the factors, 1 for each token


def test_factors_on_another_embedding_than_the_base_are_refused(make_base, tmp_path):
    base, options = make_base("llama", torch.float32), adapter_options("factors", "llama")
    adapter = save_adapter(base, tmp_path / "v", with_tokens(base.path, [END]), seed=1, **options)
    with pytest.raises(VocabularyError, match="`vocabulary: union` matches rows by token"):
        open_vector("v", str(adapter), base)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"vector 'v'.*its copy of 'model\.embed.*differs"):
        open_base(base, {"v": str(adapter)}, None, "union")


@pytest.mark.parametrize("form", ["checkpoint", "delta", "int8", "factors", "resized"])
def test_every_kind_with_added_tokens_merges_as_its_model_does_in_mergekit(
    pool_of, kind, form, tmp_path
):
    base, sources = pool_of(kind)
    source, model = tmp_path / "v", sources["other order"]
    if form in ("factors", "resized"):
        tokenizer = with_tokens(base.path, [END, TOOL, START])
        source = save_adapter(base, source, tokenizer, seed=3, **adapter_options(form, kind))
        model = save_merged_by_peft(base, source, tmp_path / "model")
    elif form == "checkpoint":
        source = model
    else:
        dtype = "float32" if form == "delta" else form
        record = extract_vector(model, base.path, source, dtype=dtype)
        assert record.added_tokens == [END, TOOL, START]
    weights = {"end": 0.6, "v": 0.75, "all moved": -0.2}
    pool = {"end": sources["end"], "v": source, "all moved": sources["all moved"]}
    theirs = {name: str(path) for name, path in (pool | {"v": model}).items()}
    config = optimer_config(str(base.path), theirs, weights, "float32")
    merged_by(config | {"tokenizer_source": "union"}, tmp_path / "theirs", "mergekit")
    grown, vectors = open_union(base, pool)
    assert UnionRecord.of(grown.path).added[TOOL].vectors == ["v", "all moved"]
    write_merged(grown, vectors, weights, tmp_path / "ours")
    expected = read_all(tmp_path / "theirs")
    close = {"rtol": 0, "atol": 2e-3 if form == "int8" else 2e-6}
    for name in expected:
        if "embed_tokens" in name or "lm_head" in name:
            rows = rows_by_token(tmp_path / "ours", read_all, name)
            for token, row in rows_by_token(tmp_path / "theirs", read_all, name).items():
                torch.testing.assert_close(rows[token], row, **close)
        else:
            torch.testing.assert_close(read_all(tmp_path / "ours")[name], expected[name], **close)


@pytest.mark.parametrize("place", ["end", "all moved"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_delta_with_added_tokens_at_weight_1_is_its_model(
    pool_of, kind, place, dtype, tmp_path, caplog
):
    base, sources = pool_of(kind)
    extract_vector(sources[place], base.path, tmp_path / "d", dtype=dtype)
    assert "needs `vocabulary: union`" in caplog.text
    with pytest.raises(VocabularyError, match="union"):
        open_vector("d", str(tmp_path / "d"), base)
    extract_vector(tmp_path / "d", base.path, tmp_path / "again", dtype="float32")
    for name in ("d", "again"):
        grown, vectors = open_union(base, {name: tmp_path / name})
        resident = ResidentModel(grown, vectors, dtype="float32")
        resident.set_weights({name: 1.0})
        write_merged(grown, vectors, {name: 1.0}, tmp_path / f"out-{name}")
        live = stored_views(resident.model)
        for tensor, value in read_all(tmp_path / f"out-{name}").items():
            assert torch.equal(bits(value), bits(live[tensor])), tensor
        tokens = [token for token in (START, TOOL) if token in TOKENS[place]]
        text = f"aab xy{'user ab'.join(tokens)}zz"
        merged = logits_by_token(tmp_path / f"out-{name}", text)
        atol = {"float32": 1e-4, "bfloat16": 1e-2, "int8": 5e-2}[dtype]
        for token, logits in logits_by_token(sources[place], text).items():
            assert torch.allclose(merged[token], logits, atol=atol), token


def test_an_adapter_that_only_peft_can_merge_becomes_a_delta_with_its_tokens(
    pool_of, kind, tmp_path
):
    base, sources = pool_of(kind)
    tokenizer = with_tokens(base.path, [END, START])
    adapter = save_adapter(base, tmp_path / "dora", tokenizer, seed=1, use_dora=True)
    options = {"dtype": "float32", "from_adapter": True}
    record = extract_vector(adapter, base.path, tmp_path / "d", **options)
    assert record.added_tokens == [END, START]
    grown, vectors = open_union(base, {"d": tmp_path / "d", "end": sources["end"]})
    write_merged(grown, vectors, {"d": 1.0, "end": 0.0}, tmp_path / "out")
    text = f"aab xy{START}user ab{END}zz"
    merged = logits_by_token(tmp_path / "out", text)
    for token, logits in logits_with_peft(base, adapter, text).items():
        assert torch.allclose(merged[token], logits, atol=1e-4), token


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_delta_moves_the_tokens_of_its_base_alone(pool_of, make_tuned, kind, dtype, tmp_path):
    base, sources = pool_of(kind)
    tuned = make_tuned(base, kind, 5, torch.float32)
    extract(open_vector("d", str(tuned), base), base, tmp_path / "d", dtype=dtype)
    grown, vectors = open_union(base, {"end": sources["end"], "d": tmp_path / "d"})
    assert vectors[1].kind == "delta"
    write_merged(grown, vectors, {"end": 0.0, "d": 1.0}, tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        merged, expected = read_all(tmp_path / "out")[name], read_all(tuned)[name]
        close = {"rtol": 0, "atol": 1e-6 if dtype == "float32" else 1e-3}
        torch.testing.assert_close(merged[: len(expected)], expected, **close)
    own = read_all(grown.path)["model.embed_tokens.weight"]
    assert torch.equal(read_all(tmp_path / "out")["model.embed_tokens.weight"][259:], own[259:])


# -- what is refused -------------------------------------------------------------------------------


def with_piece(base, folder):
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["model"]["vocab"]["ab"] = len(tokenizer)
    raw["model"]["merges"] = [["a", "b"]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(raw))
    return save_tuned(base, folder / "v", tokenizer, seed=9)


def without_its_tokenizer(base, folder):
    path = save_tuned(base, folder / "v", with_tokens(base.path, [START]), seed=9)
    without_tokenizer(path)
    return path


def without_rows(base, folder):
    path = save_adapter(base, folder / "v", AutoTokenizer.from_pretrained(base.path), seed=9)
    with_tokens(base.path, [START]).save_pretrained(path)
    return path


def without_a_row_of_the_head(base, folder):
    path = save_adapter(base, folder / "v", with_tokens(base.path, [START]), seed=9)
    tensors = load_file(path / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def without_the_rows_below_factors(base, folder):
    tokenizer = with_tokens(base.path, [START])
    path = save_adapter(base, folder / "v", tokenizer, seed=9, target_modules=["lm_head"])
    tensors = load_file(path / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    save_file(kept, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


REFUSED = {
    with_piece: r"vector 'v'.*its token 'ab' is a piece of words.*only added tokens",
    without_its_tokenizer: r"vector 'v'.*has 260 rows for tokens, the base has 259, and no token",
    without_rows: r"its token '<\|im_start\|>' has the id 259, and it stores no such row",
    without_a_row_of_the_head: r"stores no such row of 'lm_head\.weight'\. Save the adapter with",
    without_the_rows_below_factors: r"has the id 259, and it stores no such row of 'lm_head",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_vector_whose_tokens_cannot_join_is_refused_by_name(make_base, tmp_path, make):
    base = make_base("llama", torch.float32)
    source = make(base, tmp_path)
    with pytest.raises(ModelError, match=REFUSED[make]):
        open_base(base, {"v": str(source)}, None, "union")


def test_a_tokenizer_with_a_token_of_no_vector_is_refused(pool_of, tmp_path):
    base, sources = pool_of("llama")
    other = save_tuned(base, tmp_path / "v", with_tokens(base.path, ["<|none|>"]), seed=9)
    with pytest.raises(ConfigError, match=r"neither the base nor a vector has a row .*<\|none\|>"):
        open_base(base, {"end": str(sources["end"])}, str(other), "union")


def test_a_vector_of_another_pool_has_no_token_of_its_own(pool_of, tmp_path):
    base, sources = pool_of("llama")
    grown, _ = open_base(base, {"end": str(sources["end"])}, None, "union")
    with pytest.raises(VocabularyError, match=r"row for the token '<\|tool\|>', which no vector"):
        open_vector("v", str(sources["other order"]), grown)


def test_a_pool_with_the_tokens_of_its_base_needs_no_copy(pool_of):
    base, sources = pool_of("llama")
    assert open_base(base, {"none": str(sources["none"])}, None, "union") == (base, None)


# -- from the study to the model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(pool_of, tmp_path_factory):
    """A finished search over vectors with added tokens, through the template of one of them."""
    base, sources = pool_of("llama", torch.bfloat16)
    folder = tmp_path_factory.mktemp("union-study")
    return search(study_of(folder, base, sources), folder / "study")


def study_of(folder, base, sources, **changes):
    task = write_chat_task(folder)
    objective = {
        "include_path": str(task.parent),
        "terms": [{"task": "chatty", "metric": "acc", "limit": 2}],
        "apply_chat_template": True,
    }
    test = objective | {"terms": [objective["terms"][0] | {"hash_range": [0.5, 1.0]}]}
    objective["terms"][0]["hash_range"] = [0.0, 0.5]
    data = {
        "base_model": str(base.path),
        "vectors": {name: str(path) for name, path in sources.items()},
        "tokenizer_source": "end",
        "vocabulary": "union",
        "objective": objective,
        "test": test,
        "search": {"n_trials": 7, "rescore_top": 0},
    }
    return StudyConfig.model_validate(data | changes)


def test_a_study_without_the_field_is_as_before(pool_of, tmp_path):
    config = study_of(tmp_path, *pool_of("llama", torch.bfloat16), vocabulary="base")
    assert "vocabulary" not in config.identity
    with pytest.raises(ConfigError, match=r"<\|im_start\|>.*With `vocabulary: union`"):
        ResidentPool(config)
    with pytest.raises(VocabularyError, match="`vocabulary: union` matches rows by token"):
        ResidentPool(
            config.model_copy(update={"tokenizer_source": None, "objective": plain(config)})
        )


def mixed(study):
    """A trial in which every vector has a weight."""
    return next(trial for trial in study.trials if all(trial.weights.values()))


def plain(config):
    return config.objective.model_copy(update={"apply_chat_template": False})


def test_a_recipe_of_a_union_builds_verifies_and_says_where_rows_come_from(study, tmp_path):
    file = tmp_path / "recipe.yaml"
    recipe = write_recipe(study, file, name="chat", pick=mixed(study))
    lock = Lock.read(file.with_suffix(".lock.json"))
    assert recipe.vocabulary == "union" and lock.added_tokens[END].vectors == ["end", "other order"]
    build(file, tmp_path / "out")
    verify(file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    assert {t: tokenizer.get_vocab()[t] for t in lock.added_tokens} == {
        token: added.id for token, added in lock.added_tokens.items()
    }
    resident = ResidentPool(study.config)
    resident._engine.set_weights(recipe.weights)
    live = stored_views(resident._engine.lm.model)
    for name, tensor in read_all(tmp_path / "out").items():
        assert torch.equal(bits(tensor), bits(live[name].to(tensor.dtype))), name
    build(tmp_path / "out" / "recipe.yaml", tmp_path / "again")  # the copy beside the model
    assert_same_bits(read_all(tmp_path / "again"), read_all(tmp_path / "out"))
    tokenizer.add_tokens(["<|late|>"])
    text = (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "out" / "tokenizer.json").write_text(text.replace(START, "<|start|>"), "utf-8")
    with pytest.raises(ModelError, match=r"gives the token '<\|im_start\|>' the id None"):
        verify(file, tmp_path / "out")


def test_every_baseline_has_the_tokens_of_the_study(study, tmp_path):
    wanted = Baselines(
        merge_methods=["ties"],
        random_vectors=True,
        models={"other": study.config.vectors["other order"].source},
    )
    config = study.config.model_copy(update={"baselines": wanted})
    rows = compare(replace(study, config=config)).rows
    assert {row.kind for row in rows} >= {"base", "alone", "method", "random", "model", "merge"}
    alone = next(row for row in rows if row.kind == "alone" and row.subject == "other order")
    model = next(row for row in rows if row.kind == "model")
    assert model.scores == alone.scores  # its rows are the same, by token


def test_the_report_of_a_union_takes_the_copy_of_the_base_that_its_trials_took(
    study, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPTIMER_CACHE", str(tmp_path))
    grown, _ = base_of_study(study.config)
    panel = cosines_panel(read_evidence(study))
    assert panel is not None
    copies = [file for file in (tmp_path / "union").iterdir() if file.is_dir()]
    assert copies == [grown.path]


def test_the_exports_of_a_union_run_in_mergekit(study, tmp_path):
    write_recipe(study, tmp_path / "recipe.yaml", name="chat", pick=mixed(study))
    build(tmp_path / "recipe.yaml", tmp_path / "built")
    assert merge(tmp_path / "optimer.yml", tmp_path / "ours") == "mergekit"
    write_vanilla(study, tmp_path / "vanilla.yml", pick=mixed(study), deltas=tmp_path / "deltas")
    config = yaml.safe_load((tmp_path / "vanilla.yml").read_text(encoding="utf-8"))
    theirs = MergeConfiguration.model_validate(config)
    run_merge(theirs, str(tmp_path / "theirs"), MergeOptions(quiet=True, write_model_card=False))
    name = "model.embed_tokens.weight"
    built = rows_by_token(tmp_path / "built", read_all, name)
    for out, bound in (("ours", 0.0), ("theirs", 2**-7)):
        rows = rows_by_token(tmp_path / out, read_all, name)
        assert {START, END, TOOL} <= rows.keys()
        for token, row in rows.items():
            torch.testing.assert_close(row, built[token], rtol=bound, atol=bound / 8)


# -- every kind of vector, in workers --------------------------------------------------------------


@pytest.fixture(scope="module")
def pool_of_kinds(pool_of, tmp_path_factory):
    """A base and a checkpoint, an int8 delta and an adapter on a resized embedding, with tokens."""
    base, sources = pool_of("llama", torch.bfloat16)
    folder = tmp_path_factory.mktemp("kinds")
    extract_vector(sources["all moved"], base.path, folder / "delta", dtype="int8")
    tokenizer, options = with_tokens(base.path, [TOOL, END]), adapter_options("factors", "llama")
    save_adapter(base, folder / "lora", tokenizer, seed=4, dtype=torch.bfloat16, **options)
    return base, {"end": sources["end"]} | {name: folder / name for name in ("delta", "lora")}


@pytest.fixture(scope="module")
def study_of_kinds(pool_of_kinds, tmp_path_factory):
    """A search over them by two processes."""
    folder = tmp_path_factory.mktemp("kinds-study")
    config = study_of(folder, *pool_of_kinds, search={"n_trials": 6, "rescore_top": 0})
    return search(config, folder / "study", runner=Workers(n_workers=2))


def test_workers_score_a_union_as_one_process_does(study_of_kinds):
    assert {trial.worker for trial in study_of_kinds.trials} == {"0", "1"}
    pool = ResidentPool(study_of_kinds.config)
    asked = study_of_kinds.config.objective.asked_terms("search")
    for trial in study_of_kinds.trials:
        assert trial.status == "ok" and pool.score(trial.weights, asked).terms == trial.terms


def test_a_recipe_of_every_kind_builds_verifies_exports_and_is_compared(study_of_kinds, tmp_path):
    study, pick = study_of_kinds, mixed(study_of_kinds)
    recipe = write_recipe(study, tmp_path / "recipe.yaml", name="kinds", pick=pick)
    lock = Lock.read(tmp_path / "recipe.lock.json")
    assert {token: each.vectors for token, each in lock.added_tokens.items()} == {
        START: ["end", "delta"],
        END: ["end", "lora"],
        TOOL: ["delta", "lora"],
    }
    build(tmp_path / "recipe.yaml", tmp_path / "out")
    verify(tmp_path / "recipe.yaml", tmp_path / "out")
    built = read_all(tmp_path / "out")
    resident = ResidentPool(study.config)
    resident._engine.set_weights(recipe.weights)
    live = stored_views(resident._engine.lm.model)
    for name, tensor in built.items():
        assert torch.equal(bits(tensor), bits(live[name].to(tensor.dtype))), name
    assert merge(tmp_path / "optimer.yml", tmp_path / "ours") == "native"
    assert_same_bits(read_all(tmp_path / "ours"), built)
    write_vanilla(study, tmp_path / "vanilla.yml", pick=pick, deltas=tmp_path / "deltas")
    config = yaml.safe_load((tmp_path / "vanilla.yml").read_text(encoding="utf-8"))
    theirs = MergeConfiguration.model_validate(config)
    run_merge(theirs, str(tmp_path / "theirs"), MergeOptions(quiet=True, write_model_card=False))
    for name, tensor in read_all(tmp_path / "theirs").items():
        torch.testing.assert_close(tensor, built[name][: len(tensor)], rtol=2**-7, atol=2**-9)
    wanted = Baselines(merge_methods=["ties"], random_vectors=True)
    rows = compare(
        replace(study, config=study.config.model_copy(update={"baselines": wanted}))
    ).rows
    assert {row.kind for row in rows} >= {"base", "alone", "method", "random", "merge"}
