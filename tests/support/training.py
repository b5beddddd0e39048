"""The settings of short runs, and what they recorded."""

import json
from pathlib import Path

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
FAST = {"learning_rate": 1e-2, "bf16": False, "save_strategy": "no"}


def record_of(out: Path) -> dict:
    return json.loads((out / "training.json").read_text(encoding="utf-8"))


def losses_of(out: Path) -> list[float]:
    return record_of(out)["training"]["losses"]
