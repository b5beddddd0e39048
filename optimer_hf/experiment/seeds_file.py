"""results.json of `optimer run --seeds`: a number for every seed, and what they are together."""

import math
import statistics
from typing import Any, Self

from pydantic import Field, computed_field, model_validator

from optimer_hf.comparison.rows import RowKind, title_of
from optimer_hf.files.model import FileModel, VersionedFile


class Spread(FileModel):
    """A number for each seed. The mean and the interval are written, and computed when read."""

    values: list[float]

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, data: Any) -> Any:
        return _without(data, "mean", "interval")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean over the seeds, by Student's t distribution; None for one
        seed or equal numbers.
        """
        from scipy.stats import t

        n = len(self.values)
        if len(set(self.values)) == 1:
            return None
        half = float(t.ppf(0.975, n - 1)) * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half

    def minus(self, other: Self) -> Self:
        """Return the difference under each seed."""
        pairs = zip(self.values, other.values, strict=True)
        return type(self)(values=[mine - others for mine, others in pairs])


class SeededRow(FileModel):
    """A row of the sealed test in all runs: its gain over the base, that on each term, by label,
    and the merge minus the row.

    `chosen_after_seal` says that it was in at least one run.
    """

    kind: RowKind
    subject: str
    chosen_after_seal: bool
    gain: Spread
    merge_minus: Spread
    terms: dict[str, Spread] = Field(default={}, exclude_if=lambda terms: not terms)

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, data: Any) -> Any:
        return _without(data, "name")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def name(self) -> str:
        """Title of the row in tables, without the scale, which depends on the seed."""
        return title_of(self.kind, self.subject)


class SeedResults(VersionedFile):
    """results.json of runs under several seeds: the weights of the merge in each run, and the rows
    that all runs have. `rank_correlation` is between what the searches predict for the ratios of
    mixtures and what the mixtures scored, if the runs have trained some.
    """

    merges: list[dict[str, float]]
    rows: list[SeededRow]
    rank_correlation: Spread | None = Field(default=None, exclude_if=lambda value: value is None)


def _without(data: Any, *names: str) -> Any:
    """Return a mapping without the fields that are computed; anything else as it is."""
    return {k: v for k, v in data.items() if k not in names} if isinstance(data, dict) else data
