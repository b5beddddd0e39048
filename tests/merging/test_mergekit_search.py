"""mergekit_search.py: what a search reads of a mergekit YAML, and the YAML that comes back."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5ForConditionalGeneration

from optimer_hf.errors import ConfigError, ModelError, StudyError
from optimer_hf.merging.mergekit_search import pool_to_search, unsearched_settings
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.recipes.build import build as build_recipe
from optimer_hf.recipes.from_search import search_study
from optimer_hf.searching.study_file import (
    merge_config_of_study,
    merge_text,
    read_study,
    study_of_merge_config,
)
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.merges import (
    N_LAYERS,
    assert_same_bits,
    build_study,
    optimer_yaml,
    run_plain_mergekit,
    tensors_in,
    write_config,
)
from tests.support.tiny import qwen35_multimodal, ulps_apart

HEAD = "base_model: ./base   # theirs\nmerge_method: ties\ndtype: bfloat16\n"


def share_of_layer(name: str) -> float:
    """Return how far along the layers a tensor is, from 0 to 1; 0 for one in no layer."""
    layer = re.search(r"layers\.(\d+)\.", name)
    return int(layer[1]) / (N_LAYERS - 1) if layer else 0.0


def interpolate(values: list[float], name: str) -> float:
    place = share_of_layer(name) * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


def layer_of(name: str) -> int:
    return round(share_of_layer(name) * (N_LAYERS - 1))


def more_in_the_last_slice(place_of_base: str) -> str:
    """Return slices of which the last has a model that the first one lacks."""
    text = "slices:\n"
    for layers, models in (("[0, 2]", ["math"]), ("[2, 5]", ["code", "math"])):
        first, last = ["base"] * (place_of_base == "first"), ["base"] * (place_of_base == "last")
        text += "- sources:\n"
        for name in (*first, *models, *last):
            text += f"  - {{model: ./{name}, layer_range: {layers}}}   # {name[0]}\n"
    return text


CASES = {
    "a gradient": (
        """models:
  - model: ./math  # m
    parameters:
      density: [1, 0.5]   # d
      weight: [0, 0.3, 1]  # w
  - {model: ./code, parameters: {weight: 0.5, density: 0.2}}  # c
""",
        ["math.gradient.1", "math.gradient.2", "math.gradient.3", "code"],
        lambda w, v, t: w["code"] if v == "code" else interpolate([*w.values()][:3], t),
        ["# theirs", "# m", "# w", "# c", "weight: [0.2, 0.5, 0.8]"],
    ),
    "a long gradient, and one for all": (
        """parameters:
  weight: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]   # all
models:
- model: ./base   # not needed
- model: ./math
- model: ./code   # last
  parameters:
    weight: 0.3
""",
        ["math.gradient.1", "math.gradient.2", "math.gradient.3", "math.gradient.4", "code"],
        lambda w, v, t: w["code"] if v == "code" else interpolate([*w.values()][:4], t),
        ["# not needed", "# last"],
    ),
    "filters, with gradients and an anchor": (
        """x-weights: &weights
  - filter: self_attn   # attention
    value: [0, 0.5]     # along the layers
  - {filter: mlp, value: 0.25}
  - value: 0.1          # the rest
models:
  - model: ./math
    parameters:
      weight: *weights
  - model: "./base+./lora"   # an adapter
    parameters: {weight: 1.0}
""",
        ["math.self_attn/gradient.1", "math.self_attn/gradient.2", "math.mlp", "math.else", "lora"],
        lambda w, v, t: (
            w["lora"]
            if v == "lora"
            else interpolate([*w.values()][:2], t)
            if "self_attn" in t
            else w["math.mlp" if "mlp" in t else "math.else"]
        ),
        ["# attention", "# along the layers", "# the rest", "# an adapter"],
    ),
    "slices": (
        """slices:
  # the lower layers
  - sources:
      - model: ./base
        layer_range: [0, 2]
      - model: ./math
        layer_range: [0, 2]
        parameters: {weight: 0.3, density: 0.5}   # low
      - {model: ./code, layer_range: [0, 2], parameters: {weight: 0.1}}
  - sources:
      - {model: ./base, layer_range: [2, 5]}
      - {model: ./math, layer_range: [2, 5], parameters: {weight: 0.7}}   # high
