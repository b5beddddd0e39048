"""Write a first study or recipe folder: what is known filled in, and other fields as comments with
their meaning, made from the file models.
"""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError, OutputError
from optimer_hf.files.reading import yaml_text
from optimer_hf.files.reference import absolute_reference, expand_home, relative_reference
from optimer_hf.files.staging import make_directory, write_text
from optimer_hf.files.text import slug
from optimer_hf.merging.mergekit_pool import name_sources
from optimer_hf.models.layout import ADAPTER_CONFIG, VECTOR_FILE
from optimer_hf.scoring.objective import Objective, Term
from optimer_hf.study.config import Baselines, SearchConfig, StudyConfig, VectorConfig
from optimer_hf.training.config import TrainConfig

WIDTH = 100
TEXTS = re.compile(r".*\.(jsonl?|csv|tsv|txt|md|parquet|arrow)(\.(gz|xz|bz2|zst))?", re.IGNORECASE)
HELD_OUT = "held-out.jsonl"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
HEADER = (
    "# Written by `optimer init`. Lines like `# NAME: ...` are fields that you may set, with\n"
    "# their default or an example."
)
MORE = (
    " `optimer init --full` writes all fields; reference/files.md in the\n"
    "# documentation explains them, and `optimer validate` checks them."
)
OFTEN_SET: dict[type[BaseModel], tuple[str, ...]] = {  # shown in short files, too
    StudyConfig: ("dtype",),
    Objective: ("constraints", "limit"),
    SearchConfig: ("gradients",),
    Baselines: ("merge_methods",),
    TrainConfig: ("block_size", "trainer"),
    CorpusConfig: ("text_field",),
}


@dataclass(frozen=True)
class Block:
    """The fields of a part of a file: those in `values` are set, the others become comments."""

    cls: type[BaseModel]
    values: Mapping[str, Any] = field(default_factory=dict)

    def shown_fields(self, *, full: bool) -> Iterator[tuple[str, FieldInfo]]:
        """Yield the fields to write: all of them, or those that are set, in `values` or often."""
        wanted = {*self.values, *OFTEN_SET.get(self.cls, ())}
        for name, info in self.cls.model_fields.items():
            if name in wanted or (full and name != "format_version"):
                yield name, info


def init(
    out: Path,
    sources: Sequence[str],
    *,
    base: str,
    tasks: Sequence[str] = (),
    texts: Sequence[str] = (),
    full: bool = False,
) -> list[Path]:
    """Write a study (`out` is a .yaml) or a recipe folder, and return the files.

    Each of `sources` is a vector or, for a recipe folder, a file or folder of texts to train on:
    NAME=SOURCE, or a source that is named by its last part. `tasks` are TASK or TASK=METRIC. Items
    are split by their hashes: one half for the search, the other for the sealed test. Paths are
    seen from the working directory; the files name them as seen from their own folder. The files
    are short, with the fields that most people set, unless `full` asks for all.

    Raises ConfigError for sources that cannot be named, OutputError if `out` has something in it.
    """
    is_file = out.suffix in (".yaml", ".yml")
    folder = out.parent if is_file else out
    named, corpora = _name_sources(sources, folder)
    _check_place(out, list(corpora.values()), is_file=is_file)
    files = _name_train_files(list(corpora))
    vectors: dict[str, Any] = {
        name: {"train": files[name]} if name in corpora else source
        for name, source in named.items()
    }
    base, texts = _seen_from(folder, base), [_seen_from(folder, x, is_path=True) for x in texts]
    blocks = {out if is_file else out / "study.yaml": _study_block(base, vectors, tasks, texts)}
    for name, text in corpora.items():
        blocks[out / files[name]] = _train_block(base, name, text)
    make_directory(folder)
    header = HEADER + ("" if full else MORE) + "\n"
    for path, block in blocks.items():
        write_text(path, header + _fields_text(block, full=full))
    return list(blocks)


