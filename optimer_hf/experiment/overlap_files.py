"""Find the corpora and the objectives among some files, and what they have in common."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError
from optimer_hf.files.reading import read_yaml
from optimer_hf.scoring.objective import Objective, ObjectiveFile
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.config import TrainConfig

if TYPE_CHECKING:
    from optimer_hf.scoring.overlap import TermOverlap


def sort_files(
    files: Sequence[Path], text_field: str
) -> tuple[list[CorpusConfig], dict[str, Objective]]:
    """Sort files into corpora (JSONL and text files, and those that train files name) and
    objectives by name (of objective files, and of studies with their sealed tests).

    Raises ConfigError for a file that is neither, and if there are no corpora or no objectives.
    """
    corpora: list[CorpusConfig] = []
    objectives: dict[str, Objective] = {}
    for path in files:
        keys = set(read_yaml(path)) if path.suffix in (".yaml", ".yml") else None
        if keys is None:
            corpora.append(CorpusConfig(path=path, text_field=text_field))
        elif "objective" in keys and "scores" not in keys:  # a recipe has both
            study = StudyConfig.read(path)
            objectives[f"{path} objective"] = study.objective
            if study.test is not None:
                objectives[f"{path} test"] = study.test
        elif "terms" in keys:
            objectives[str(path)] = ObjectiveFile.read(path)
        elif keys & {"corpus", "mixture"}:
            corpora.extend(TrainConfig.read(path).corpora)
        else:
            raise ConfigError(
                f"{path}: found the fields {', '.join(sorted(map(str, keys)))}, expected those of "
                "an objective, a study or a train config. Give one of these, or a corpus file."
            )
    _refuse_one_sided(corpora, objectives)
    return corpora, objectives


def _refuse_one_sided(corpora: Collection[Any], objectives: Collection[Any]) -> None:
    if not corpora or not objectives:
        missing = "objective" if corpora else "corpus"
        kinds = (
            "an objective.yaml or a study.yaml"
            if corpora
            else "a JSONL or text file, or a train.yaml"
        )
        raise ConfigError(f"check-overlap: found no {missing} among the files. Add {kinds}.")


def overlap_of_files(
    files: Sequence[Path], *, n: int = 13, text_field: str = "text"
) -> "list[TermOverlap]":
    """Return, for each term of the objectives among some files, the items that have `n` units in a
    row in common with the corpora among them, as `check_overlap` does.
    """
    corpora, objectives = sort_files(files, text_field)
    from optimer_hf.scoring.overlap import check_overlap  # takes seconds to import

    return check_overlap(corpora, objectives, n=n)
