"""Choose the files in a directory that may be published.

The directory contains a vector, a recipe or a merged model, recognised by its metadata. A study
directory is a recipe with its trials, as the directory of a run is. Only files on an allow-list are
published, with every reference pinned. A path on this machine, a token, or an input that nobody
else can download is refused before anything leaves the machine.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import RepoFile
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from optimer_hf.comparison.results_file import Results, read_results
from optimer_hf.errors import HubError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.paths import drop_folders
from optimer_hf.files.reading import read_json, yaml_text
from optimer_hf.files.reference import Reference, is_pinned, pin
from optimer_hf.hub.completing import RESULTS, StudyEvidence, evidence_of_study
from optimer_hf.hub.leaks import refuse_private
from optimer_hf.hub.local_inputs import (
    BASE,
    LocalInput,
    Placed,
    local_inputs,
)
from optimer_hf.merging.mergekit_pool import (
    merge_config_of,
    mergekit_command,
    plain_config_of,
)
from optimer_hf.models.layout import (
    ADAPTER_CONFIG,
    COPIED,
    MORE_TEMPLATES,
    OF_TOKENIZER,
    VECTOR_FILE,
    Role,
    files_with_role,
    role_of,
    weight_digests,
)
from optimer_hf.recipes.record import (
    HUB_RUN,
    LOCK,
    MADE_HERE,
    MERGE_CONFIG,
    VANILLA_CONFIG,
    Lock,
    Recipe,
    tokenizer_note,
)
from optimer_hf.report.captions import (
    CAPTIONS,
    CARD_FILES,
    FIGURES,
    REPORT,
    Captions,
    dark_file,
    light_file,
)
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Inputs, hint_of_seeds
from optimer_hf.study.records import read_lines
from optimer_hf.study.trials import DECISIONS_FILE, STUDY_FILE
from optimer_hf.vectors.record import VectorFile, read_record

logger = logging.getLogger(__name__)


Kind = Literal["vector", "recipe", "model", "base"]
CARD = "README.md"
RECIPE_FILES = frozenset({"recipe.yaml", LOCK, MERGE_CONFIG, VANILLA_CONFIG})
STUDY_FILES = frozenset(
    {
        "study/study.json",
        "study/inputs.json",
        "study/trials.jsonl",
        "study/decisions.jsonl",
        "study/sealed.jsonl",
    }
)
FIGURE_FILES = frozenset(CARD_FILES)
ALLOWED_FILES: dict[Kind, frozenset[str]] = {
    "vector": frozenset(),
    "recipe": RECIPE_FILES | STUDY_FILES | FIGURE_FILES | {RESULTS, "results.md", REPORT},
    "model": RECIPE_FILES | FIGURE_FILES,
    "base": frozenset(),
}
ALLOWED_ROLES: dict[Kind, tuple[Role, ...]] = {
    "vector": (*COPIED, "weights", "index", "vector"),
    "recipe": ("licence",),
    "model": (*COPIED, "weights", "index"),
    "base": (*COPIED, "weights", "index"),
}
HOW_TO_RUN: tuple[Role, ...] = ("config", "generation", *OF_TOKENIZER)  # the weights of a model


@dataclass(frozen=True)
class BaseModel:
    """The base of a recipe, which has no metadata of ours: its name, and the repository of the
    recipe.
    """

    name: str
    recipe: str


@dataclass(frozen=True)
class Publication:
    """What is published from a directory. `files` maps names in the repository to files, or to new
    content.
    """

    kind: Kind
    files: Mapping[str, Path | bytes]
    record: VectorFile | Recipe | BaseModel
    inputs: tuple[str, ...]
    lender: str | None = None  # an input that provides only the tokenizer
    results: Results | None = None  # of the sealed test
    evidence: StudyEvidence | None = None  # of a study directory

    def text(self, name: str) -> str:
        """Return the content of a text file, or an empty text if there is no such file."""
        content = self.files.get(name, b"")
        data = content if isinstance(content, bytes) else content.read_bytes()
        return data.decode("utf-8")


def kind_of(names: Collection[str]) -> Kind | None:
    """Return what files with these names make up, or None if that is nothing of ours."""
    if VECTOR_FILE in names:
        return "vector"
    if "recipe.yaml" not in names:
        return None
    return "model" if any(map(is_weights, names)) else "recipe"


def is_allowed(kind: Kind, name: str) -> bool:
    """Whether a file with this name belongs in a repository of this kind."""
    return name in ALLOWED_FILES[kind] or role_of(name) in ALLOWED_ROLES[kind]


def is_pulled(kind: Kind, name: str) -> bool:
    """Whether a pull downloads a file of this name. A page stays on the Hub: it is somebody else's,
    and `optimer report` draws the same one from the trials.
    """
    return name == CARD or (is_allowed(kind, name) and name != REPORT)


def is_weights(name: str) -> bool:
    """Whether a file with this name contains the weights of a model, a vector or an adapter."""
    return role_of(name) == "weights"


def is_legal(name: str) -> bool:
    """Whether a file with this name is a licence, a notice or a policy."""
    return role_of(name) == "licence"


def is_same(data: Path | bytes, entry: RepoFile | RepoSibling | None) -> bool:
    """Whether a file in a repository has this content."""
    if entry is None or entry.size != n_bytes_of(data):
        return False
    if entry.lfs is not None:
        sha256 = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else sha256_file(data)
        return bool(sha256 == entry.lfs.sha256)
    return bool(git_hash(data if isinstance(data, bytes) else data.read_bytes()) == entry.blob_id)


def n_bytes_of(data: Path | bytes) -> int:
    """Return the size of a content in bytes."""
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def choose_files(
    directory: Path,
    placed: Mapping[str, Placed] | None = None,
    evidence: StudyEvidence | None = None,
) -> Publication:
    """Return what may be published from a directory. `placed` says where on the Hub readers find
    the inputs of a recipe that are on this machine. `evidence` is that of an earlier call for the
    same study directory, to draw its figures once.

    Raises HubError if the directory contains no vector, recipe or model, if an input is local or
    not pinned, and if a file names this machine or contains a token.
    """
    if not directory.is_dir():
        raise HubError(f"{directory}: no such directory.")
    named = _files(directory)
    kind = kind_of(named)
    if kind is None:
        raise HubError(
            f"{directory}: found neither vector.json nor recipe.yaml, expected a vector, a recipe "
            "or a merged model. `optimer extract`, `optimer recipe` and `optimer build` write them."
            + hint_of_seeds(directory)
        )
    files = _allowed_files(directory, kind, named)
    if kind == "vector":
        record = read_record(directory)
        assert record is not None  # vector.json is there
        publication = _vector_publication(directory, files, record)
    else:
        publication = _recipe_publication(kind, directory, files, placed or {}, evidence)
    return _without_secrets(directory, publication)


def base_to_publish(directory: Path, recipe: str) -> Publication:
    """Return what may be published of the base of a recipe, as it is."""
    files = _allowed_files(directory, "base", _files(directory))
    return _without_secrets(
        directory, Publication("base", files, BaseModel(directory.name, recipe), ())
    )


def is_run_alike(directory: Path, files: Iterable[RepoSibling]) -> bool:
    """Whether a repository with these files has the config and the tokenizer, with the chat
    template, that are published of a base or vector in a directory.
    """
    here: dict[str, Path | bytes] = {**files_with_role(directory, *HOW_TO_RUN)}
    here |= _config_without_origin(here)
    there = {file.rfilename: file for file in files if role_of(file.rfilename) in HOW_TO_RUN}
    return here.keys() == there.keys() and all(is_same(here[name], there[name]) for name in here)


def vector_to_publish(local: LocalInput, record: VectorFile, placed: Placed) -> Publication:
    """Return what may be published of a vector with its vector.json, which may exist here only in
    memory, and with the adapter_config.json that it has where it is `placed`.
    """
    files = _allowed_files(local.path, "vector", _files(local.path))
    if not (local.path / VECTOR_FILE).exists() or read_record(local.path) != record:
        files[VECTOR_FILE] = _json_text(record.model_dump(mode="json"))
    if placed.adapter_config is not None:
        files[ADAPTER_CONFIG] = placed.adapter_config
    return _without_secrets(local.path, _vector_publication(local.path, files, record))


def _allowed_files(
    directory: Path, kind: Kind, named: Mapping[str, Path]
) -> dict[str, Path | bytes]:
    """Return the files that belong in a repository of this kind, by their names there."""
    weights = weight_digests(directory) if kind != "recipe" else {}
    files: dict[str, Path | bytes] = {
        name: path
        for name, path in named.items()
        if is_allowed(kind, name) and (name in weights or not is_weights(name))
    }
    unknown = sorted(weights.keys() - files.keys())
    if unknown:
        raise HubError(
            f"{directory}: contains weights of unknown use ({', '.join(unknown)}), which would "
            "count as its own. Move them elsewhere."
        )
    return files | _config_without_origin(files)


def _config_without_origin(files: Mapping[str, Path | bytes]) -> dict[str, bytes]:
    """Return config.json without the local path that earlier versions of transformers wrote into it
    and that none reads; nothing if there is none.
    """
    path = files.get("config.json")
    if not isinstance(path, Path):
        return {}
    config = read_json(path)
    if not Path(str(config.pop("_name_or_path", ""))).is_absolute():
        return {}
    return {"config.json": _json_text(config)}


def _without_secrets(directory: Path, publication: Publication) -> Publication:
    """Return a publication whose files were all searched for what must not leave this machine."""
    for name, content in publication.files.items():
        refuse_private(directory / name, content)
    return publication


def _json_text(data: Any) -> bytes:
    return json.dumps(data, indent=2, ensure_ascii=False).encode()


def _files(directory: Path) -> dict[str, Path]:
    """Return the files of a directory by their names in a repository. Those of a study directory
    get the names that they have in the directory of a run.
    """
    named = {}
    is_study = (directory / STUDY_FILE).exists()
    folders = ("", "study", FIGURES, MORE_TEMPLATES)
    for folder in (directory / name for name in folders):
        if folder.is_dir():
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                named[str(path.relative_to(directory))] = path
    if is_study:
        drawn = {name for name in named if name in FIGURE_FILES or name in (REPORT, RESULTS)}
        named = {name: path for name, path in named.items() if name not in drawn}
        named |= {
            name: directory / Path(name).name for name in STUDY_FILES if Path(name).name in named
        }
    return named


def _vector_publication(
    directory: Path, files: dict[str, Path | bytes], record: VectorFile
) -> Publication:
    if not any(map(is_weights, files)):
        raise HubError(
            f"{directory}: has vector.json but no safetensors weights. Write the vector again."
        )
    base = record.base
    reference = pin(base.reference, base.commit)
    _refuse_unpinned(
        "vector.json: base",
        reference,
        "Push the recipe with `--vectors`, which uploads the base, too; or train or extract the "
        "vector from a base on the Hub.",
    )
    return Publication("vector", files, record, (reference,))


def _recipe_publication(
    kind: Kind,
    directory: Path,
    files: dict[str, Path | bytes],
    placed: Mapping[str, Placed],
    evidence: StudyEvidence | None,
) -> Publication:
    file = directory / "recipe.yaml"
    if LOCK not in files:
        raise HubError(f"{file}: has no {LOCK} beside it. Write the recipe again.")
    lock = Lock.read(directory / LOCK)
    recipe = Recipe.read(file)
    if evidence is None and (directory / STUDY_FILE).exists():
        evidence = evidence_of_study(directory, recipe)
    if evidence is not None:
        recipe, files = evidence.recipe, files | evidence.files
    recipe = _recipe_on_hub(recipe, placed)
    lender = _refuse_unpinned_inputs(file, recipe)
    if kind == "model":
        _refuse_other_model(directory, lock)
    lock = _lock_on_hub(lock, placed)
    if placed:
        files[LOCK] = _json_text(lock.model_dump(mode="json"))
    files.pop(VANILLA_CONFIG, None)
    files |= _write_configs(recipe, lock)
    fingerprints = _fingerprints_on_hub(directory, placed)
    for name in STUDY_FILES & files.keys():
        path = files[name]
        assert isinstance(path, Path)  # only figures, results and pages are drawn in memory
        files[name] = _study_file(path, recipe, fingerprints)
    shown = FIGURE_FILES if evidence is not None else _figures_to_publish(directory, recipe)
    files = {n: content for n, content in files.items() if n not in FIGURE_FILES or n in shown}
    inputs = [recipe.base_model, *recipe.sources.values()]
    lender = None if lender in inputs else lender
    inputs += [] if lender is None else [lender]
    results = _read_results(directory, files) if evidence is None else evidence.results
    return Publication(kind, files, recipe, tuple(inputs), lender, results, evidence)


def _write_configs(recipe: Recipe, lock: Lock) -> dict[str, bytes]:
    """Return the files to build a recipe from: its own, ours for mergekit, and a plain one for
    mergekit if that can build it.
    """
    data = recipe.model_dump(mode="json", exclude_none=True)
    data |= drop_folders({key: data[key] for key in ("objective",) if key in data})
    own = merge_config_of(recipe, recipe.weights, recipe.n_layers)
    texts = {
        "recipe.yaml": "# Build it with: optimer build recipe.yaml OUT\n" + yaml_text(data),
        MERGE_CONFIG: MADE_HERE + yaml_text(own),
    }
    vanilla = vanilla_config_of(recipe, lock)
    if vanilla is not None:
        command = mergekit_command(vanilla, VANILLA_CONFIG)
        header = f"{HUB_RUN}{command}\n{_note_for_mergekit(recipe)}"
        texts[VANILLA_CONFIG] = header + yaml_text(vanilla)
    return {name: text.encode() for name, text in texts.items()}


def _recipe_on_hub(recipe: Recipe, placed: Mapping[str, Placed]) -> Recipe:
    """Return a recipe whose local inputs have their references on the Hub."""
    moved = {name: place.reference for name, place in placed.items()}
    vectors = {
        name: item.model_copy(update={"source": moved.get(name, item.source)})
        for name, item in recipe.vectors.items()
    }
    here = {source: moved[name] for name, source in recipe.sources.items() if name in moved}
    here |= {recipe.base_model: moved[BASE]} if BASE in moved else {}
    tokenizer = recipe.tokenizer_source
    return recipe.model_copy(
        update={
            "base_model": moved.get(BASE, recipe.base_model),
            "vectors": vectors,
            "tokenizer_source": here.get(tokenizer, tokenizer) if tokenizer else None,
        }
    )


def _lock_on_hub(lock: Lock, placed: Mapping[str, Placed]) -> Lock:
    """Return a lock with the digests of the files as they are on the Hub."""
    vectors = {
        name: placed[name].digests(files) if name in placed else files
        for name, files in lock.vectors.items()
    }
    return lock.model_copy(update={"vectors": vectors})


def _fingerprints_on_hub(directory: Path, placed: Mapping[str, Placed]) -> dict[str, str]:
    """Return the digests that a study records of its adapters, by field, for those whose
    adapter_config.json on the Hub names another base.
    """
    changed = {name: place for name, place in placed.items() if place.adapter_config is not None}
    inputs = local_inputs(directory) if changed else {}
    return {f"vectors.{n}": inputs[n].fingerprint_at(place) for n, place in changed.items()}


def _refuse_unpinned_inputs(file: Path, recipe: Recipe) -> str | None:
    """Return the input that lends only its tokenizer, if there is one. Raises HubError if an input
    is on this machine or not pinned.
    """
    inputs = {"base": ("base_model", recipe.base_model)}
    inputs |= {name: (f"vectors.{name}.source", at) for name, at in recipe.sources.items()}
    for name, (field, reference) in inputs.items():
        remedy = (
            "`--vectors` uploads the base and vectors of a recipe that are on this machine; "
            f"`--at {name}=OWNER/NAME` names a copy on the Hub."
        )
        _refuse_unpinned(f"{file}: {field}", reference, remedy)
    tokenizer = recipe.tokenizer_source
    lender = None if tokenizer is None or tokenizer in recipe.vectors else tokenizer
    if lender is not None:
        remedy = "Upload it (`hf upload org/name PATH`), and search with that name."
        _refuse_unpinned(f"{file}: tokenizer_source", lender, remedy)
    return lender


def _read_results(directory: Path, files: Collection[str]) -> Results | None:
    """Return the results of the sealed test among the files of a recipe, or None."""
    if RESULTS not in files:
        return None
    if "study/study.json" not in files:
        return Results.read(directory / RESULTS)
    config = StudyConfig.read_record(directory / "study" / "study.json")
    return read_results(directory / RESULTS, config)


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
    drawn = captions.captions
    return {CAPTIONS, *map(light_file, drawn), *map(dark_file, drawn)}


def _refuse_other_model(directory: Path, lock: Lock) -> None:
    if not lock.output:
        raise HubError(f"{directory}: its lock records no model. Run `optimer build` again.")
    if weight_digests(directory) != lock.output:
        raise HubError(
            f"{directory}: its weights are not the locked ones. Run `optimer build` again."
        )


def vanilla_config_of(recipe: Recipe, lock: Lock) -> dict[str, Any] | None:
    """Return a config with pinned references that makes unmodified `mergekit-yaml` write the
    weights of a recipe; None if mergekit cannot. `_note_for_mergekit` says which tokenizer to copy.
    """
    without_tokenizer = recipe.model_copy(update={"tokenizer_source": None})
    return plain_config_of(without_tokenizer, recipe.weights, lock.stored_kinds, recipe.n_layers)


def _study_file(path: Path, recipe: Recipe, fingerprints: Mapping[str, str]) -> bytes:
    """Return a file of a study without anything that only this machine knows: its inputs are those
    of the recipe, with these digests where they differ there.
    """
    if path.name == STUDY_FILE:
        data = json.loads(path.read_text(encoding="utf-8"))
        for name, vector in data.get("vectors", {}).items():
            vector["source"] = recipe.sources.get(name, vector["source"])
        if Reference(recipe.base_model).path is None and _is_local(data.get("base_model")):
            data["base_model"] = recipe.base_model
        if _is_local(data.get("tokenizer_source")):
            data["tokenizer_source"] = recipe.tokenizer_source
        return _json_text(drop_folders(data))
    if path.name == "inputs.json":
        record = Inputs.read(path)
        known = {name: fingerprints.get(name, digest) for name, digest in record.digests.items()}
        return json.dumps({**record.model_dump(), "digests": known}, indent=2).encode()
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


def _is_local(reference: Any) -> bool:
    """Whether a reference in study.json, which is relative to its folder, is a local one."""
    return isinstance(reference, str) and reference.startswith((".", "/", "~"))


def _trials(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the trials of a log, without a last line that was cut off."""
    for number, line in enumerate(read_lines(path, repair=False), start=1):
        try:
            yield json.loads(line)
        except ValueError:
            raise HubError(
                f"{path}: line {number} is not a trial. Restore the file, or search again."
            ) from None


def _refuse_unpinned(where: str, reference: str, remedy: str) -> None:
    """Raise HubError, with the remedy for a local one, if readers could not fetch a reference."""
    if is_pinned(reference):
        return
    if Reference(reference).path is not None or "/" not in reference:
        raise HubError(
            f"{where}: {reference!r} is on this machine, where nobody else can fetch it. {remedy}"
        )
    raise HubError(
        f"{where}: {reference!r} is not pinned, expected org/name@<40-digit commit>. Write the "
        "recipe or vector again: that looks up the commit."
    )
