"""What people write for mergekit, against mergekit: the same bits and files, or one clear error."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.errors import ConfigError, ModelError, OptimerError
from optimer_hf.experiment.checking import check_file
from optimer_hf.merging.engines import merge
from optimer_hf.merging.mergekit_pool import (
    linear_merge_of,
    mergekit_command,
    pool_of,
)
from optimer_hf.merging.mergekit_search import with_weights
from optimer_hf.merging.mergekit_yaml import read_merge_config
from optimer_hf.searching.study_file import study_of_merge_config
from tests.support.merges import tensors_in, with_broken_tokenizer, without_tokenizer
from tests.support.tiny import bits

OPTIONS = {"quiet": True, "random_seed": 3}


def assert_same_model(found: Path, expected: Path) -> None:
    """Compare tensors bit for bit, and every file beside them but the card, whose title differs."""
    ours, theirs = tensors_in(found), tensors_in(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        same = torch.equal if tensor.dtype == torch.float64 else _same_bits
        assert same(ours[name], tensor), name
    beside = {file.name for file in expected.iterdir()} - {"README.md"}
    extra = {"generation_config.json"}  # comes with the tokenizer of a model
    assert beside <= {file.name for file in found.iterdir()} <= beside | {"README.md"} | extra
    for name in beside - ours.keys():
        if not name.endswith(".safetensors"):
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(bits(one), bits(other))


def by_mergekit(text: str, folder: Path, **options) -> Path:
    """Run mergekit alone, with absolute paths in their long form, and return its output."""

    def replaced(value):
        if isinstance(value, list):
            return [replaced(item) for item in value]
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        name = str(value).removesuffix("@main")
        is_model = isinstance(value, str) and (folder / name).is_dir()
        long = {"model": {"path": str(folder / name)}}
        return (long if "+" in name else str(folder / name)) if is_model else value

    config = yaml.safe_load(text)
    word = {key: value for key, value in config.items() if key == "tokenizer_source"}
    parsed = MergeConfiguration.model_validate(replaced(config) | word)
    run_merge(parsed, str(folder / "theirs"), MergeOptions(**OPTIONS, **options), text)
    return folder / "theirs"


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yml"
    path.write_text(text, encoding="utf-8")
    return path


AB = """models:
  - {model: a, parameters: {weight: 0.6}}
  - {model: b, parameters: {weight: 0.4}}
"""
WITH_BASE = "base_model: base\n"
METHODS = {
    "task_arithmetic": "normalize: true",
    "ties": "density: 0.3, normalize: false",
    "dare_ties": "density: 0.66",
    "dare_linear": "density: [1, 0.5]",
    "breadcrumbs": "density: 0.9, gamma: 0.01",
    "breadcrumbs_ties": "density: 0.9",
    "della": "density: 0.66, epsilon: 0.05, lambda: 0.5",
    "della_linear": "density: 0.6",
    "sce": "select_topk: 0.5",
    "ram": "",
    "ramplus_tl": "r: 0.05, alpha: 1.0",
    "multislerp": "",
    "model_stock": "filter_wise: true",
    "karcher": "max_iter: 5, tol: 1e-5",
    "nuslerp": "nuslerp_row_wise: true, nuslerp_flatten: false",
}
CONFIGS = {
    method: f"""{AB}{WITH_BASE}merge_method: {method}
parameters: {{{", ".join(part for part in (given, "int8_mask: true, embed_slerp: yes") if part)}}}
dtype: bfloat16
"""
    for method, given in METHODS.items()
} | {
    "linear without a base": f"{AB}merge_method: linear\ndtype: float16\n",
    "slices, gradients, filters": """slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
  int8_mask: true
dtype: bfloat16
""",
    "layers stacked": """slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 2]}]
merge_method: passthrough
dtype: float16
""",
    "modules, notes of other programs": """modules:
  default:
    slices:
      - sources: [{model: b, layer_range: [0, 1]}]
      - sources: [{model: a, layer_range: [1, 2]}]
merge_method: passthrough
name: mine
random_seed: 3
int8_mask: true
""",
    "a base of its own in a slice": f"""slices:
  - base_model: base
    parameters: {{lambda: 0.5}}
    sources:
      - {{model: base, layer_range: [0, 2]}}
      - {{model: a, layer_range: [0, 2], parameters: {{weight: 0.3, density: 0.5}}}}
