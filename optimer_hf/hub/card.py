"""Facts of a vector, recipe or merged model -> the model card that the Hub shows.

A card is YAML metadata and a text. Between two marks the text is ours and is written anew at every
push; what a person writes outside of them, and metadata that we do not set, stays.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from optimer_hf.comparison.ledger import Ledger
from optimer_hf.errors import ConfigError, HubError
from optimer_hf.files.reading import parse_yaml
from optimer_hf.files.text import markdown_table
from optimer_hf.recipes.record import Recipe

BEGIN = "<!-- optimer: written anew by every push; write above or below -->"
END = "<!-- optimer: end -->"
RELATIONS = {"adapter": "adapter", "delta": "finetune", "checkpoint": "finetune"}  # of vectors
TAGS = {
    "vector": ["optimer", "optimer-vector"],
    "recipe": ["optimer", "optimer-recipe", "mergekit", "merge"],
    "model": ["optimer", "mergekit", "merge"],
}
SHARED = ("tags", "language")  # lists that a person may add to
THEIRS = ("library_name", "pipeline_tag")  # what a person wrote there stays
HEADINGS = {
    "search": "On the search split",
    "rescore": "On the full search split",
    "sealed": "On the sealed test, scored once and after the search",
}
MEASURED = ("train", "search", "rescore", "sealed", "write")  # parts of a ledger
WIDEST_BAR = 20  # characters
PERMISSIVE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "0bsd", "unlicense", "cc0-1.0"}
)
BINDING = frozenset(  # a work that combines one with permissive parts takes its licence
    {
        "gemma",
        *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
        *("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0"),
        *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    }
)
UNSPOKEN = frozenset({"other", "unknown"})  # names of no licence


@dataclass(frozen=True)
class Origins:
    """What the inputs of a work say of themselves: licences by name, models, data, languages."""

    licences: Mapping[str, str | None]
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A figure in the repository: its file, what it shows, and what to conclude from it."""

    path: str
    title: str
    conclusion: str = ""

    @property
    def markdown(self) -> str:
        """The picture under its sentence, which is its text for those who cannot see it, too."""
        title, conclusion = _escaped(self.title), _escaped(self.conclusion)
        said = f"**{title}.** {conclusion}\n\n" if conclusion else ""
        return f"{said}![{conclusion or title}]({self.path})"


def _escaped(text: str) -> str:
    """Return a text in one line that Markdown shows as it is, whatever names are in it."""
    return re.sub(r"([\\`*_\[\]<>|!~$&])", r"\\\1", " ".join(text.split()))


def _as_code(text: str) -> str:
    """Return a text in one line between backticks that it cannot end."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{ticks}{space}{line}{space}{ticks}".replace("|", "\\|")


def _as_key(name: str) -> str:
    """Return a name as a key of YAML."""
    return name if re.fullmatch(r"[A-Za-z][\w.-]*", name) else json.dumps(name)


def _fenced(text: str, language: str = "") -> str:
    """Return a text as a code block that no line of it can end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def strictest_licence(licences: Mapping[str, str | None]) -> str | None:
    """Return the licence that binds a work made of inputs (name -> licence), or None when it cannot
    be told: one is missing or names none, or two bind in different ways. Never a guess.
    """
    found = {licence.lower() for licence in licences.values() if licence}
    if not found or None in licences.values() or found & UNSPOKEN:
        return None
    if len(found) == 1:
        return found.pop()
    binding = found - PERMISSIVE
    if binding:
        return binding.pop() if len(binding) == 1 and binding <= BINDING else None
    return "apache-2.0" if "apache-2.0" in found else None


def metadata_of(
    kind: str,
    relation: str,
    licence: str,
    origins: Origins,
    name: str = "",
    results: Sequence[EvalResult] = (),
) -> dict[str, Any]:
    """Return the metadata of a card; `relation` is that to the base models, `results` what the
    model of this name scored.
    """
    is_model = kind == "model"
    data = ModelCardData(
        license=licence,
        library_name="transformers" if is_model else "optimer",
        base_model=list(dict.fromkeys(origins.base_models)) or None,
        base_model_relation=relation if origins.base_models else None,
        datasets=list(dict.fromkeys(origins.datasets)) or None,
        language=list(dict.fromkeys(origins.languages)) or None,
        tags=TAGS[kind],
        pipeline_tag="text-generation" if is_model else None,
        model_name=name if results else None,
        eval_results=list(results) or None,
    )
    return dict(data.to_dict())


def datasets_of(corpus: str) -> list[str]:
    """Return the Hub data sets in the name of a corpus; names of local files have no slash."""
    parts = corpus.split(" + ")
    return [part for part in parts if re.fullmatch(r"[\w.-]+/[\w.-]+", part)]


