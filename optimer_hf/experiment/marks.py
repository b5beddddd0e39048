"""The marks of `optimer run` in its output directory: run.json says what the results there belong
to, done.json that they are complete.
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from optimer_hf.files.model import VersionedFile, parse
from optimer_hf.files.reading import read_yaml

CLAIM_FILE, DONE_FILE = "run.json", "done.json"


class Claim(VersionedFile):
    """run.json: the recipe folder and the budget that the results in a directory belong to.

    `profile`, `tokens` and `seed` are those of a `Run`, and `short` stands for the profile of that
    name; `seeds` marks a directory that holds whole runs under several seeds.
    """

    recipe: str
    seeds: bool = Field(default=False, exclude_if=lambda seeds: not seeds)
    short: bool = False
    profile: str | None = Field(default=None, exclude_if=lambda profile: profile is None)
    tokens: int | None = Field(default=None, exclude_if=lambda tokens: not tokens)
    seed: int = Field(default=0, exclude_if=lambda seed: not seed)

    def __str__(self) -> str:
        options = ["--short"] * self.short + ["--seeds"] * self.seeds
        options += [f"--profile {self.profile}"] if self.profile else []
        options += [f"--tokens {self.tokens}"] if self.tokens else []
        options += [f"seed {self.seed}"] if self.seed else []
        return f"{self.recipe!r} ({', '.join(options) or 'its own budget'})"

    @property
    def budget(self) -> dict[str, Any]:
        """What the command line changes in the budget of the recipe folder, as JSON values."""
        fields = {"short", "profile", "tokens", "seed"}
        return self.model_dump(mode="json", include=fields)


def read_claim(directory: Path) -> Claim | None:
    """Return the claim on a directory; None if it has none, or if its run.json is not ours.

    Raises ConfigError for a file that is damaged.
    """
    file = directory / CLAIM_FILE
    if not file.exists():
        return None
    data = read_yaml(file)
    return parse(Claim, data, file) if "recipe" in data else None


class Done(VersionedFile):
    """done.json, written last: the digest of the inputs of a run that is complete."""

    inputs_sha256: str