merge_method: ties
{WITH_BASE}""",
    "arcee_fusion": "models: [{model: a}, {model: b}]\nmerge_method: arcee_fusion\nbase_model: a\n"
    "dtype: bfloat16\n",
    "nearswap": "models: [{model: a}, {model: b}]\nmerge_method: nearswap\nbase_model: a\n"
    "parameters: {t: 0.0001, weight: 1, normalize: true}\n",
    "passthrough, scaled": """models:
  - model: a
    parameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}
merge_method: passthrough
""",
    "long references, anchors, merge keys": """merge_method: ties
base_model: {model: {path: base}}
defaults: &own {weight: "0.5", density: [1, 0.7, 0.1]}
models:
  - model: {model: {path: a, revision: main}, override_architecture: LlamaForCausalLM}
    parameters: {<<: *own, weight: 1e-1}
  - {model: {model: b, lora: null}, parameters: *own}
slices: null
dtype: float32
out_dtype: bfloat16
""",
    "plus and at in paths": f"""models:
  - {{model: ./a+a@1, parameters: {{weight: 0.6}}}}
  - {{model: b+b@1, parameters: {{weight: 0.4}}}}
merge_method: task_arithmetic
{WITH_BASE}""",
    "nothing in places": """models: [{model: a, parameters: null}, {model: b, parameters: {}}]
parameters: {weight: 0.5, normalize: no}
merge_method: linear
base_model: null
tokenizer_source: null
""",
    "a switch as a number, a gradient of one": """models:
  - {model: a, parameters: {weight: [0.3]}}
  - {model: b, parameters: {weight: " 0.7"}}
parameters: {normalize: 1}
merge_method: linear
dtype: float64
""",
    "tokens of all": f"{AB}{WITH_BASE}merge_method: task_arithmetic\ntokenizer_source: union\n"
    "chat_template: chatml\ndtype: float32\n",
    "tokens of the base": f"{AB}{WITH_BASE}merge_method: ties\ntokenizer_source: base\n"
    "chat_template: auto\ndtype: float32\n",
    "tokens of a model": f"{AB}{WITH_BASE}merge_method: ties\ntokenizer: {{source: a}}\n",
    "tokens one by one": f"""{AB}{WITH_BASE}merge_method: task_arithmetic
tokenizer:
  source: union
  pad_to_multiple_of: 16
  tokens:
    <new>: {{source: {{kind: model_token, model: a, token_id: 7}}}}
    <empty>: {{source: {{kind: zero}}}}
    x: {{source: b, force: true}}