def _check_place(out: Path, texts: Sequence[str], *, is_file: bool) -> None:
    """Refuse texts to train on in a single file, and a place that has something in it."""
    if is_file and texts:
        raise ConfigError(
            f"{out}: found the text {texts[0]}, which a recipe folder trains a vector on. Give a "
            "folder instead of a .yaml, or a model."
        )
    if out.exists() and (is_file or not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: is there already. Give a new file or folder.")


def _name_sources(sources: Sequence[str], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return every source as a file in `folder` names it, by the name of its vector; and those of
    them that are texts to train on.
    """
    named: dict[str, str] = {}
    corpora: dict[str, str] = {}
    for source in sources:
        name, _, reference = source.rpartition("=")
        last = Path(reference.partition("@")[0]).name
        name = name or (last.partition(".")[0] if TEXTS.fullmatch(last) else last)
        if not name or name in named:
            why = f"{name!r} is the name of another source" if name else "found no name"
            raise ConfigError(f"{source}: {why}. Give it as NAME={reference}.")
        is_corpus = _is_corpus(reference)
        named[name] = _seen_from(folder, reference, is_path=is_corpus)
        if is_corpus:
            corpora[name] = named[name]
    return named, corpora


def _is_corpus(reference: str) -> bool:
    """Whether a source is text to train on: a file or pattern of a known kind, or a folder of such
    files that is neither a model nor a vector.
    """
    if TEXTS.fullmatch(reference):
        return True
    folder = expand_home(Path(reference))
    marks = ("config.json", ADAPTER_CONFIG, VECTOR_FILE)
    is_model = any((folder / name).exists() for name in marks)
    return not is_model and any(TEXTS.fullmatch(path.name) for path in folder.rglob("*"))


def _name_train_files(names: Sequence[str]) -> dict[str, str]:
    """Return the file of each vector to train. Raises ConfigError if two have the same, also where
    file names that differ in case only are the same.
    """
    files = {name: f"train-{slug(name)}.yaml" for name in names}
    owners: dict[str, str] = {}
    for name, file in files.items():
        owner = owners.setdefault(file.lower(), name)
        if owner != name:
            raise ConfigError(
                f"{owner}, {name}: found names that both stand for the file {file}. Give NAME=TEXT "
                "with names that differ in their letters a-z or digits, not only in upper case."
            )
    return files


def _seen_from(folder: Path, text: str, *, is_path: bool = False) -> str:
    """Return what a file in `folder` has to say for a reference as seen from the working directory.
    Hub ids and absolute paths mean the same in both. `is_path`: the text is never a Hub id.
    """
    if expand_home(Path(text)).is_absolute():
        return text
    here = str((Path.cwd() / text).resolve()) if is_path else absolute_reference(text, Path.cwd())
    return relative_reference(here, folder.resolve())


def _study_block(
    base: str, vectors: Mapping[str, Any], tasks: Sequence[str], texts: Sequence[str]
) -> Block:
    terms = [_task_term(task) for task in tasks]
    terms += [{"text": text} for text in texts or ([] if tasks else [HELD_OUT])]
    terms = _name_terms([x for index, x in enumerate(terms) if x not in terms[:index]])
    # every term has a list of its own: YAML would write a shared one once, as an anchor
    halves = [[term | {"hash_range": [*half]} for term in terms] for half in ((0, 0.5), (0.5, 1))]
    values = {
        "base_model": base,
        "vectors": dict(vectors),
        "objective": Block(Objective, {"terms": halves[0]}),
        "test": {"terms": halves[1]},
        "search": Block(SearchConfig, {"n_trials": 30}),
        "baselines": Block(Baselines, {"random_vectors": True}),
    }
    return Block(StudyConfig, values)


def _task_term(task: str) -> dict[str, Any]:
    name, _, metric = task.partition("=")
    return {"task": name, "metric": metric or "acc"}


def _name_terms(terms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return terms with names for those that would be called the same: as much of the path of a
    text, or of the metric of a task, as tells them apart.
    """
    labels = [Term.model_construct(**term).label for term in _with_paths(terms)]
    shared = [labels.count(label) > 1 for label in labels]
    if not any(shared):
        return list(terms)
    longer = [[*_longer_names(term)] for term in terms]
    for length in range(max(map(len, longer))):
        names = [
            names[min(length, len(names) - 1)] if is_shared else label
            for names, label, is_shared in zip(longer, labels, shared, strict=True)
        ]
        if len(set(names)) == len(names):
            break
    else:
        names = list(name_sources(labels))
    return [
        term | {"name": name} if is_shared else term
        for term, name, is_shared in zip(terms, names, shared, strict=True)
    ]


def _with_paths(terms: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for term in terms:
        yield {**term, "text": Path(term["text"])} if "text" in term else dict(term)


def _longer_names(term: Mapping[str, Any]) -> Iterator[str]:
    """Yield names of a term that say more and more of what it scores."""
    if "task" in term:
        yield f"{term['task']}-{slug(term['metric'])}"
        return
    path = Path(term["text"])
    stem = path.name[: match.start(1) - 1] if (match := TEXTS.fullmatch(path.name)) else path.name
    yield stem
    yield path.name
    folders = [part for part in path.parent.parts if part not in ("..", path.anchor)]
    for index in reversed(range(len(folders))):
        yield "-".join([*folders[index:], stem])
    yield "-".join([*folders, path.name])


def _train_block(base: str, name: str, text: str) -> Block:
    values = {
        "name": slug(name),
        "base_model": base,
        "corpus": Block(CorpusConfig, {"path": text}),
        "max_tokens": 1_000_000,
        "lora": LORA,
    }
    return Block(TrainConfig, values)


# -- fields as text --------------------------------------------------------------------------------

INNER: dict[str, type[BaseModel]] = {
    "vectors": VectorConfig,
    "terms": Term,
}  # the fields of an entry, shown after the field


def _fields_text(block: Block, indent: str = "", *, full: bool) -> str:
    """Return the YAML of a block. Every field has its meaning above it, in short files in one
    sentence.
    """
    parts = []
    for name, info in block.shown_fields(full=full):
        meaning = " ".join(str(info.description).split())
        parts.append("" if indent else "\n")
        parts.append(_comment(meaning if full else _first_sentence(meaning), indent))
        value = block.values.get(name)
        if isinstance(value, Block):
            parts.append(f"{indent}{name}:\n{_fields_text(value, indent + '  ', full=full)}")
        elif name in block.values:
            inline = isinstance(value, dict | list) and name != "vectors"
            text = yaml_text({name: value}, inline=inline)
            parts.append(textwrap.indent(text, indent))
        else:
            parts.append(f"{indent}# {name}: {_flow(_shown_value(info))}\n")
        if full and name in INNER and name in block.values:
            parts.append(_inner_fields(name, indent))
    return "".join(parts)


def _inner_fields(name: str, indent: str) -> str:
    """Return all fields of each entry of a field as comments."""
    title = _comment(f"Fields of each of the {name}:", f"{indent}  ")
    text = _fields_text(Block(INNER[name]), " ", full=True)
    text = text.replace("\n ", "\n").removeprefix(" ")
    return title + textwrap.indent(text, f"{indent}  #   ", lambda line: True)


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].removesuffix(".") + "."


def _comment(text: str, indent: str) -> str:
    lines = textwrap.wrap(text, WIDTH - len(indent) - 3)
    return "".join(f"{indent}#  {line}\n" for line in lines)


def _shown_value(info: FieldInfo) -> Any:
    """Return the default of a field; if it has none, or an empty one, its example."""
    default = info.get_default()
    is_plain = isinstance(default, str | int | float | tuple) and not info.is_required()
    return default if is_plain else (info.examples or [None])[0]


def _flow(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()
