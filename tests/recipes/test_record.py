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
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"vectors": vectors}))
    with pytest.raises(
        ConfigError, match=r"vectors\.math\.mlp: could be a group of 'math'; choose"
    ):
        Recipe.read(tmp_path / "recipe.yaml")
    vectors["other"] = vectors.pop("math.mlp")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"vectors": vectors}))
    weights = {"math.mlp": 0.5, "math.else": 0.1, "other": 0.9}
    assert Recipe.read(tmp_path / "recipe.yaml").weights == weights
