"""The models of our YAML files -> JSON Schemas, with which an editor completes and checks them.

`schemas/` holds them as files, each as `optimer schema KIND` prints it. A YAML file names its own
on its first line: `# yaml-language-server: $schema=PATH`.
"""

import json

from optimer_hf.files.model import VersionedFile
from optimer_hf.recipes.record import RecipeFile
from optimer_hf.scoring.objective import ObjectiveFile
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.config import TrainConfig

KINDS: dict[str, type[VersionedFile]] = {
    "study": StudyConfig,
    "train": TrainConfig,
    "objective": ObjectiveFile,
    "recipe": RecipeFile,
}


def schema(kind: str) -> str:
    """Return the JSON Schema (draft 2020-12) of one kind of file, a key of KINDS, as text."""
    found = KINDS[kind].model_json_schema()
    return json.dumps({"title": f"{kind}.yaml"} | found, indent=2, ensure_ascii=False)
