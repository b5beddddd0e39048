"""Write the model card of a vector, a recipe or a merged model, which the Hub shows.

A card is YAML metadata and text. Every push writes the text between two marks again. Text outside
the marks, and metadata that we do not set, is kept.
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
from optimer_hf.comparison.results_file import Results, table_of
from optimer_hf.errors import ConfigError, HubError
from optimer_hf.files.reading import parse_yaml
from optimer_hf.files.text import markdown_table
from optimer_hf.recipes.record import Recipe
from optimer_hf.report.captions import Caption
from optimer_hf.vectors.record import VectorFile
from optimer_hf.vectors.training_record import CorpusRecord, PartialCorpus

BEGIN = "<!-- optimer: written anew by every push; write above or below -->"
END = "<!-- optimer: end -->"
RELATIONS = {  # kind of vector -> relation to its base, as the Hub calls it
    **{"adapter": "adapter", "delta": "finetune", "checkpoint": "finetune"}
}
TAGS = {
    "vector": ["optimer", "optimer-vector"],
    "recipe": ["optimer", "optimer-recipe", "mergekit", "merge"],
    "model": ["optimer", "mergekit", "merge"],
    "base": ["optimer"],
}
SHARED = ("tags", "language")  # lists that people may add to
THEIRS = ("library_name", "pipeline_tag")  # what people write there is kept
COLUMNS: Mapping[str, str] = {  # of the table of scores, by fidelity
    "sealed": "sealed test",
    "rescore": "search, all items",
    "search": "search",
}
NOTES: Mapping[str, str] = {  # about the objective, by fidelity
    "sealed": "Sealed test, scored once and after the search",
    "rescore": "Search, on all its items; this score chose the weights, so it flatters them",
    "search": "Search; this score chose the weights, so it flatters them",
}
MEASURED: Mapping[str, str] = {  # parts of a ledger
    "train": "training of the vectors",
    "search": "search",
    "rescore": "scoring the best again",
    "sealed": "sealed test",
    "write": "writing the model",
}
WIDEST_BAR = 20  # characters
PERMISSIVE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "0bsd", "unlicense", "cc0-1.0"}
)
BINDING = frozenset(  # combined with permissive parts, one of these is the licence of the whole
    {
        "gemma",
        *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
        *("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0"),
        *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    }
)
UNSPOKEN = frozenset({"other", "unknown"})  # these name no licence


@dataclass(frozen=True)
class Origins:
    """What the cards of the inputs say: licences by input, models, data sets, languages."""

    licences: Mapping[str, str | None]
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A figure in the repository: its file, the one for dark pages if there is one, its texts."""

    path: str
    dark_path: str | None
    caption: Caption

    @property
    def markdown(self) -> str:
        """The picture, which has its title, below its conclusion, and with a text for people who
        cannot see it. The Hub shows the file for light or for dark pages by the ends of their
        addresses.
        """
        conclusion = _escape_markdown(self.caption.conclusion)
        shows = _escape_markdown(self.caption.shows or self.caption.title)
        text = f"{conclusion}\n\n" if conclusion else ""
        if self.dark_path is None:
            return f"{text}![{shows}]({self.path})"
        return (
            f"{text}![{shows}]({self.path}#hf-light-mode-only)\n"
            f"![{shows}]({self.dark_path}#hf-dark-mode-only)"
        )


@dataclass(frozen=True)
class MergeConfig:
    """A config for mergekit: what needs it, the command that runs it, and the YAML."""

    title: str
    command: str
    text: str


@dataclass(frozen=True)
class RecipeFacts:
    """What a card says about a recipe, besides its fields: recipe.yaml as `text`, the configs for
    mergekit, the bars of the weights by vector, the value of the objective by fidelity in words,
    and the tables of scores, of costs and of the sealed test, empty if there are none.
    """

    recipe: Recipe
    text: str
    merge_configs: Sequence[MergeConfig]
    bars: Mapping[str, str]
    scores: str
    values: Sequence[tuple[str, str]]
    costs: str
    results: str