def evaluations(
    scores: Mapping[str, float], metrics: Mapping[str, str], higher_is_better: Mapping[str, bool]
) -> list[EvalResult]:
    """Return scores of the sealed test (by term) as the Hub's model-index has them, with the metric
    and direction of each term as far as they are known.
    """
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=label,
            dataset_name=f"{label} (sealed test)",
            metric_type=metrics.get(label, "score"),
            metric_name=unit_of(label, metrics, higher_is_better) or None,
            metric_value=round(score, 6),
        )
        for label, score in scores.items()
    ]


def unit_of(label: str, metrics: Mapping[str, str], higher_is_better: Mapping[str, bool]) -> str:
    """Return metric and direction of a term in words, as far as they are known."""
    direction = {True: "higher is better", False: "lower is better", None: None}
    known = (metrics.get(label), direction[higher_is_better.get(label)])
    return ", ".join(text.replace("_", " ") for text in known if text is not None)


def recipe_facts(
    weights: Mapping[str, float], ledger: Ledger, results: str, units: Mapping[str, str]
) -> dict[str, Any]:
    """Return the weights as bars, what the parts of the work cost, the table of the sealed test out
    of results.md, and the units of the scores by term.
    """
    largest = max((abs(weight) for weight in weights.values()), default=0.0) or 1.0
    bars = {
        name: ("-" if weight < 0 else "") + "█" * round(WIDEST_BAR * abs(weight) / largest)
        for name, weight in weights.items()
    }
    spent = ledger.to_json()
    rows = [
        [part, *(str(spent[part].get(key, "")) for key in ("n", "items", "tokens", "seconds"))]
        for part in MEASURED
        if part in spent
    ]
    costs = markdown_table(["part", "trials", "items", "tokens", "seconds"], rows) if rows else ""
    return {
        "bars": bars,
        "units": units,
        "costs": costs,
        "results": _sealed_table(results),
        "headings": HEADINGS,
    }


def units_of(recipe: Recipe) -> dict[str, str]:
    """Return metric and direction of every term of a recipe that has scores."""
    return {
        label: unit_of(label, recipe.metrics, score.higher_is_better)
        for score in recipe.scores.values()
        for label in score.terms
    }


def _sealed_table(results: str) -> str:
    lines = [_harmless(line) for line in results.splitlines()]
    begin = next((n for n, line in enumerate(lines) if line.startswith("|")), len(lines))
    end = next((n for n in range(begin, len(lines)) if not lines[n].startswith("|")), len(lines))
    if begin == end:
        return ""
    return "\n".join(["Gain over the base on the sealed test:", "", *lines[begin:end]])


def _harmless(line: str) -> str:
    """Return a line of a Markdown table of ours without what names in it could add: HTML, links."""
    return line.replace("<", "&lt;").replace("](", "]\\(").replace("![", "\\![")


def render(metadata: Mapping[str, Any], facts: Mapping[str, Any], existing: str | None) -> str:
    """Return a card; what a person added to the `existing` one stays."""
    environment = Environment(
        loader=PackageLoader("optimer_hf", "."), undefined=StrictUndefined, autoescape=False
    )
    environment.filters |= {"text": _escaped, "code": _as_code, "key": _as_key, "fenced": _fenced}
    template = environment.get_template("model_card.md.jinja")
    inner = template.render(**facts).strip().replace("<!-- optimer:", "<! -- optimer:")
    text = f"{BEGIN}\n{inner}\n{END}"
    theirs, body = split(existing or "")
    begin, end = body.find(BEGIN), body.rfind(END)  # names in older cards may hold marks
    if begin >= 0 and end > begin:
        text = body[:begin] + text + body[end + len(END) :]
    elif body.strip():
        text = f"{text}\n\n{body.strip()}"
    merged = {**theirs, **metadata, **{key: theirs[key] for key in THEIRS if key in theirs}}
    for key in SHARED:
        mine, others = metadata.get(key, []), theirs.get(key, [])
        others = [others] if isinstance(others, str) else others
        if others:
            merged[key] = list(dict.fromkeys([*mine, *others]))
    head = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{text.strip()}\n"


def split(card: str) -> tuple[dict[str, Any], str]:
    """Return metadata and text of a card; raise HubError for metadata that is no YAML mapping."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    if match is None:
        return {}, card
    try:
        metadata = parse_yaml(match[1], "README.md on the Hub")
    except ConfigError as error:
        raise HubError(f"{error} Mend it there, then push again.") from None
    if metadata is not None and not isinstance(metadata, dict):
        raise HubError(
            f"README.md on the Hub: its metadata is a {type(metadata).__name__}, expected a "
            "mapping of fields to values. Mend it there, then push again."
        )
    return metadata or {}, card[match.end() :]
