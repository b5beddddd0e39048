"""mergekit_weights.py: the weights of a mergekit YAML as a row of the sealed test, against what
mergekit makes of the YAML.
"""

import pytest
import torch

from optimer_hf.searching.study_file import read_study, study_of_merge_config
from tests.support.merges import build_study, run_plain_mergekit, tensors_in

HEAD = "base_model: ./base\ndtype: float32\n"


def models(*weights: str, base: str | None = None, **parameters: str) -> str:
    """Return the models math and code with these weights, and parameters of the whole."""
    lines = [] if base is None else [f"- {{model: ./base, parameters: {{weight: {base}}}}}"]
    for name, weight in zip(("math", "code"), weights, strict=False):
        given = f", parameters: {{weight: {weight}}}" * bool(weight)
        lines.append(f"- {{model: ./{name}{given}}}")
    text = "models:\n" + "".join(f"{line}\n" for line in lines)
    given = ", ".join(f"{name.rstrip('_')}: {value}" for name, value in parameters.items())
    return text + f"parameters: {{{given}}}\n" * bool(given)


def slices(*weights: tuple[str, str], parameters: str = "", base: bool = True) -> str:
    """Return slices of layers 0, 1-2, 3-4 with the weights of math and code."""
    text = "slices:\n"
    for layers, (math, code) in zip(("[0, 1]", "[1, 3]", "[3, 5]"), weights, strict=False):
        text += "- sources:\n"
        text += (
            f"  - {{model: ./base, layer_range: {layers}, parameters: {{weight: 0.5}}}}\n" * base
        )
        for name, weight in (("math", math), ("code", code)):
            given = f", parameters: {{weight: {weight}}}"
            text += f"  - {{model: ./{name}, layer_range: {layers}{given}}}\n" * bool(weight)
        text += f"  parameters: {parameters}\n" * bool(parameters)
    return text


FILTERS = "[{filter: mlp, value: 0.3}, {filter: self_attn, value: -0.5}, {value: 1.5}]"
OTHERS = "[{filter: mlp, value: 0.1}, {filter: self_attn, value: 0.5}, {filter: '*', value: 0.2}]"
ARITHMETIC, LINEAR = "task_arithmetic", "linear"
SAME = {  # method, config, weights that give the same merge
    "numbers": (ARITHMETIC, models("0.5", "-0.25"), {"math": 0.5, "code": -0.25}),
    "beyond all bounds": (ARITHMETIC, models("2.5", "0"), {"math": 2.5, "code": 0.0}),
    "ours": ("optimer", models("0.5", "0.75"), {"math": 0.5, "code": 0.75}),
    "one for all": (ARITHMETIC, models("", "0.2", weight="0.4"), {"math": 0.4, "code": 0.2}),
    "normalize": (ARITHMETIC, models("0.5", "1.5", normalize="true"), {"math": 0.25, "code": 0.75}),
    "normalize a sum of 0": (
        ARITHMETIC,
        models("0.5", "-0.5", normalize="true"),
        {"math": 0.5, "code": -0.5},
    ),
    "lambda": (ARITHMETIC, models("0.5", "1", lambda_="0.5"), {"math": 0.25, "code": 0.5}),
    "lambda of a normalized sum": (
        ARITHMETIC,
        models("0.5", "1.5", lambda_="2", normalize="true"),
        {"math": 0.5, "code": 1.5},
    ),
    "a weight of the base": (ARITHMETIC, models("0.5", "1", base="9"), {"math": 0.5, "code": 1.0}),
    "linear": (LINEAR, models("1", "2", base="1"), {"math": 0.25, "code": 0.5}),
    "linear, one for all": (LINEAR, models("", "", weight="1"), {"math": 1 / 3, "code": 1 / 3}),
    "linear, not normalized": (
        LINEAR,
        models("0.5", "0.25", base="0.25", normalize="false"),
        {"math": 0.5, "code": 0.25},
    ),
    "a gradient": (
        ARITHMETIC,
        models("[0, 0.4, 1]", "0.5"),
        {"math.gradient.1": 0.0, "math.gradient.2": 0.4, "math.gradient.3": 1.0, "code": 0.5},
    ),
    "gradients, normalized to one sum": (
        LINEAR,
        models("[0, 2]", "[2, 0]", base="2"),
        {
            **{"math.gradient.1": 0.0, "math.gradient.2": 0.5},
            **{"code.gradient.1": 0.5, "code.gradient.2": 0.0},
        },
    ),
    "filters": (
        ARITHMETIC,
        models(FILTERS, "0.5", lambda_="0.5"),
        {"math.mlp": 0.15, "math.self_attn": -0.25, "math.else": 0.75, "code": 0.25},
    ),
    "filters, normalized": (
        LINEAR,
        models(FILTERS, OTHERS, base="0.6"),
        {
            **{"math.mlp": 0.3, "math.self_attn": -0.5 / 0.6, "math.else": 1.5 / 2.3},
            **{"code.mlp": 0.1, "code.self_attn": 0.5 / 0.6, "code.else": 0.2 / 2.3},
        },
    ),
    "gradients within filters": (
        ARITHMETIC,
        models("[{filter: mlp, value: [0, 1]}, {value: 0.5}]", "1"),
        {"math.mlp/gradient.1": 0.0, "math.mlp/gradient.2": 1.0, "math.else": 0.5, "code": 1.0},
    ),
    "the rest of a filter, of all models": (
        ARITHMETIC,
        models("[{filter: mlp, value: 1}]", "", weight="[{filter: mlp, value: 9}, {value: 0.5}]"),
        {"math.mlp": 1.0, "math.else": 0.5, "code.mlp": 9.0, "code.else": 0.5},
    ),
    "filters and gradients in slices": (
        ARITHMETIC,
        slices(("[{filter: mlp, value: 0.3}, {value: 0.5}]", ""), ("0.5", "1"))
        .replace("[1, 3]", "[1, 5]")
        .replace("weight: 1}", "weight: [0, 1]}"),
        {
            **{"math.layers.0:1/mlp": 0.3, "math.layers.0:1/else": 0.5, "math.layers.1:5": 0.5},
            "code.layers.0:1": 0.0,
            **{"code.layers.1:5/gradient.1": 0.0, "code.layers.1:5/gradient.2": 1.0},
        },
    ),
    "slices": (
        ARITHMETIC,
        slices(("0.5", "0.25"), ("1", ""), ("0.5", "0.25"), parameters="{lambda: 2}"),
        {
            **{"math.layers.0:1": 1.0, "math.layers.1:3": 2.0, "math.layers.3:5": 1.0},
            **{"code.layers.0:1": 0.5, "code.layers.1:3": 0.0, "code.layers.3:5": 0.5},
        },
    ),
    "linear slices": (
        LINEAR,
        slices(("0.5", "1"), ("1", "1"), ("0.5", "1")),
        {
            **{"math.layers.0:1": 0.25, "math.layers.1:3": 0.4, "math.layers.3:5": 0.25},
            **{"code.layers.0:1": 0.5, "code.layers.1:3": 0.4, "code.layers.3:5": 0.5},
        },
    ),
    "linear slices without the base": (
        LINEAR,
        slices(("1", "1"), ("1", "3"), ("1", "1"), base=False),
        {
            **{"math.layers.0:1": 0.5, "math.layers.1:3": 0.25, "math.layers.3:5": 0.5},
            **{"code.layers.0:1": 0.5, "code.layers.1:3": 0.75, "code.layers.3:5": 0.5},
        },
    ),
}


