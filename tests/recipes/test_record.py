"""record.py: which recipes are refused when they are read."""

from pathlib import Path

import pytest
import yaml

from optimer_hf.errors import ConfigError
from optimer_hf.recipes.record import Recipe

GROUPS = {"source": "./math", "weights": {"mlp": 0.5, "else": 0.1}}


def test_a_vector_that_has_the_name_of_a_group_is_refused(tmp_path: Path):
    """Its weight would be that of the group."""
    vectors = {"math": GROUPS, "math.mlp": {"source": "./other", "weight": 0.9}}
    recipe = {"format_version": 1, "name": "r", "base_model": "./base", "dtype": "float32"}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"vectors": vectors}, sort_keys=False)
    )
    with pytest.raises(
        ConfigError, match=r"vectors\.math\.mlp: could be a group of 'math'; choose"
    ):
        Recipe.read(tmp_path / "recipe.yaml")
    vectors["other"] = vectors.pop("math.mlp")
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"vectors": vectors}, sort_keys=False)
    )
    weights = {"math.mlp": 0.5, "math.else": 0.1, "other": 0.9}
    assert Recipe.read(tmp_path / "recipe.yaml").weights == weights


def test_a_recipe_is_printed_in_a_few_lines(tmp_path: Path):
    golden = Path(__file__).parents[1] / "golden" / "0.1.0" / "runs" / "tiny" / "recipe.yaml"
    recipe = Recipe.read(golden)
    assert repr(recipe) == "Recipe('tiny', base + aaa 0.9344, xyz 0.9756)"
    title, *lines = str(recipe).splitlines()
    assert title == "recipe 'tiny'" and len(lines) < 12 and max(map(len, lines)) < 250
    assert lines[:3] == ["  base: base", "  weights: aaa 0.9344, xyz 0.9756", "  dtype: bfloat16"]
    assert recipe.scores["sealed"].summary in str(recipe) and f"  file: {golden}" in lines
    assert recipe.scores["sealed"].verdicts[0] in str(recipe)
    by_hand = Recipe(name="r", base_model=f"a/b@{'0' * 40}", dtype="float32", vectors={})
    assert str(by_hand) == "recipe 'r'\n  base: a/b@00000000\n  dtype: float32"