@dataclass(frozen=True)
class BaseFacts:
    """What a card says about the base of a recipe: the repository of the recipe."""

    recipe: str


@dataclass(frozen=True)
class Facts:
    """What the text of a card is written from: a vector, a base, or a recipe, built as a model or
    not.
    """

    title: str
    repo_id: str
    subject: VectorFile | RecipeFacts | BaseFacts
    is_model: bool = False
    figures: Sequence[Picture] = ()
    verdict: str = ""
    has_report: bool = False

    @property
    def vector(self) -> VectorFile | None:
        """The vector, if the card is that of one."""
        return self.subject if isinstance(self.subject, VectorFile) else None

    @property
    def base(self) -> BaseFacts | None:
        """The base of a recipe, if the card is that of one."""
        return self.subject if isinstance(self.subject, BaseFacts) else None

    @property
    def merge(self) -> RecipeFacts | None:
        """The recipe, if the card is that of one or of a model built from it."""
        return self.subject if isinstance(self.subject, RecipeFacts) else None


def _escape_markdown(text: str) -> str:
    """Return a text as one line that Markdown shows as it is, whatever names it contains."""
    return re.sub(r"([\\`*_\[\]<>|!~$&])", r"\\\1", " ".join(text.split()))


def _code_span(text: str) -> str:
    """Return a text as one line between more backticks than it contains itself."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{ticks}{space}{line}{space}{ticks}".replace("|", "\\|")


def _yaml_key(name: str) -> str:
    """Return a name as a YAML key."""
    return name if re.fullmatch(r"[A-Za-z][\w.-]*", name) else json.dumps(name)


def _code_block(text: str, language: str = "") -> str:
    """Return a text as a code block that none of its lines can end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def strictest_licence(licences: Mapping[str, str | None]) -> str | None:
    """Return the licence of a work made from inputs (name -> licence).

    It is never guessed: None if an input has no licence, if two licences bind in different ways,
    or if one is unknown.
    """
    names = {licence.lower() for licence in licences.values() if licence}
    if not names or None in licences.values() or names & UNSPOKEN:
        return None
    if len(names) == 1:
        return names.pop()
    binding = names - PERMISSIVE
    if binding:
        return binding.pop() if len(binding) == 1 and binding <= BINDING else None
    return "apache-2.0" if "apache-2.0" in names else None


def metadata_of(
    kind: str,
    relation: str,
    licence: str | None,
    origins: Origins,
    name: str = "",
    results: Sequence[EvalResult] = (),
) -> dict[str, Any]:
    """Return the metadata of a card. `relation` is the relation to the base models, `results` are
    the scores of the model called `name`.
    """
    is_model = kind in ("model", "base")
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


def datasets_of(corpus: CorpusRecord | PartialCorpus | None) -> list[str]:
    """Return the data sets on the Hub that a corpus was read from. The names of local files contain
    no slash.
    """
    names = corpus.names if corpus is not None else []
    return [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]


