"""Slices, filters and gradients of a mergekit YAML in all combinations, and the same groups in a
study.yaml: the merge that is searched, a sum in float64, and what plain mergekit makes of the
exports.
"""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from optimer_hf.experiment.checking import check_file
from optimer_hf.merging.mergekit_pool import plain_config_of
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.searching.study_file import (
    merge_config_of_study,
    merge_text,
    study_of_merge_config,
)
from optimer_hf.study.config import StudyConfig
from tests.support.merges import (
    N_LAYERS,
    assert_same_bits,
    build_study,
    run_plain_mergekit,
    tensors_in,
)

LAYOUTS = {  # slices of the YAML, and the runs of layers that have weights of their own
    "models": ([], [(0, 5)]),
    "two slices": ([(0, 2), (2, 5)], [(0, 2), (2, 5)]),
    "five slices": ([(n, n + 1) for n in range(5)], [(0, 2), (2, 3), (3, 4), (4, 5)]),
}
DTYPES = ("float32", "bfloat16")
CASES = list(product(LAYOUTS, (False, True), (False, True)))
IDS = [
    f"{layout}{', filters' * by_name}{', gradients' * along}" for layout, by_name, along in CASES
]


def settings_in(by_name: bool, along: bool) -> str:
    """Return a weight with filters, of which one also fits the last norm, or with gradients."""
    values = "[0.1, 0.9]" if along else "0.5"
    if not by_name:
        return values
    norm = "{filter: norm, value: 0.3}"
    return f"[{{filter: self_attn, value: {values}}}, {norm}, {{value: {values}}}]"


def write_yaml(folder: Path, layout: str, setting: str, dtype: str) -> Path:
    slices, text = LAYOUTS[layout][0], f"base_model: ./base  # b\ndtype: {dtype}\n"
    math = f"model: ./math, parameters: {{weight: {setting}}}"
    if not slices:
        text += f"models:\n- {{{math}}}  # m\n- {{model: ./code, parameters: {{weight: 0.25}}}}\n"
    else:
        text += "slices:\n"
    for start, end in slices:
        layers = f"layer_range: [{start}, {end}]"
        text += (
            f"- sources:\n  - {{model: ./base, {layers}}}\n  - {{{math}, {layers}}}  # {start}\n"
        )
        text += f"  - {{model: ./code, {layers}, parameters: {{weight: 0.25}}}}\n"
    path = folder / "merge.yml"
    path.write_text(f"merge_method: task_arithmetic\n{text}")
    return path


def keys_of(layout: str, by_name: bool, along: bool) -> dict[str, list[str]]:
    """Return the keys of the weights of math, in order, by what they begin with."""
    keys: dict[str, list[str]] = {}
    for start, end in LAYOUTS[layout][1]:
        run = [] if layout == "models" else [f"layers.{start}:{end}"]
        for name in ("self_attn", "norm", "else") if by_name else ("",):
            has_values = along and name != "norm" and layout != "five slices"
            steps = [[f"gradient.{n}"] for n in (1, 2)] if has_values else [[]]
            group = "/".join([*run, *[name] * bool(name)])
            keys[group] = ["/".join([*run, *[name] * bool(name), *step]) for step in steps]
    return keys


def weight_in(weights: dict, keys: dict[str, list[str]], layout: str, tensor: str) -> float:
    """Return the weight of math in a tensor, without the code under test."""
    numbered = re.search(r"layers\.(\d+)\.", tensor)
    layer = int(numbered[1]) if numbered else 0
    start, end = next(run for run in LAYOUTS[layout][1] if run[0] <= layer < run[1])
    run = "" if layout == "models" else f"layers.{start}:{end}"
    by_name = any("self_attn" in key for key in keys)
    name = "self_attn" if "self_attn" in tensor else "norm" if "norm" in tensor else "else"
    group = "/".join(step for step in (run, name if by_name else "") if step)
    values = [weights[f"math.{key}" if key else "math"] for key in keys[group]]
    if len(values) == 1:
        return values[0]
    place = (layer - start) / (end - start - 1)
    return float(np.interp(place, np.linspace(0, 1, len(values)), values))


