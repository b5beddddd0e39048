"""Find recipes: the recipe folders in a directory, and the recipes on the Hub."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from optimer_hf.hub.card import TAGS
from optimer_hf.hub.client import explaining_errors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderOrRepo:
    """A recipe folder to run, or a repository to pull with the day of its last change."""

    name: str
    changed: str | None = None

    @property
    def command(self) -> str:
        """The command that uses it."""
        return f"optimer {'run' if self.changed is None else 'pull'} {self.name}"


def list_recipes(
    folder: Path = Path("recipes"), *, token: str | None = None
) -> Iterator[FolderOrRepo]:
    """Yield the recipe folders in `folder`, then the recipes on the Hub."""
    for study in sorted(folder.glob("*/study.yaml")):
        yield FolderOrRepo(str(study.parent))
    for repo_id, changed in list_hub_recipes(token=token):
        yield FolderOrRepo(repo_id, changed)


def list_hub_recipes(
    *, token: str | None = None, limit: int | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the repositories on the Hub with our tag for recipes, each with the day of its last
    change (YYYY-MM-DD), the latest first.
    """
    logger.info("recipes list: asking the Hub")
    with explaining_errors("recipes"):
        for info in HfApi(token=token).list_models(
            filter=TAGS["recipe"][1], sort="last_modified", limit=limit
        ):
            changed = info.last_modified
            yield info.id, changed.strftime("%Y-%m-%d") if changed is not None else ""