def evaluations(
    scores: Mapping[str, float], metrics: Mapping[str, str], higher_is_better: Mapping[str, bool]
) -> list[EvalResult]:
    """Return scores on the sealed test, by term, in the form of the Hub's model-index, with the
    metric and direction of each term where they are known.
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
    """Return metric and direction of a term in words, where they are known."""
    direction = {True: "higher is better", False: "lower is better", None: None}
    known = (metrics.get(label), direction[higher_is_better.get(label)])
    return ", ".join(text.replace("_", " ") for text in known if text is not None)


def recipe_facts(
    recipe: Recipe, text: str, merge_configs: Sequence[MergeConfig], results: Results | None
) -> RecipeFacts:
    """Return what a card says about a recipe; `text` is its recipe.yaml, and `results` are those of
    the sealed test, if there was one.
    """
    return RecipeFacts(
        recipe=recipe,
        text=text,
        merge_configs=merge_configs,
        bars=_bars_of(recipe.weights),
        scores=_score_table(recipe),
        values=_values_of(recipe),
        costs=_cost_table(recipe.ledger),
        results="" if results is None else _results_table(results),
    )


def _bars_of(weights: Mapping[str, float]) -> dict[str, str]:
    largest = max((abs(weight) for weight in weights.values()), default=0.0) or 1.0
    return {
        name: ("-" if weight < 0 else "") + "█" * round(WIDEST_BAR * abs(weight) / largest)
        for name, weight in weights.items()
    }


def _cost_table(ledger: Ledger) -> str:
    """Return what each stage took as a table; empty if nothing was measured."""
    spent = ledger.to_json()
    rows = [
        [name, *(_count(spent[part].get(key)) for key in ("n", "items", "tokens", "seconds"))]
        for part, name in MEASURED.items()
        if part in spent
    ]
    return markdown_table(["part", "trials", "items", "tokens", "seconds"], rows) if rows else ""


def _count(value: float | None) -> str:
    """Return a number of a ledger as text; nothing for what was not counted."""
    return f"{value:,}" if value else ""


def _score_table(recipe: Recipe) -> str:
    """Return the score of every term with its metric and direction, and a column for each fidelity;
    empty if nothing was scored.
    """
    shown = {name: recipe.scores[name] for name in COLUMNS if name in recipe.scores}
    directions = {k: v for score in shown.values() for k, v in score.higher_is_better.items()}
    labels = dict.fromkeys(label for score in shown.values() for label in score.terms)
    lines = [
        [
            _escape_markdown(label),
            _escape_markdown(unit_of(label, recipe.metrics, directions)),
            *(
                f"{score.terms[label]:.4f}" if label in score.terms else ""
                for score in shown.values()
            ),
        ]
        for label in labels
    ]
    header = ["term", "measured in", *(COLUMNS[name] for name in shown)]
    return markdown_table(header, lines).strip() if lines else ""


def _values_of(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the value of the objective by fidelity, the sealed one first, as note and words."""
    return [
        (note, recipe.scores[name].summary or f"{recipe.scores[name].value:.4g}")
        for name, note in NOTES.items()
        if name in recipe.scores
    ]


def _results_table(results: Results) -> str:
    """Return the table of the sealed test and which baselines are not in it; the names in it are
    shown as they are. Why those are not is in the report: a reason may name files of this machine.
    """
    header, rows = table_of(results)
    names = [_escape_markdown(name) for name in header]
    lines = [
        [_escape_markdown(name), *(number.replace(" ", "\N{NO-BREAK SPACE}") for number in numbers)]
        for name, *numbers in rows
    ]
    text = f"Gain over the base on the sealed test:\n\n{markdown_table(names, lines)}".strip()
    if not results.left_out:
        return text
    left_out = ", ".join(_escape_markdown(each.name) for each in results.left_out)
    return f"{text}\n\nNot in the table, since they could not be scored: {left_out}."


def render(metadata: Mapping[str, Any], facts: Facts, existing: str | None) -> str:
    """Return a card that keeps what people added to the `existing` one."""
    environment = Environment(
        loader=PackageLoader("optimer_hf", "hub"), undefined=StrictUndefined, autoescape=False
    )
    environment.filters |= {
        "text": _escape_markdown,
        "code": _code_span,
        "key": _yaml_key,
        "fenced": _code_block,
    }
    template = environment.get_template("model_card.md.jinja")
    inner = template.render(card=facts).strip().replace("<!-- optimer:", "<! -- optimer:")
    text = f"{BEGIN}\n{inner}\n{END}"
    theirs, body = split_card(existing or "")
    begin, end = body.find(BEGIN), body.rfind(END)  # names in older cards may contain marks
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


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Return metadata and text of a card. Raises HubError if the metadata is not a YAML mapping."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    if match is None:
        return {}, card
    try:
        metadata = parse_yaml(match[1], "README.md on the Hub")
    except ConfigError as error:
        raise HubError(f"{error} Correct it there, then push again.") from None
    if metadata is not None and not isinstance(metadata, dict):
        raise HubError(
            f"README.md on the Hub: its metadata is a {type(metadata).__name__}, expected a "
            "mapping of fields to values. Correct it there, then push again."
        )
    return metadata or {}, card[match.end() :]