@pytest.mark.parametrize(("layout", "by_name", "along"), CASES, ids=IDS)
def test_slices_filters_and_gradients_are_searched_together(
    folder, tmp_path, monkeypatch, layout, by_name, along
):
    monkeypatch.chdir(folder)
    dtype = DTYPES["lm_head.weight" in Checkpoint(folder / "base").names]
    path = write_yaml(folder, layout, settings_in(by_name, along), dtype)
    config = study_of_merge_config(path, folder / "obj.yaml", folder / "test.yaml")
    keys = keys_of(layout, by_name, along)
    own = [f"math.{key}" if key else "math" for group in keys.values() for key in group]
    assert [name for name in config.weight_names if name.startswith("math")] == own
    weights = {name: 0.9 - 0.13 * at for at, name in enumerate(config.weight_names)}
    build_study(config, weights, tmp_path / "ours")
    ours = tensors_in(tmp_path / "ours")
    of_code = {name.replace("code", "math"): w for name, w in weights.items() if "code" in name}
    for name, merged in ours.items():
        parts = [Checkpoint(folder / each).read(name).double() for each in ("base", "math", "code")]
        code = weight_in(of_code, keys_of(layout, False, False), layout, name)
        total = parts[0] + weight_in(weights, keys, layout, name) * (parts[1] - parts[0])
        total += code * (parts[2] - parts[0])
        rtol = 2**-8 if dtype == "bfloat16" else 1e-5
        torch.testing.assert_close(merged.double(), total, rtol=rtol, atol=1e-6)

    kinds = dict.fromkeys(config.vectors, "checkpoint")
    printed = merge_text(path, merge_config_of_study(config, weights, path, kinds), "note")
    assert "# b" in printed and ("# m" in printed or "# 0" in printed)
    run_plain_mergekit(printed, tmp_path / "theirs")
    assert_same_bits(ours, tensors_in(tmp_path / "theirs"))

    study = StudyConfig.model_validate_json(config.model_dump_json())
    export = plain_config_of(study, weights, kinds, N_LAYERS)
    run_plain_mergekit(yaml.safe_dump(export), tmp_path / "exported")
    assert_same_bits(ours, tensors_in(tmp_path / "exported"))

    rows = config.baselines.weights
    assert bool(rows) == (layout != "five slices" or not along)
    if rows:
        build_study(config, config.fill_weights(rows["as in merge.yml"]), tmp_path / "row")
        text = path.read_text().replace("dtype: ", "dtype: float32\nout_dtype: ")  # one rounding
        run_plain_mergekit(text, tmp_path / "given")
        assert_same_bits(tensors_in(tmp_path / "row"), tensors_in(tmp_path / "given"))


@pytest.mark.parametrize(("layout", "by_name", "along"), CASES, ids=IDS)
def test_validate_says_which_weights_a_search_would_have(folder, layout, by_name, along):
    path = write_yaml(folder, layout, settings_in(by_name, along), "float32")
    searched = [*study_of_merge_config(path, folder / "obj.yaml").free]
    said = check_file(path)[0].removeprefix("merge config, ")
    count, _, names = said.partition(" to search: ")
    if layout != "models" and by_name:  # a slice may lack all tensors of a filter
        most = int(count.removeprefix("at most ").split()[0])
        assert count.startswith("at most ") and most >= len(searched)
        return
    assert names.split(", ") == searched and count == f"{len(searched)} weights"


@pytest.mark.parametrize("given", ["in slices", "in both", "in two ways"])
def test_a_base_that_every_slice_names_is_the_base_of_the_config(
    folder, tmp_path, monkeypatch, given
):
    monkeypatch.chdir(folder)
    files = folder / "obj.yaml", folder / "test.yaml"
    path = write_yaml(folder, "two slices", settings_in(True, False), "float32")
    once = study_of_merge_config(path, *files)
    base = f"{folder}/base" if given == "in two ways" else "./base"
    text = re.sub("(?m)^- sources:", f"- base_model: {base}\n  sources:", path.read_text())
    path.write_text(text.replace("base_model: ./base  # b\n", "", given == "in slices"))
    config = study_of_merge_config(path, *files)
    assert config == once

    if given != "in two ways":  # which mergekit takes for two models
        (row,) = config.baselines.weights.values()
        build_study(config, config.fill_weights(row), tmp_path / "row")
        run_plain_mergekit(path.read_text(), tmp_path / "given")
        assert_same_bits(tensors_in(tmp_path / "row"), tensors_in(tmp_path / "given"))

    weights = {name: 0.9 - 0.13 * at for at, name in enumerate(config.weight_names)}
    kinds = dict.fromkeys(config.vectors, "checkpoint")
    printed = merge_text(path, merge_config_of_study(config, weights, path, kinds), "note")
    assert printed.count("base_model: ./base") == 3 and "# 0" in printed
    build_study(config, weights, tmp_path / "ours")
    run_plain_mergekit(printed, tmp_path / "theirs")
    assert_same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