""",
        ["math.layers.0:2", "math.layers.2:5", "code.layers.0:2", "code.layers.2:5"],
        lambda w, v, t: w[f"{v}.layers.{'0:2' if layer_of(t) < 2 else '2:5'}"],
        ["# the lower layers", "# low", "# high"],
    ),
    "five slices of two models, without the base": (
        "slices:\n"
        + "".join(
            f"- sources:\n  - {{model: ./math, layer_range: [{n}, {n + 1}]}}  # m{n}\n"
            f"  - model: ./lora\n    layer_range: [{n}, {n + 1}]\n"
            for n in range(N_LAYERS)
        ),
        [f"{v}.layers.{r}" for v in ("math", "lora") for r in ("0:2", "2:3", "3:4", "4:5")],
        lambda w, v, t: w[f"{v}.layers.{('0:2', '0:2', '2:3', '3:4', '4:5')[layer_of(t)]}"],
        [f"# m{n}" for n in range(N_LAYERS)],
    ),
    **{
        f"a last slice with more models, base {place}": (
            more_in_the_last_slice(place),
            ["math.layers.0:2", "math.layers.2:5", "code.layers.0:2", "code.layers.2:5"],
            lambda w, v, t: w[f"{v}.layers.{'0:2' if layer_of(t) < 2 else '2:5'}"],
            ["# c", "# m"],
        )
        for place in ("first", "last", "nowhere")
    },
    "one slice of all layers, a merge key": (
        """x-all: &all {layer_range: [0, 5]}
slices:
  - sources:
      - <<: *all
        model: ./math   # m
        parameters: {weight: [0, 1]}
      - <<: *all
        model: ./base   # b
""",
        ["math.gradient.1", "math.gradient.2"],
        lambda w, v, t: interpolate([*w.values()], t),
        ["# m", "# b", "<<: *all"],
    ),
}


def weights_for(config) -> dict[str, float]:
    """Return a weight for each name; fixed ones as they are."""
    numbers = (0.2 + 0.3 * index for index in range(99))
    return {
        name: config.fixed[name] if name in config.fixed else round(next(numbers), 1)
        for name in config.weight_names
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_number_is_searched_and_comes_back_into_the_text(case, folder, tmp_path, monkeypatch):
    text, names, weight_of, kept = case
    monkeypatch.chdir(folder)
    path = folder / "merge.yml"
    path.write_text("# Mine.\n" + HEAD + text)
    config = study_of_merge_config(path, folder / "obj.yaml")
    assert config.weight_names == names
    weights = weights_for(config)
    build_study(config, weights, tmp_path / "ours")

    base = Checkpoint(folder / "base")
    for name, merged in tensors_in(tmp_path / "ours").items():
        total = base.read(name).double()
        for vector, source in config.sources.items():
            opened = open_vector(vector, source, ResolvedModel(folder / "base", "base"))
            if name in opened.names:
                total += weight_of(weights, vector, name) * delta_of(opened, name, base)
        assert torch.allclose(merged.double(), total, rtol=2**-8, atol=1e-6), name

    kinds = {name: "adapter" if name == "lora" else "checkpoint" for name in config.vectors}
    merge_config = merge_config_of_study(config, weights, path, kinds)
    printed = merge_text(path, merge_config, "note")
    assert yaml.safe_load(printed).items() >= merge_config.items()
    assert all(comment in printed for comment in kept), printed
    assert printed.startswith("# Mine.\n# note\n# Save it beside merge.yml as THIS.yml. Run: merge")
    run_plain_mergekit(printed, tmp_path / "theirs")
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        apart = ulps_apart(tensor, theirs[name])
        if "lora" in config.vectors:  # mergekit rounds W + BA, and subtracts W again
            assert (apart <= 1).double().mean() > 0.999, name
        else:
            assert not apart.any(), name


def delta_of(vector, name: str, base: Checkpoint) -> torch.Tensor:
    """Return a delta in float64, without the code that merges."""
    if vector.kind == "adapter":
        part = vector.parts[name]
        return part.scale * part.b.double() @ part.a.double()
    return Checkpoint(vector.path).read(name).double() - base.read(name).double()


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "of somebody else"])
def test_a_delta_directory_is_searched_with_our_record_only(pool, tmp_path, ours):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    extract(open_vector("ja", str(sources["ja"]), base), base, tmp_path / "ja")
    if not ours:
        (tmp_path / "ja" / "vector.json").unlink()
    models = [{"model": "./ja", "parameters": {"weight": 0.5, "delta": True}}]
    config = optimer_yaml(base_model=str(base.path), models=models)
    path = write_config(tmp_path / "c.yml", config)
    if ours:
        assert pool_to_search(config, path)[1] == {"ja": str(tmp_path / "ja")}
        return
    with pytest.raises(
        ConfigError, match=r"c\.yml:\d+: models: \./ja: parameters\.delta: .*extract"
    ):
        pool_to_search(config, path)


def test_a_search_names_what_it_does_not_keep_of_a_config():
    filters = [{"filter": "mlp", "value": [0, 1]}, {"value": 1}]
    config = optimer_yaml(
        merge_method="ties",
        parameters={"density": 0.5, "weight": 1.0},
        models=[
            {"model": "a", "parameters": {"weight": [0, 1]}},
            {"model": "b", "parameters": {"weight": 0.5, "delta": True}},
            {"model": "c", "parameters": {"weight": [{"filter": "mlp", "value": 1}], "t": 1}},
            {"model": "d", "parameters": {"weight": [0, 1, 2, 3, 4]}},
            {"model": "e", "parameters": {"weight": filters}},
            {"model": "f"},
            {"model": "g", "parameters": {"weight": [{"filter": "layers.3", "value": 1}]}},
        ],
    )
    assert unsearched_settings(config, Path("c.yml")) == [
        "merge_method: ties",
        "parameters.density",
        "models: c: parameters.t",
        "models: d: parameters.weight (5 values)",
        "models: g: parameters.weight (filters that do not split the model)",
    ]
    assert unsearched_settings(optimer_yaml(), Path("c.yml")) == []


REPORTS = {  # the forms of configs in mergekit's issues 482, 284, 428, 469 and 23
    "slerp over one slice": (
        """slices:
