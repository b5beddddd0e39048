"""The kinds of YAML files that people write, and the JSON Schema of each.

`schemas/` holds the schemas as files, as `optimer schema KIND` prints them. A YAML file names its
schema on its first line: `# yaml-language-server: $schema=PATH`.
"""

import json
from collections.abc import Collection

from optimer_hf.files.model import VersionedFile
from optimer_hf.recipes.record import Recipe
from optimer_hf.scoring.objective import ObjectiveFile
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.config import TrainConfig

KINDS: dict[str, type[VersionedFile]] = {
    "study": StudyConfig,
    "train": TrainConfig,
    "objective": ObjectiveFile,
    "recipe": Recipe,
}


def schema_of(kind: str) -> str:
    """Return the JSON Schema (draft 2020-12) of a kind of file, a key of KINDS, as text."""
    schema = KINDS[kind].model_json_schema()
    return json.dumps({"title": f"{kind}.yaml"} | schema, indent=2, ensure_ascii=False)


def kind_of_file(keys: Collection[str]) -> str:
    """Return the kind of a file with these keys, a key of KINDS."""
    if "study" in keys and "scores" in keys:
        return "recipe"
    if "objective" in keys or "vectors" in keys:
        return "study"
    return "objective" if "terms" in keys else "train"
