"""What `push --vectors` uploads beside a recipe: the base and the vectors of this machine."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError

from optimer_hf.errors import HubError, ModelError
from optimer_hf.files.reference import Reference, is_pinned, pin
from optimer_hf.hub.client import describe_repo, retry
from optimer_hf.hub.completing import base_of_vectors, describe_local
from optimer_hf.hub.local_inputs import (
    BASE,
    NOT_YET,
    LocalInput,
    Placed,
    adapter_config_naming,
    local_inputs,
    place_on_hub,
    with_base_on_hub,
)
from optimer_hf.hub.publication import (
    Publication,
    base_to_publish,
    is_run_alike,
    vector_to_publish,
)
from optimer_hf.models.layout import VECTOR_FILE, ResolvedModel
from optimer_hf.recipes.record import LOCK, Lock, Recipe
from optimer_hf.vectors.record import VectorFile, read_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """An input that is uploaded: where it is, where it goes, and the vector.json of a vector."""

    local: LocalInput
    repo_id: str
    place: Placed
    record: VectorFile | None

    def publication(self, recipe: str, base: str) -> Publication:
        """Return what is published for the repository of a recipe, with its base at `base`."""
        if self.record is None:
            return base_to_publish(self.local.path, recipe)
        record = self.record
        if not is_pinned(pin(record.base.reference, record.base.commit)):
            record = with_base_on_hub(record, base)
        return vector_to_publish(self.local, record, self.place)

    def at_commit(self, commit: str | None) -> Placed:
        """Return where readers find the input once it has been pushed."""
        return replace(self.place, reference=pin(self.repo_id, commit))


def uploads_of(directory: Path, repo_id: str, placed: Mapping[str, Placed]) -> dict[str, Upload]:
    """Return what the recipe in a directory takes from this machine, the base first, unless it is
    `placed` on the Hub already. Each goes to the repository of the recipe with its name behind it.

    Raises HubError unless the weights are the locked ones.
    """
    recipe = Recipe.read(directory / "recipe.yaml")
    inputs = {n: each for n, each in local_inputs(directory).items() if n not in placed}
    for local in inputs.values():
        local.refuse_changed()
    named = {name: f"{repo_id}-{_suffix_of(name, recipe)}" for name in inputs}
    if BASE in inputs:
        logger.info(
            "the base %s is on this machine and goes to %s. If the Hub has a copy of it, name that "
            "instead: --at base=OWNER/NAME",
            inputs[BASE].path,
            named[BASE],
        )
    places = {name: Placed(f"{each}@{NOT_YET}") for name, each in named.items()}
    base = base_of(recipe, {**placed, **places}).partition("@")[0]
    is_base_local = BASE in placed or BASE in inputs
    open_base = cache(partial(base_of_vectors, recipe))  # only if a vector has no vector.json
    uploads = {}
    for name, local in inputs.items():
        record = None if name == BASE else _record_of(name, local, open_base)
        place = places[name]
        if local.kind == "adapter":
            config = adapter_config_naming(base, local.path, is_base_local=is_base_local)
            place = replace(place, adapter_config=config)
        uploads[name] = Upload(local, named[name], place, record)
    return uploads


def find_earlier_uploads(
    api: HfApi, directory: Path, repo_id: str, *, is_private: bool
) -> dict[str, Placed]:
    """Return which local inputs of a recipe lie on the Hub already, since a push to a repository
    whose name begins that of `repo_id` has sent them: one to you/merge those of you/merge-model.

    Only those with the same weights, config and tokenizer count, only vectors of the locked base,
    and for a public recipe only public ones. What an earlier push to `repo_id` itself has sent is
    not looked up, since it is not sent again.
    """
    recipe, lock, found = Recipe.read(directory / "recipe.yaml"), Lock.read(directory / LOCK), {}
    for name, local in local_inputs(directory).items():
        suffix = _suffix_of(name, recipe)
        if not local.locked or _describe(api, f"{repo_id}-{suffix}"):
            continue
        for shorter in _shorter_names(repo_id):
            info = _describe(api, f"{shorter}-{suffix}")
            if info is None or (info.private and not is_private):
                continue
            if not _is_interchangeable(api, info, local, lock):
                continue
            with contextlib.suppress(HubError):
                found[name] = place_on_hub(api, info.id, local, Reference(info.id))
                logger.info("%s: %s has the same files; they are not sent again", name, info.id)
                break
    return found


def _is_interchangeable(api: HfApi, info: ModelInfo, local: LocalInput, lock: Lock) -> bool:
    """Whether the files beside the weights in a repository say the same as those of an input. Of an
    input that is on this machine no more, there is nothing to compare.
    """
    files = info.siblings or []
    if local.path.is_dir() and not is_run_alike(local.path, files):
        return False
    if local.kind == "base":
        return True
    if all(file.rfilename != VECTOR_FILE for file in files):
        return False
    file = retry(partial(api.hf_hub_download, info.id, VECTOR_FILE, revision=info.sha))
    try:
        record = read_record(Path(file).parent)
    except ModelError:
        return False
    return record is not None and record.base.files == lock.base


def _shorter_names(repo_id: str) -> Iterator[str]:
    """Yield what comes before each hyphen in the name of a repository, the longest first."""
    owner, _, name = repo_id.partition("/")
    parts = name.split("-")
    yield from (f"{owner}/{'-'.join(parts[:n])}" for n in range(len(parts) - 1, 0, -1))


def _describe(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return describe_repo(api, repo_id, None)
    except RepositoryNotFoundError:
        return None


def base_of(recipe: Recipe, placed: Mapping[str, Placed]) -> str:
    """Return the reference by which readers find the base of a recipe."""
    return placed[BASE].reference if BASE in placed else recipe.base_model


def _suffix_of(name: str, recipe: Recipe) -> str:
    return "base" if name == BASE and "base" not in recipe.vectors else name


def _record_of(name: str, local: LocalInput, open_base: Callable[[], ResolvedModel]) -> VectorFile:
    record = read_record(local.path)
    if record is not None:
        return record
    if local.kind == "delta":
        raise HubError(
            f"{local.field}: {local.path} has no vector.json, which a delta needs. Restore it, or "
            "write the delta again with `optimer extract`."
        )
    return describe_local(name, local.path, open_base(), is_adapter=local.kind == "adapter")
