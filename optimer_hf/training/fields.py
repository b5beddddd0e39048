"""Names of the fields of LoraConfig and TrainingArguments, read from the source of the packages.

Importing these takes seconds, and a typo should be named at once.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from optimer_hf.files.model import Mistake
from optimer_hf.files.text import did_you_mean
from optimer_hf.training.config import TrainConfig

SOURCES = {  # section of a train file -> name of its class; package, file and class of its fields
    "lora": (
        "LoraConfig",
        [
            ("peft", "config.py", "PeftConfigMixin"),
            ("peft", "config.py", "PeftConfig"),
            ("peft", "tuners/lora/config.py", "LoraConfig"),
        ],
    ),
    "trainer": (
        "TrainingArguments",
        [("transformers", "training_args.py", "TrainingArguments")],
    ),
}


def unknown_fields(config: TrainConfig) -> Iterator[Mistake]:
    """Yield the fields under `lora` and `trainer` that their classes do not have."""
    for section, given in (("lora", config.lora or {}), ("trainer", config.trainer)):
        known = field_names(section) if given else []
        for name in given:
            if known and name not in known:
                hint = did_you_mean(name, known)
                where = f"{section}.{name}"
                yield (section, name), f"{where}: unknown field of {SOURCES[section][0]}.{hint}"


@functools.cache
def field_names(section: str) -> list[str]:
    """Return the names that the class of a section, `lora` or `trainer`, takes; empty where its
    source does not look as expected.
    """
    names: list[str] = []
    for package, file, cls in SOURCES[section][1]:
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations if spec is not None else None) or []
        path = next((Path(each) / file for each in folders if (Path(each) / file).is_file()), None)
        own = [] if path is None else _fields_in(path, cls)
        if not own:
            return []
        names += own
    return names


def _fields_in(path: Path, cls: str) -> list[str]:
    """Return the names of the fields that a dataclass in a file declares and its constructor
    takes.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            return [
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and "init=False" not in ast.unparse(item.value or ast.Constant(None))
            ]
    return []
