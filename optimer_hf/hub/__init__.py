"""The Hub: push and pull vectors, recipes and merged models, and find the recipes of others.

`pushing.py` and `pulling.py` do the work. Besides this room, only `models/resolve.py` talks to the
Hub: it fetches models.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from optimer_hf.hub.card import TAGS
from optimer_hf.hub.client import explained
from optimer_hf.hub.pulling import Input, Pull, pull
from optimer_hf.hub.pushing import Push, push

__all__ = ["Input", "Pull", "Push", "pull", "push", "recipes", "to_json"]


def recipes(*, token: str | None = None, limit: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield repository and the time of the last change of the recipes that carry our tag."""
    with explained("recipes"):
        for info in HfApi(token=token).list_models(
            filter=TAGS["recipe"][1], sort="last_modified", limit=limit
        ):
            changed = info.last_modified
            yield info.id, changed.strftime("%Y-%m-%d") if changed is not None else ""


def to_json(result: Push | Pull) -> str:
    """Return a result as JSON."""
    return json.dumps(_plain(result), indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, (Push, Pull, Input)):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
