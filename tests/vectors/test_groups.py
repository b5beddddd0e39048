"""groups.py: which tensors belong to which group."""

import numpy as np
import pytest

from optimer_hf.vectors.groups import Groups, slopes_of_groups, weights_of_parts

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(5)),
    *(f"model.layers.{n}.mlp.experts.{e}.w1.weight" for n in range(5) for e in (0, 7)),
    "model.norm.weight",
    "lm_head.weight",
]


def numbered(kind: str, n: int) -> Groups:
    return Groups.of_keys(f"{kind}.{number + 1}" for number in range(n))


def layers_of(names: list[str]) -> set[str]:
    return {name.split(".")[2] for name in names if ".layers." in name}


def test_a_tensor_belongs_to_the_first_group_that_is_a_part_of_its_name():
    split = Groups.of_keys(["experts.7", "mlp", "else"]).split(NAMES, 0)
    assert list(split) == ["experts.7", "mlp", "else"]
    assert len(split["experts.7"]) == len(split["mlp"]) == 5
    assert sorted(name for names in split.values() for name in names) == sorted(NAMES)
    assert Groups.of_keys(
        [
            "mlp",
        ]
    ).split(NAMES, 0)[""] == sorted(n for n in NAMES if "mlp" not in n)


@pytest.mark.parametrize(
    ("n_groups", "layers"),
    [(2, ["012", "34"]), (3, ["01", "23", "4"]), (5, ["0", "1", "2", "3", "4"])],
)
def test_layers_are_split_into_runs_and_the_first_has_what_is_in_no_layer(n_groups, layers):
    split = numbered("layers", n_groups).split(NAMES, 5)
    assert [*map(layers_of, split.values())] == [set(run) for run in layers]
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(
        split["layers.1"]
    )


@pytest.mark.parametrize("kind", ["layers", "gradient"])
def test_a_layer_for_multi_token_prediction_belongs_to_the_last_group(kind):
    groups = numbered(kind, 2)
    split = groups.split(["model.layers.4.w", "model.layers.5.w"], 5)
    last = split["layers.2" if kind == "layers" else "layers.5"]
    assert last == ["model.layers.4.w", "model.layers.5.w"]


def test_two_stacks_of_layers_cannot_be_split():
    names = ["vision.layers.0.w", "text.layers.0.w"]
    with pytest.raises(ValueError, match="count layers apart from each other"):
        numbered("layers", 2).split(names, 4)


def test_a_gradient_is_interpolated_and_its_derivatives_are_shared_out_alike():
    groups, n_layers = {"math": numbered("gradient", 3), "ja": Groups.of_keys(["mlp", "else"])}, 6
    values = np.array([0.2, -0.4, 1.0])
    weights = {f"math.gradient.{n + 1}": value for n, value in enumerate(values)}
    parts = weights_of_parts(weights | {"ja.mlp": 0.5, "ja.else": 0.0}, groups, n_layers)
    layers = np.linspace(0, 1, n_layers)
    expected = np.interp(layers, [0, 0.5, 1], values)
    assert [parts.pop(f"math.layers.{n + 1}") for n in range(n_layers)] == pytest.approx(expected)
    assert parts == {"ja.mlp": 0.5, "ja.else": 0.0}
    assert weights_of_parts({}, groups, n_layers)["math.layers.1"] == 0

    slopes = {f"math.layers.{n + 1}": float(n * n) for n in range(n_layers)}
    gathered = slopes_of_groups(slopes | {"ja.mlp": 3.0}, groups, n_layers)
    hats = [np.interp(layers, [0, 0.5, 1], row) for row in np.eye(3)]
    expected = [hat @ [*slopes.values()] for hat in hats]
    assert [gathered.pop(name) for name in weights] == pytest.approx(expected)
    assert gathered == {"ja.mlp": 3.0}


def test_runs_of_layers_end_where_they_say():
    groups = Groups.of_keys(["layers.0:1", "layers.1:5"])
    assert [*map(layers_of, groups.split(NAMES, 5).values())] == [{"0"}, {*"1234"}]
    assert "lm_head.weight" in groups.split(NAMES, 5)["layers.0:1"]


@pytest.mark.parametrize(
    "groups",
    [
        Groups.of_keys(["mlp", "else"]),
        numbered("layers", 3),
        Groups.of_keys(["layers.0:2", "layers.2:5"]),
        numbered("gradient", 3),
        Groups.of_keys(["mlp/gradient.1", "mlp/gradient.2", "else"]),
        Groups.of_keys(["layers.1/mlp", "layers.1/else", "layers.2"]),
        Groups.of_keys(["layers.0:2/mlp/gradient.1", "layers.0:2/mlp/gradient.2", "layers.2:5"]),
    ],
)
def test_keys_say_which_groups_they_are(groups):
    assert Groups.of_keys(groups.keys) == groups
