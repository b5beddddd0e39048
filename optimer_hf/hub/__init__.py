"""The Hub: push and pull vectors, recipes and merged models, and find the recipes of others.

Outside this room, only `models/resolve.py` talks to the Hub: it downloads models.
"""

import json
from pathlib import Path
from typing import Any

from optimer_hf.hub.listing import list_hub_recipes, list_recipes
from optimer_hf.hub.pulling import Input, Pull, pull
from optimer_hf.hub.pushing import Push, push

__all__ = ["Input", "Pull", "Push", "list_hub_recipes", "list_recipes", "pull", "push", "to_json"]


def to_json(result: Push | Pull) -> str:
    """Return a result as JSON."""
    return json.dumps(_plain(result), indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Return a value made of what JSON knows."""
    if isinstance(value, (Push, Pull, Input)):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