@pytest.mark.parametrize(("method", "text", "weights"), SAME.values(), ids=SAME)
def test_the_weights_of_a_yaml_are_a_row_that_merges_as_mergekit_does(
    method, text, weights, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder)
    path = folder / "mine.yml"
    path.write_text(f"merge_method: {method}\n{HEAD}{text}")
    config = study_of_merge_config(path, folder / "obj.yaml", folder / "test.yaml")
    (row,) = config.baselines.weights
    assert row == "as in mine.yml"
    found = config.fill_weights(config.baselines.weights[row])
    assert found == pytest.approx(weights, abs=1e-12)
    build_study(config, found, tmp_path / "ours")
    ours = tensors_in(tmp_path / "ours")
    if method == "optimer":  # mergekit alone does not have it
        path.write_text(path.read_text().replace("optimer", ARITHMETIC))
    run_plain_mergekit(path.read_text(), tmp_path / "theirs")
    for name, tensor in tensors_in(tmp_path / "theirs").items():
        assert torch.allclose(ours[name], tensor, rtol=1e-5, atol=1e-6), name


NO_ROW = {
    "no sum": ("ties", models("0.5", "0.5")),
    "no weights at all": ("slerp", models("", t="0.5")),
    "five values": (ARITHMETIC, models("[0, 1, 2, 3, 4]", "1")),
    "a filter that is no group": (
        ARITHMETIC,
        models("[{filter: layers.3, value: 0}, {value: 1}]", "1"),
    ),
    "gradients, divided by their sum": (LINEAR, models("[0, 1]", "[1, 1]", base="1")),
    "sums that differ by filter": (LINEAR, models(FILTERS, "1", base="1")),
    "the base three times": (LINEAR, models("1", "1", base="1", normalize="false")),
    "a lambda along the layers": (ARITHMETIC, models("1", "1", lambda_="[0, 1]")),
    "another last slice": (ARITHMETIC, slices(("1", "1"), ("1", "1"), ("0.5", "1"))),
}


@pytest.mark.parametrize(("method", "text"), NO_ROW.values(), ids=NO_ROW)
def test_a_merge_that_no_weights_give_is_no_row_and_how_to_compare_is_said(
    method, text, folder, caplog
):
    path = folder / "mine.yml"
    path.write_text(f"merge_method: {method}\n{HEAD}{text}")
    config = study_of_merge_config(path, folder / "obj.yaml", folder / "test.yaml")
    assert not config.baselines.weights
    assert f"optimer merge {path} MODEL" in caplog.text
    assert "optimer compare STUDY_DIR --model 'as in mine.yml=MODEL'" in caplog.text


def test_a_yaml_without_weights_is_no_merge_to_compare_with(folder, caplog):
    path = folder / "mine.yml"
    path.write_text(f"merge_method: {ARITHMETIC}\n{HEAD}{models('', '1')}")
    assert not read_study(
        path, objective=folder / "obj.yaml", test=folder / "test.yaml"
    ).baselines.weights
    assert "MODEL" not in caplog.text