- sources:
  - model: ./base
    layer_range:
    - 0
    - 5
  - model: ./math
    layer_range:
    - 0
    - 5
merge_method: slerp
base_model: ./base
parameters:
  t:
  - filter: self_attn
    value:
    - 0
    - 0.5
    - 1
  - value: 0.5
dtype: bfloat16
""",
        ["math"],
        "Ignored: merge_method: slerp, parameters.t",
    ),
    "gradients of weight and density": (
        """models:
  - model: ./base
  - model: ./math
    parameters:
      density: [0, 0.25, 0.5, 0.75, 1]
      weight: [0, 0.25, 0.5, 0.75, 1]
merge_method: dare_ties
base_model: ./base
parameters:
  int8_mask: true
dtype: bfloat16
""",
        ["math.gradient.1", "math.gradient.2", "math.gradient.3", "math.gradient.4"],
        "density, models: ./math: parameters.weight (5 values)",
    ),
    "the base with a weight, and its tokenizer": (
        """base_model: ./base
dtype: bfloat16
merge_method: ties
models:
- model: ./base
  parameters:
    density: 0.5
    weight: 0.5
- model: ./math
  parameters:
    density: 0.5
    weight: 0.5
parameters:
  int8_mask: true
  normalize: false
tokenizer_source: base
""",
        ["math"],
        "Ignored: merge_method: ties, models: ./base: parameters.density",
    ),
    "a chat template and no weights": (
        """models:
  - model: ./base
  - model: ./math
base_model: ./base
merge_method: slerp
dtype: bfloat16
tokenizer_source: "base"
chat_template: "chatml"
parameters:
  t: [0, 0.5, 1, 0.5, 0]
""",
        ["math"],
        "parameters.t, chat_template: 'chatml'",
    ),
    "each kind of weight": (
        """models:
  - model: ./math
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: ./code
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: ./base
parameters:
  normalize: true
  int8_mask: true
