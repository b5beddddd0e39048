"""groups.py: which tensors belong to which group."""

import pytest

from optimer_hf.vectors.groups import Groups

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(5)),
    *(f"model.layers.{n}.mlp.experts.{e}.w1.weight" for n in range(5) for e in (0, 7)),
    "model.norm.weight",
    "lm_head.weight",
]


def layers_of(names: list[str]) -> set[str]:
    return {name.split(".")[2] for name in names if ".layers." in name}


def test_a_tensor_belongs_to_the_first_group_that_is_a_part_of_its_name():
    split = Groups(("experts.7", "mlp", "else")).split(NAMES, 0)
    assert list(split) == ["experts.7", "mlp", "else"]
    assert len(split["experts.7"]) == len(split["mlp"]) == 5
    assert sorted(name for names in split.values() for name in names) == sorted(NAMES)
    assert Groups(("mlp",)).split(NAMES, 0)[""] == sorted(n for n in NAMES if "mlp" not in n)


@pytest.mark.parametrize(
    ("n_groups", "layers"),
    [(2, ["012", "34"]), (3, ["01", "23", "4"]), (5, ["0", "1", "2", "3", "4"])],
)
def test_layers_are_split_into_runs_and_the_first_has_what_is_in_no_layer(n_groups, layers):
    split = Groups(n_layer_groups=n_groups).split(NAMES, 5)
    assert [*map(layers_of, split.values())] == [set(run) for run in layers]
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(
        split["layers.1"]
    )


def test_a_layer_for_multi_token_prediction_belongs_to_the_last_group():
    assert Groups(n_layer_groups=2).group_of_layer(5, 5) == "layers.2"


def test_two_stacks_of_layers_cannot_be_split():
    names = ["vision.layers.0.w", "text.layers.0.w"]
    with pytest.raises(ValueError, match="count layers apart from each other"):
        Groups(n_layer_groups=2).split(names, 4)


@pytest.mark.parametrize("groups", [Groups(("mlp", "else")), Groups(n_layer_groups=3)])
def test_keys_say_which_groups_they_are(groups):
    assert Groups.of_keys(groups.keys) == groups