dtype: float32
""",
    "a template in the file": f"{AB}{WITH_BASE}merge_method: linear\nparameters: {{weight: 0.1}}\n"
    "chat_template: \"{% for m in messages %}{{ m['content'] }}{% endfor %}\"\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_gives_the_bits_and_the_files_of_mergekit(world, name):
    path = written(world, CONFIGS[name])
    assert check_file(path)[0].startswith("merge config")
    assert merge(path, world / "ours", options=MergeOptions(**OPTIONS)) == "mergekit"
    assert_same_model(world / "ours", by_mergekit(CONFIGS[name], world))
    assert AutoModelForCausalLM.from_pretrained(world / "ours")


@pytest.mark.parametrize("ignored", ["", "parameters: {normalize: false, int8_mask: true}\n"])
def test_the_writer_takes_a_config_with_harmless_keys_and_gives_mergekits_bits(world, ignored):
    text = f"{AB}{WITH_BASE}merge_method: optimer\ndtype: float32\n{ignored}"
    path = written(world, text)
    assert merge(path, world / "ours", options=MergeOptions(**OPTIONS)) == "native"
    assert merge(path, world / "theirs", engine="mergekit") == "mergekit"
    assert_same_model(world / "ours", world / "theirs")
    assert "# ours" in (world / "ours" / "README.md").read_text().splitlines()


def test_what_mergekit_ignores_is_left_out_with_one_warning(world, caplog):
    path = written(world, f"{CONFIGS['nearswap']}name: mine\n")
    with caplog.at_level(logging.WARNING):
        config = read_merge_config(path)
    assert config["parameters"] == {"t": 0.0001} and "name" not in config
    (message,) = caplog.messages
    assert "merge_method nearswap does not read" in message
    assert "name, parameters.weight, parameters.normalize" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{AB}merge_method: ties\nparamters: {{}}\n",
            "5: unknown.*'paramters'.*mean 'parameters'",
        ),
        (f"{AB}merge_method: ties\nnormalize: true\n", r"5: .*'normalize'.*Put it under `param"),
        (f"{AB}merge_method: dare-ties\n", "no merge_method 'dare-ties'.*mean 'dare_ties'"),
        (f"{AB}merge_method: ties\ndtype: fp16\n", "dtype: found 'fp16'"),
        (f"{AB}merge_method: linear\nchat_template: chatlm\n", "found 'chatlm'.*mean 'chatml'"),
        (f"{AB}merge_method: linear\n---\n{AB}", "found another document"),
        (
            f"{AB}slices: [{{sources: [{{model: a, layer_range: [0, 1]}}]}}]\n"
            "merge_method: linear\n",
            "Exactly one of",
        ),
        (
            "slices:\n- {sources: []}\nmerge_method: linear\n",
            "2: slices.0: field 'sources' is miss",
        ),
        (
            "slices:\n- sources:\n  - model: a\nmerge_method: linear\n",
            "3: slices.0.sources.0: field 'layer_range' is missing",
        ),
        ("experts: [{source_model: a}]\nbase_model: a\n", "a config for mergekit-moe"),
        ("models: [{model: {path: a}}]\nmerge_method: linear\n", r"models\.0\.model: .*'path'"),
        (
            "models: [{model: {model: {path: a, revison: x}}}]\nmerge_method: linear\n",
            "'revison'.*mean 'revision'",
        ),
        ("models: [{model: a+b+c}]\nmerge_method: linear\n", "expected MODEL or MODEL.ADAPTER"),
        (
            "models: [{model: a, parameters: {weight: [{filtr: mlp, value: 1}]}}]\n"
            "merge_method: linear\n",
            r"1: models\.0\.parameters\.weight: unknown field 'filtr'.*mean 'filter'",
        ),
        (
            "models:\n- model: a\n  parameters: {weight: null}\nmerge_method: linear\n",
            r"3: models\.0\.parameters\.weight: found nothing, expected a number",
        ),
        (
            "models: [{model: a, parameters: {weight: [1, .inf]}}]\nmerge_method: linear\n",
            "found inf, expected a finite number",
        ),
        (
            "models: [{model: a}]\nparameters: {normalize: maybe}\nmerge_method: linear\n",
            "parameters.normalize: found 'maybe', expected true or false",
        ),
        (
            f"{AB}merge_method: linear\ntokenizer: {{tokens: {{t: {{forse: 1}}}}}}\n",
            r"tokenizer\.tokens\.t: unknown field 'forse'",
        ),
    ],
)
def test_what_mergekit_drops_or_refuses_is_an_error_before_any_model_is_opened(
    tmp_path, text, message
):
    path = written(tmp_path, text)
    for read in (read_merge_config, check_file, lambda path: merge(path, tmp_path / "out")):
        with pytest.raises(ConfigError, match=rf"(?s)c\.yml:?.*{message}"):
            read(path)
    assert not (tmp_path / "out").exists()


LISTS = "expected a number or a list of them"
VALUES = {
    "true": "found True, expected a number",
    "[0, true]": "found True, expected a number",
    "[]": f"found an empty list, {LISTS}",
    "{filter: mlp, value: []}": f"found an empty list, {LISTS}",
    "[{value: []}]": f"found an empty list, {LISTS}",
    "{}": "found nothing, expected a number",
    "{filter: mlp}": "found nothing, expected a number",
    "[1, null]": "found nothing, expected a number",
    "[[0, 1], [1, 0]]": r"found \[0, 1\], expected a number",
    "[0.5, {filter: mlp, value: 1}]": "found 0.5 among filters, expected {filter, value}",
    "{filter: mlp, value: {value: 1}}": "found {'value': 1}, expected a number",
    "{filter: mlp, value: [{value: 1}]}": "found {'value': 1}, expected a number",
    "{filter: 5, value: 1}": "filter: found 5, expected part of a tensor name",
    "{filter: [mlp, attn], value: 1}": r"filter: found \['mlp', 'attn'\], expected part",
    "2024-01-31": r"found datetime\.date\(2024, 1, 31\), expected a number",
    "!!set {a}": "found {'a'}, expected a number",
    "!!binary MC41": "found b'0.5', expected a number",
    "half": "found 'half', expected a number",
    '"nan"': "found nan, expected a finite number",
    "-.inf": "found -inf, expected a finite number",
    "1e30": "expected a number from -1,000,000 to 1,000,000",
    "[0, -2_000_000]": "expected a number from -1,000,000 to 1,000,000",
}


@pytest.mark.parametrize("value", VALUES)
def test_a_parameter_is_a_number_a_gradient_or_filters(tmp_path, value):
    text = f"merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: {value}\n"
    for method in ("linear", "optimer"):
        path = written(tmp_path, text.replace("linear", method))
        with pytest.raises(ConfigError, match=rf"c\.yml:5: models.*weight.*{VALUES[value]}"):
            read_merge_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: karcher\nparameters: {max_iter: 1e9}\n", "found .*, expected a whole"),
        ("merge_method: karcher\nparameters: {max_iter: 9999999999}\n", "from 0 to 1,000,000"),
        ("merge_method: karcher\nparameters: {max_iter: true}\n", "found True, expected a whole"),
        ("merge_method: linear\nparameters: {normalize: 2}\n", "expected true or false"),
        ("merge_method: linear\ntokenizer: {pad_to_multiple_of: 0}\n", "found 0, expected a num"),
        ("merge_method: linear\ntokenizer: {pad_to_multiple_of: 1000000000}\n", "1 to 65,536"),
        ("merge_method: linear\ntokenizer: {pad_to_multiple_of: 8.5}\n", "found 8.5, expected"),
        ("merge_method: linear\ntokenizer: {pad_to_multiple_of: true}\n", "found True, expected"),
        (
            "merge_method: linear\ntokenizer:\n  tokens:\n"
            "    x: {source: {kind: model_token, model: a, token_id: -1}}\n",
            "token_id: found -1, expected a number from 0 to",
        ),
    ],
)
def test_numbers_of_a_merge_that_size_something_are_bounded(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_merge_config(written(tmp_path, f"models: [{{model: a}}]\n{text}"))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[0, 1000000000]", "of layers from 0 to 100,000"),
        ("[-2, 1]", "of layers from 0 to 100,000"),
        ("[0]", r"layer_range: found \[0\], expected \[first, end\] of layers"),
        ("[false, true]", "of layers from 0 to 100,000"),
        ("0-4", "found '0-4', expected"),
        ("[0, 1], residual_weight: .nan", "found nan|Unexpected|residual_weight"),
    ],
)
def test_layers_of_a_slice_are_bounded(tmp_path, layers, message):
    text = f"slices: [{{sources: [{{model: a, layer_range: {layers}}}]}}]\n"
    with pytest.raises(ConfigError, match=message):
        read_merge_config(written(tmp_path, f"{text}merge_method: passthrough\n"))


def test_a_search_reads_what_a_merge_reads_and_refuses_the_rest_by_name(world, corpus_dir):
    objective = world / "objective.yaml"
    objective.write_text(f"terms: [{{text: {corpus_dir / 'aaa.search.jsonl'}}}]\nlimit: 3\n")
    long = CONFIGS["long references, anchors, merge keys"]
    path = written(world, long)
    with pytest.raises(ConfigError, match=r"models\.0\.model: .*override_architecture"):
        study_of_merge_config(path, objective)
    path = written(world, long.replace(", override_architecture: LlamaForCausalLM", ""))
    config = study_of_merge_config(path, objective)
    tuned = [str((world / name).resolve()) for name in ("a", "b")]
    assert [vector.source for vector in config.vectors.values()] == tuned
    given = read_merge_config(path)
    kinds = dict.fromkeys(config.vectors, "checkpoint")
    changed = with_weights(given, path, dict.fromkeys(kinds, 1.0), kinds)
    models = [entry["model"] for entry in given["models"]]
    assert [entry["model"] for entry in changed["models"]] == models
    assert "defaults" not in changed and changed["merge_method"] == "task_arithmetic"
    with pytest.raises(ConfigError, match=r"slices: layer_range: found .*in order"):
        study_of_merge_config(written(world, WITH_BASE + CONFIGS["layers stacked"]), objective)


UNION = {"tokenizer_source": "union"}


@pytest.mark.parametrize(
    ("changes", "kinds", "method"),
    [
        ({}, ("checkpoint", "adapter"), "task_arithmetic"),
        (UNION, ("checkpoint", "checkpoint"), "task_arithmetic"),
        (UNION, ("checkpoint", "adapter"), "optimer"),  # mergekit asks you/base for its tokens
        ({"tokenizer": {"source": "union"}}, ("adapter", "adapter"), "optimer"),
        ({"tokenizer_source": "base"}, ("checkpoint", "adapter"), "task_arithmetic"),
        ({}, ("checkpoint", "delta"), "optimer"),
        ({"base_model": "pypi:a-model"}, ("checkpoint", "checkpoint"), "optimer"),
        ({"models": ["you/chat", "pypi:a-model"]}, ("checkpoint", "checkpoint"), "optimer"),
    ],
)
def test_weights_are_given_to_mergekit_alone_only_if_it_makes_the_same_merge(
    tmp_path, changes, kinds, method
):
    given = {"base_model": "you/base", "models": ["you/chat", "you/chat-lora"], **changes}
    given["models"] = [{"model": model} for model in given["models"]]
    path = tmp_path / "merge.yml"
    names = pool_of(given, path)[1]
    changed = with_weights(
        given, path, dict.fromkeys(names, 0.5), dict(zip(names, kinds, strict=True))
    )
    assert changed["merge_method"] == method
    command = "optimer merge" if method == "optimer" else "mergekit-yaml"
    assert mergekit_command(changed, "merge.yml").startswith(command)


# -- adapters --------------------------------------------------------------------------------------


def test_an_adapter_in_the_long_form_is_a_vector_of_the_base(make_base, make_adapter, tmp_path):
    base = make_base("llama", torch.float32)
    adapter = make_adapter(base, 5)
    model = {"model": {"path": str(base.path)}, "lora": {"path": str(adapter)}}
    entry = {"model": model, "parameters": {"weight": 1.0}}
    config = {"merge_method": "optimer", "base_model": str(base.path), "models": [entry]}
    path = written(tmp_path, yaml.safe_dump(config))
    assert pool_of(config, path) == (str(base.path), {adapter.name: str(adapter)})
    assert linear_merge_of(config, path) is not None
    assert merge(path, tmp_path / "out") == "native"


def test_a_retrained_adapter_is_merged_again_and_a_failed_merge_leaves_nothing(
    make_base, make_adapter, tmp_path
):
    base = make_base("llama", torch.float32)
    adapter = tmp_path / "adapter"
    model = f"{base.path}+{adapter}"
    text = f"models: [{{model: '{model}', parameters: {{weight: 1}}}}]\nmerge_method: linear\n"
    path, options = written(tmp_path, text), MergeOptions(**OPTIONS, lora_merge_cache="cache")
    options = options.model_copy(update={"lora_merge_cache": str(tmp_path / "cache")})
    for seed in (6, 7):
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.copytree(make_adapter(base, seed), adapter)
        out = tmp_path / f"out{seed}"
        merge(path, out, options=options)
        expected = make_adapter(base, seed)
        plain = {"model": str(expected), "parameters": {"weight": 1.0}}
        config = {"merge_method": "optimer", "base_model": str(base.path), "models": [plain]}
        merge(written(tmp_path, yaml.safe_dump(config)), tmp_path / f"native{seed}")
        path = written(tmp_path, text)
        for name, tensor in tensors_in(tmp_path / f"native{seed}").items():
            torch.testing.assert_close(tensors_in(out)[name], tensor, rtol=0, atol=1e-6)
    kept = sorted(file.name for file in (tmp_path / "cache").iterdir())
    assert len(kept) == 2
    (adapter / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(OptimerError):
        merge(path, tmp_path / "broken", options=options)
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == kept
    assert not (tmp_path / "broken").exists()


# -- what comes out --------------------------------------------------------------------------------


@pytest.fixture
def with_base(world):
    """Return a function that copies the base, changes it, and returns a config on it."""

    def changed(change, method: str, more: str = "") -> Path:
        (world / "base").unlink()
        shutil.copytree((world / "a").resolve(), world / "base")
        change(world / "base")
        text = f"{AB}{WITH_BASE}merge_method: {method}\ndtype: float32\n{more}"
        return written(world, text)

    return changed


@pytest.mark.parametrize("method", ["optimer", "task_arithmetic"])
@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (without_tokenizer, "", r"base: has no tokenizer for the merge.*--no-copy-tokenizer"),
        (without_tokenizer, "chat_template: chatml\n", r"base: has no tokenizer for the merge"),
        (with_broken_tokenizer, "", r"base: transformers cannot load the tokenizer"),
        (with_broken_tokenizer, "tokenizer_source: union\n", r"cannot load the tokenizer"),
    ],
)
def test_a_merge_without_the_tokenizer_that_it_promises_is_refused_before_it_runs(
    with_base, world, method, change, more, message
):
    path = with_base(change, method, more)
    with pytest.raises(OptimerError, match=message):
        merge(path, world / "out")
    assert not [file for file in world.iterdir() if "out" in file.name]


@pytest.mark.parametrize("method", ["optimer", "task_arithmetic"])
def test_without_copied_tokenizer_none_is_promised(with_base, world, method):
    path = with_base(without_tokenizer, method)
    options = MergeOptions(**OPTIONS, copy_tokenizer=False, write_model_card=False)
    merge(path, world / "out", options=options)
    names = {file.name for file in (world / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_a_tokenizer_that_is_not_the_bases_has_to_load(world):
    shutil.copytree((world / "b").resolve(), world / "c")
    with_broken_tokenizer(world / "c")
    text = CONFIGS["tokens of all"].replace("model: b,", "model: c,")
    with pytest.raises(ModelError, match=r"c: transformers cannot load the tokenizer"):
        merge(written(world, text), world / "out")
    without_tokenizer(world / "c")  # mergekit takes that of the base then, as it says
    merge(written(world, text), world / "out")
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(world / "out").chat_template


def test_flags_that_cannot_hold_are_refused_by_name(world):
    text = f"{AB}{WITH_BASE}merge_method: ties\n"
    refused = {
        "--no-safe-serialization": (text, {"safe_serialization": False}, None),
        "chat_template: --no-copy-tokenizer": (
            f"{text}chat_template: chatml\n",
            {"copy_tokenizer": False},
            None,
        ),
        "--engine native: only mergekit reads --clone-tensors": (
            f"{AB}{WITH_BASE}merge_method: optimer\n",
            {"clone_tensors": True},
            "native",
        ),
    }
    for message, (config, flags, engine) in refused.items():
        with pytest.raises(ConfigError, match=message):
            merge(
                written(world, config), world / "out", options=MergeOptions(**flags), engine=engine
            )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "models: [{model: a, parameters: {weight: 1e6}}, {model: b, parameters: {weight: 1}}]\n"
            "parameters: {normalize: false}\nmerge_method: linear\ndtype: float16\n",
            r"tensor '.*' holds NaN or infinite values",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 9]}]}]\nmerge_method: passthrough\n",
            r"mergekit stopped: Tensor model\.layers\.2",
        ),
    ],
)
def test_a_merge_that_fails_leaves_nothing(world, text, message):
    path = written(world, text)
    with pytest.raises(ModelError, match=message):
        merge(path, world / "out")
    assert not [file for file in world.iterdir() if "out" in file.name]


def test_layers_whose_kinds_the_config_lists_are_not_stacked(make_base, tmp_path):
    piece = f"{{sources: [{{model: {make_base('gemma').path}, layer_range: [0, 2]}}]}}"
    path = written(tmp_path, f"slices: [{piece}, {piece}]\nmerge_method: passthrough\n")
    with pytest.raises(ConfigError, match=r"give 4 layers, but .*lists 2 layer_types"):
        merge(path, tmp_path / "out")


def _moved_tokens(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    tokens = content["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    (model / "tokenizer.json").write_text(json.dumps(content))


def _other_theta(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 5e5}
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_theta, "computes differently from .*rope_theta"),
        (_moved_tokens, "the token 'a' at id"),
    ],
)
def test_a_model_that_shares_only_names_and_shapes_causes_a_warning(world, caplog, change, said):
    source = shutil.copytree((world / "a").resolve(), world / "other")
    change(source)
    models = [{"model": "other", "parameters": {"weight": 1.0}}]
    config = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    (world / "merge.yml").write_text(yaml.safe_dump(config | {"dtype": "float32"}))
    with caplog.at_level(logging.WARNING):
        assert merge(world / "merge.yml", world / "out") == "mergekit"
    assert len([text for text in caplog.messages if re.search(said, text)]) == 1