dtype: bfloat16
""",
        ["math", "code.mlp", "code.else"],
        "Ignored: merge_method: ties, parameters.normalize",
    ),
}


@pytest.mark.parametrize("case", REPORTS.values(), ids=REPORTS)
def test_configs_of_public_reports_are_searched_and_run(
    case, folder, tmp_path, monkeypatch, caplog
):
    text, names, said = case
    monkeypatch.chdir(folder)
    path = folder / "merge.yml"
    path.write_text(text)
    config = study_of_merge_config(path, folder / "obj.yaml")
    assert config.weight_names == names and said in caplog.text
    weights = weights_for(config)
    kinds = dict.fromkeys(config.vectors, "checkpoint")
    printed = merge_text(path, merge_config_of_study(config, weights, path, kinds), "note")
    assert all(line in printed for line in text.splitlines() if "base" in line)
    build_study(config, weights, tmp_path / "ours")
    run_plain_mergekit(printed, tmp_path / "theirs")
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert not any(ulps_apart(ours[name], theirs[name]).any() for name in ours)


def sliced(*pieces: str, base: str = "base_model: ./base") -> str:
    lines = "".join(f"  - {{sources: [{piece}]}}\n" for piece in pieces)
    return f"merge_method: linear\n{base}\ndtype: bfloat16\nslices:\n{lines}"


LOW, HIGH = "{model: ./math, layer_range: [0, 2]}", "{model: ./math, layer_range: [2, 5]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            sliced(HIGH, LOW),
            r"c.yml:5: slices: layer_range: found \[2, 5\], expected the layers from 0 .*passthro",
        ),
        (
            sliced(LOW, LOW),
            r"c.yml:6: slices: layer_range: found \[0, 2\], expected the layers from 2",
        ),
        (sliced(f"{LOW}, {{model: ./base, layer_range: [1, 3]}}"), "c.yml:5: slices: layer_range"),
        (sliced(f"{LOW}, {LOW}", HIGH), "c.yml:5: slices: .*math is there twice"),
        (sliced(LOW), "c.yml:5: slices: ends at layer 2, but the base has 5 layers"),
        (
            sliced(LOW, HIGH).replace("]}\n", "], residual_weight: 0.5}\n", 1),
            "c.yml:5: slices: residual_weight: only mergekit reads it",
        ),
        (sliced(LOW, HIGH, base="# base"), "field 'base_model' is missing"),
        (
            sliced(LOW, HIGH).replace("]}\n", "], base_model: ./code}\n", 1),
            r"c.yml:5: slices: base_model: found \S+/code, but the base of the config is \S+/base",
        ),
        (
            sliced(LOW, HIGH, base="# base")
            .replace("]}\n", "], base_model: ./base}\n", 1)
            .replace("]}\n", "], base_model: ./code}\n", 1),
            r"c.yml:6: slices: base_model: found \S+/code, but the base of the config is \S+/base",
        ),
        (
            sliced(LOW, HIGH, base="# base").replace("]}\n", "], base_model: ./base}\n", 1),
            r"c.yml:6: slices: base_model: other slices have the base \S+/base, this one has none",
        ),
        (
            sliced().replace("slices:", "modules: {text: {models: [{model: ./math}]}}"),
            "c.yml:4: modules: has the models of each part.*with a filter for each part",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(folder, text, message):
    path = folder / "c.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        study_of_merge_config(path, folder / "obj.yaml")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            "[{filter: attn, value: 1}, {filter: atn, value: 1}, {value: 0}]",
            "c.yml:4: .*'atn' in its",
        ),
        ("[{filter: attn, value: 1}, {filter: mlp, value: 1}]", "c.yml:4: .*no group takes"),
    ],
)
def test_a_filter_that_fits_no_tensor_is_named_with_its_line(folder, tmp_path, weight, message):
    path = folder / "c.yml"
    models = f"models:\n- {{model: ./math, parameters: {{weight: {weight}}}}}\n"
    path.write_text(f"merge_method: linear\nbase_model: ./base\n{models}")
    with pytest.raises(ModelError, match=message):
        search_study(path, tmp_path / "s", objective=folder / "obj.yaml")


def test_reordered_layers_are_merged_alone_and_then_searched(folder, tmp_path, monkeypatch):
    """What the error advises gives the merge that mergekit makes of the slices."""
    monkeypatch.chdir(folder)
    layers = [("[3, 5]", "[0, 2]"), ("[0, 2]", "[1, 3]"), ("[1, 2]", "[4, 5]")]  # base's, math's
    head = "base_model: ./base\ndtype: float32\nout_dtype: float32\n"
    pieces = [
        f"{{model: ./base, layer_range: {own}}}, "
        f"{{model: ./math, layer_range: {other}, parameters: {{weight: 0.75}}}}"
        for own, other in layers
    ]
    with pytest.raises(ConfigError, match="passthrough"):
        (folder / "c.yml").write_text(sliced(*pieces))
        study_of_merge_config(folder / "c.yml", folder / "obj.yaml")
    lines = "".join(f"- {{sources: [{piece}]}}\n" for piece in pieces)
    run_plain_mergekit(f"merge_method: task_arithmetic\n{head}slices:\n{lines}", tmp_path / "all")
    for name, own in (("base", 0), ("math", 1)):
        text = "".join(
            f"- {{sources: [{{model: ./{name}, layer_range: {pair[own]}}}]}}\n" for pair in layers
        )
        alone = f"merge_method: passthrough\n{head}slices:\n{text}"
        run_plain_mergekit(alone, folder / f"stacked-{name}")
    path = folder / "stacked.yml"
    path.write_text(
        "merge_method: task_arithmetic\nbase_model: ./stacked-base\ndtype: float32\n"
        "models: [{model: ./stacked-math, parameters: {weight: 0.5}}]\n"
    )
    config = study_of_merge_config(path, folder / "obj.yaml")
    build_study(config, {"stacked-math": 0.75}, tmp_path / "ours")
    assert_same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "all"))


def test_modules_are_the_filters_that_the_error_advises(
    save_model, corpus_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("base", 0), ("math", 1)):
        torch.manual_seed(seed)
        model = Qwen3_5ForConditionalGeneration(qwen35_multimodal())
        shutil.copytree(save_model(model, f"modules-{name}"), tmp_path / name)
    head = "merge_method: task_arithmetic\nbase_model: ./base\ndtype: float32\n"
    (tmp_path / "obj.yaml").write_text(f"terms: [{{text: {corpus_dir / 'aaa.search.jsonl'}}}]\n")
    parts = {"model.visual.blocks": 0.2, "model.language_model.layers": 0.5, "default": 0.75}
    entry = "{{models: [{{model: ./math, parameters: {{weight: {}}}}}, {{model: ./base}}]}}"
    given = "".join(f"  {name}: {entry.format(weight)}\n" for name, weight in parts.items())
    run_plain_mergekit(f"{head}modules:\n{given}", tmp_path / "theirs")
    *filters, rest = parts.items()
    items = ", ".join(f"{{filter: {name}, value: {weight}}}" for name, weight in filters)
    setting = f"[{items}, {{value: {rest[1]}}}]"
    path = tmp_path / "c.yml"
    path.write_text(f"{head}models: [{{model: ./math, parameters: {{weight: {setting}}}}}]\n")
    config = study_of_merge_config(path, tmp_path / "obj.yaml")
    names = [f"math.{name}".replace("default", "else") for name in parts]
    assert config.weight_names == names
    build_study(config, dict(zip(names, parts.values(), strict=True)), tmp_path / "ours")
    assert_same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))


def test_it_is_refused_before_a_library_is_loaded(folder):
    path = folder / "c.yml"
    path.write_text(sliced(HIGH, LOW))
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from optimer_hf.searching.study_file import study_of_merge_config\n"
        "try:\n    study_of_merge_config(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except Exception as error:\n    print(error)\n"
        "print(sorted({'torch', 'mergekit', 'transformers'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, str(path), str(folder / "obj.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "layer_range: found [2, 5]" in result.stdout and result.stdout.endswith("[]\n")


@pytest.mark.parametrize("has_weight", [False, True], ids=["left out", "with a weight"])
def test_an_adapter_of_some_layers_is_searched_with_the_slice_that_has_it(
    folder, tmp_path, monkeypatch, has_weight
):
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "lora", folder / "part", dirs_exist_ok=True)
    tensors = load_file(folder / "part" / "adapter_model.safetensors")
    high = {name: tensor for name, tensor in tensors.items() if layer_of(name) in (2, 3)}
    save_file(high, folder / "part" / "adapter_model.safetensors")
    settings = json.loads((folder / "part" / "adapter_config.json").read_text())
    settings["layers_to_transform"] = [2, 3]
    (folder / "part" / "adapter_config.json").write_text(json.dumps(settings))
    path = folder / "c.yml"
    low = "{model: ./math, layer_range: [0, 2]}"
    low += ", {model: ./part, layer_range: [0, 2]}" * has_weight
    high = "{model: ./math, layer_range: [2, 5]}, {model: ./part, layer_range: [2, 5]}"
    path.write_text(sliced(low, high))
    arguments = {"objective": folder / "obj.yaml", "n_trials": 4}
    if has_weight:
        with pytest.raises(ModelError, match=r"c.yml:5: .*moves nothing in the layers of group"):
            search_study(path, tmp_path / "s", **arguments)
        return
    study, _ = search_study(path, tmp_path / "s", **arguments)
    assert study.config.fixed == {"part.layers.0:2": 0.0}
    build_recipe(tmp_path / "s" / "recipe.yaml", tmp_path / "m")
    build_of_trial = tmp_path / "trial"
    build_study(study.config, study.best_trial.weights, build_of_trial)
    assert_same_bits(tensors_in(tmp_path / "m"), tensors_in(build_of_trial))


PLAIN = "[{filter: self_attn, value: 0.2}, {value: 0.3}]"
INSIDE = "[{filter: self_attn, value: [0, 1]}, {value: 0.3}]"


def write_pool(path: Path, math: str, code: str = "0.5") -> dict:
    """Write a config with two weights, and return the other arguments of a short search."""
    models = f"- {{model: ./math, parameters: {{weight: {math}}}}}  # m\n"
    models += f"- {{model: ./code, parameters: {{weight: {code}}}}}\n"
    path.write_text(f"merge_method: linear\nbase_model: ./base\nmodels:\n{models}")
    return {"objective": path.parent / "obj.yaml", "n_trials": 3}


@pytest.mark.parametrize(
    ("math", "began", "code"),
    [
        ("0.5", ["math"], "[0, 1]"),
        ("0.5", ["math"], INSIDE),
        (PLAIN, ["math.self_attn", "math.else"], "[0, 1]"),
    ],
    ids=["a gradient", "gradients within filters", "a gradient beside filters"],
)
def test_a_study_that_began_with_one_weight_for_a_gradient_goes_on_so(
    folder, tmp_path, caplog, math, began, code
):
    path = folder / "c.yml"
    search_study(path, tmp_path / "s", **write_pool(path, math))
    objective = write_pool(path, math, code)
    assert len(read_study(path, **objective).weight_names) > len(began) + 1
    assert "began" not in caplog.text
    study, merge_config = search_study(path, tmp_path / "s", **objective)
    assert study.config.weight_names == [*began, "code"]
    assert isinstance(merge_config["models"][1]["parameters"]["weight"], float)
    assert "# m" in merge_text(path, merge_config, "note")
    assert "began with fewer weights for code, and goes on so" in caplog.text


def in_slices(low: str, high: str) -> str:
    given = ((LOW, low), (HIGH, high))
    return sliced(*(f"{piece[:-1]}, parameters: {{weight: {text}}}}}" for piece, text in given))


@pytest.mark.parametrize(
    ("before", "after", "began"),
    [
        (in_slices("0.5", "1"), in_slices(PLAIN, INSIDE), ["math.layers.0:2", "math.layers.2:5"]),
        (in_slices("0.5", "1"), in_slices("[0, 1]", "1"), ["math.layers.0:2", "math.layers.2:5"]),
        (PLAIN, INSIDE, ["math.self_attn", "math.else", "code"]),
    ],
    ids=["filters within slices", "gradients within slices", "gradients within filters"],
)
def test_a_study_that_began_with_fewer_weights_goes_on_with_them(
    folder, tmp_path, caplog, before, after, began
):
    """An older version gave one weight to each slice, and to each filter."""
    path, arguments = folder / "c.yml", {"objective": folder / "obj.yaml", "n_trials": 3}
    if "slices" in before:
        path.write_text(before)
    else:
        write_pool(path, before)
    search_study(path, tmp_path / "s", **arguments)
    if "slices" in after:
        path.write_text(after)
    else:
        write_pool(path, after)
    assert len(read_study(path, **arguments).weight_names) > len(began)
    study, _ = search_study(path, tmp_path / "s", **arguments)
    assert study.config.weight_names == began
    assert "began with fewer weights for math, and goes on so" in caplog.text


def test_a_study_that_began_with_one_weight_is_not_one_of_filters(folder, tmp_path):
    path = folder / "c.yml"
    search_study(path, tmp_path / "s", **write_pool(path, "0.5"))
    with pytest.raises(StudyError, match=r"vectors.math.by: found .*self_attn"):
        search_study(path, tmp_path / "s", **write_pool(path, PLAIN))
