"""What a report is made of: a study, and everything that follows from it, read once.

The sections of the page take this and nothing else; none of them takes another section.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from optimer_hf.comparison.costs import ledger_of_study
from optimer_hf.comparison.ledger import Ledger
from optimer_hf.comparison.result import Comparison
from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.scoring.formatting import Unit
from optimer_hf.study.directory import Study
from optimer_hf.study.surrogate import Surrogate, fit_surrogate
from optimer_hf.study.trials import SEALED_FILE, TRIALS_FILE, Trial
from optimer_hf.vectors.record import VectorFile, read_record


@dataclass(frozen=True)
class Evidence:
    """A study with its sound trials of the search, the surrogate fitted to all trials, its sealed
    test (None if the merge was not tested), and the records of the vectors that have one.

    `unit` is that of the objective of the search; the comparison has its own.
    """

    study: Study
    trials: list[Trial]
    unit: Unit
    posterior: Surrogate
    comparison: Comparison | None
    records: Mapping[str, VectorFile]
    ledger: Ledger

    @property
    def name(self) -> str:
        """The name of the study: that of its directory, or of the run that it belongs to."""
        return self.folder.name

    @property
    def folder(self) -> Path:
        """The directory of the study, or of the run that it belongs to."""
        directory = self.study.directory.resolve()
        return directory.parent if directory.name == "study" else directory

    @property
    def last_changed(self) -> date:
        """The day on which trials or sealed rows last changed on this disk, in UTC."""
        names = (TRIALS_FILE, SEALED_FILE)
        files = [self.study.directory / name for name in names]
        times = [file.stat().st_mtime for file in files if file.exists()]
        return datetime.fromtimestamp(max(times), tz=UTC).date()

    @property
    def baseline_on_axes(self) -> str:
        """What gains of the search are relative to, short enough for an axis."""
        return "base + fixed" if self.study.config.fixed else "the base"

    def gain(self, trial: Trial) -> float:
        """Return the gain of a trial over the first one, in the unit of the objective."""
        return self.study.value(trial) - self.study.value(self.trials[0])


def read_evidence(study: Study) -> Evidence:
    """Return the evidence of a study. Raises StudyError for a study without a trial."""
    return Evidence(
        study=study,
        trials=[trial for trial in study.trials if trial.status == "ok"],
        unit=Unit.of(study.config.objective),
        posterior=fit_surrogate(study.config, study.trials),
        comparison=read_comparison(study),
        records=_read_records(study),
        ledger=ledger_of_study(study),
    )


def _read_records(study: Study) -> dict[str, VectorFile]:
    """Return the records of the vectors that are on this disk and have one, by name."""
    paths = {name: Path(str(vector.source)) for name, vector in study.config.vectors.items()}
    records = {name: read_record(path) for name, path in paths.items() if path.is_dir()}
    return {name: record for name, record in records.items() if record is not None}
