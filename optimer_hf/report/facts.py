"""What went into a study: the objective; base and vectors with licences, links and digests."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from optimer_hf.errors import ConfigError
from optimer_hf.files.reading import parse_yaml
from optimer_hf.files.reference import COMMIT, Reference, name_of_reference
from optimer_hf.files.text import count, show_shares
from optimer_hf.report.cells import Cell, Row, Table, head
from optimer_hf.report.evidence import Evidence
from optimer_hf.scoring.objective import Objective
from optimer_hf.vectors.groups import weights_of_groups
from optimer_hf.vectors.record import VectorFile

HUB, PYPI = "https://huggingface.co", "https://pypi.org/project"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
FRONT = re.compile(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", re.DOTALL)  # of a model card
ELSEWHERE, UNKNOWN = "on its page", "not stated"
RULES = {  # how terms combine
    "relative_to_base": "the weighted mean of the gains over the base",
    "weighted_mean": "the weighted mean of the scores",
    "worst": "the smallest gain of any term",
}


@dataclass(frozen=True)
class Fact:
    """A name, a text and perhaps a link."""

    name: str
    text: str
    link: str | None = None


def identity_of(evidence: Evidence) -> list[Fact]:
    """Return what the study is, for the line below its name."""
    study = evidence.study
    base = study.config.base_model
    facts = [Fact("base", name_of_reference(base), link_of(base))]
    facts.append(Fact("vectors", count(len(study.config.vectors), "vector")))
    facts.append(Fact("trials", count(len(study.trials), "trial")))
    if evidence.comparison is not None:
        sizes = {len(score.items) for score in evidence.comparison.base.scores.values()}
        low, high = min(sizes), max(sizes)
        text = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        facts.append(Fact("items", f"{text} sealed items a term"))
    day = evidence.last_changed
    return [*facts, Fact("date", f"{day.day} {day:%B %Y}")]


# -- references ------------------------------------------------------------------------------------


def link_of(reference: str) -> str | None:
    """Return the page of a Hub repository or a package; None for what is only on this disk."""
    ref = Reference(reference)
    if ref.path is not None:
        return None
    if ref.package is not None:
        return f"{PYPI}/{ref.package}/" if re.fullmatch(r"[\w.-]+", ref.package) else None
    name, revision = ref.repo
    if REPOSITORY.fullmatch(name) is None:
        return None
    is_commit = COMMIT.fullmatch(revision or "") is not None
    return f"{HUB}/{name}/tree/{revision}" if is_commit else f"{HUB}/{name}"


def licence_of(reference: str) -> str:
    """Return the licence that the model card of a local directory states, or where to look."""
    path = Reference(reference).path
    if path is None:
        return ELSEWHERE
    if not (path / "README.md").is_file():
        return UNKNOWN
    match = FRONT.match((path / "README.md").read_text(encoding="utf-8", errors="replace"))
    if match is None:
        return UNKNOWN
    return _licence_in(match[1], path)


def _licence_in(text: str, path: Path) -> str:
    try:
        data = parse_yaml(text, path / "README.md")
    except ConfigError:  # somebody else's card; the report does not depend on it
        return UNKNOWN
    licence = data.get("license") if isinstance(data, dict) else None
    return licence if isinstance(licence, str) else UNKNOWN


# -- tables ----------------------------------------------------------------------------------------


def inputs_table(evidence: Evidence) -> Table:
    """Return base and vectors: what they are, what they were trained on, and their licences."""
    study, weights = evidence.study, evidence.study.best_trial.weights
    sources = study.config.sources
    licences = {name: licence_of(source) for name, source in sources.items()}
    base = study.config.base_model
    has_corpus = any(_corpus_of(evidence.records.get(name)) for name in sources)
    rows = [
        Row(
            [
                Cell("base"),
                Cell(""),
                _source_cell(base),
                *_corpus_cells(has_corpus, ""),
                Cell(licence_of(base)),
            ]
        )
    ]
    for name, source in sources.items():
        own = weights_of_groups(name, study.config.groups.get(name), weights)
        text = _corpus_of(evidence.records.get(name))
        if shares := study.config.mixtures.get(name):
            text = f"mixture ({show_shares(shares)}) of {text}"
        corpus = _corpus_cells(has_corpus, text)
        row = [Cell(name), _weight_cell(own), _source_cell(source), *corpus, Cell(licences[name])]
        rows.append(Row(row, "" if any(own.values()) else "idle"))
    heads = [head("", is_number=False), head("weight"), head("source", is_number=False)]
    heads += [head("trained on", is_number=False)] if has_corpus else []
    return Table("Base and vectors.", [*heads, head("licence", is_number=False)], rows)


def _weight_cell(weights: Mapping[str, float]) -> Cell:
    """Return the weight of a vector, or those of its groups."""
    if len(weights) > 1:
        return Cell(", ".join(f"{key} {weight:g}" for key, weight in weights.items()))
    (weight,) = weights.values()
    return Cell(f"{weight:g}", weight)


def _corpus_cells(has_corpus: bool, text: str) -> list[Cell]:
    return [Cell(text)] if has_corpus else []


def _source_cell(reference: str) -> Cell:
    return Cell(name_of_reference(reference), link=link_of(reference))


def _corpus_of(record: VectorFile | None) -> str:
    """Return the corpus of a vector and its size; nothing if it is not recorded."""
    corpus = record.corpus if record is not None else None
    if corpus is None or corpus.name is None:
        return ""
    return corpus.name if corpus.n_tokens is None else f"{corpus.name}, {corpus.n_tokens:,} tokens"


def objective_in_words(objective: Objective) -> str:
    """Return what an objective maximizes, as one sentence."""
    counted = [f"{term.label} {term.weight:g}" for term in objective.terms if term.weight > 0]
    text = f"{RULES[objective.combine]}: {', '.join(counted)}."
    recorded = [term.label for term in objective.terms if term.weight == 0]
    if recorded:
        text += f" Recorded only: {', '.join(recorded)}."
    bounds = [
        f"{c.label} (at most {100 * c.max_relative_to_base:g} % worse than the base)"
        for c in objective.constraints
    ]
    return f"{text} Constraints: {', '.join(bounds)}." if bounds else text


def digests_table(evidence: Evidence) -> Table:
    """Return the digests and versions that say exactly what was scored."""
    rows = [Row([Cell(name), Cell(value)]) for name, value in _digests(evidence)]
    heads = [head("what", is_number=False), head("sha256 or version", is_number=False)]
    return Table("Digests of what was scored, and versions.", heads, rows)


def _digests(evidence: Evidence) -> Iterator[tuple[str, str]]:
    study = evidence.study
    yield "study", study.config.digest()
    records = evidence.records
    if records:
        base = next(iter(records.values())).base
        yield from ((f"base, {name}", value) for name, value in base.files.items())
    for name, record in records.items():
        if record.corpus is not None and record.corpus.sha256 is not None:
            yield f"corpus of {name}", record.corpus.sha256
    yield from study.read_inputs().items()
    versions: dict[str, str] = {}
    for record in records.values():
        versions |= record.versions
    yield from versions.items()
