"""Pull a vector, a recipe or a merged model from the Hub.

A pull resolves the revision to a commit once and downloads the files on an allow-list, small ones
first. It checks every sha256. A pulled directory stays at its commit until an update is requested,
and files that were edited since are never overwritten.
"""

import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from pydantic import ValidationError, field_validator

from optimer_hf.errors import HubError, OptimerError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.disk import naming_disk_errors
from optimer_hf.files.locks import hold_place
from optimer_hf.files.model import VersionedFile
from optimer_hf.files.reference import AnyPath, Reference
from optimer_hf.files.staging import require_empty, staged_directory
from optimer_hf.hub.client import (
    describe_input,
    describe_repo,
    explaining_errors,
    licence_of,
    retry,
)
from optimer_hf.hub.publication import (
    ALLOWED_FILES,
    ALLOWED_ROLES,
    CARD,
    Kind,
    is_allowed,
    is_pulled,
    is_weights,
    kind_of,
)
from optimer_hf.hub.untrusted import LARGEST_TEXT, check_pulled, refuse_other_weights
from optimer_hf.models.layout import PENDING, may_fetch, patterns, role_of
from optimer_hf.recipes.record import LOCK, Lock, Recipe
from optimer_hf.vectors.record import VectorFile

logger = logging.getLogger(__name__)


RECORD = "hub.json"


@dataclass(frozen=True)
class Input:
    """A base model or vector of a pulled recipe, as the Hub describes it, with its size in
    bytes.
    """

    reference: str
    n_bytes: int | None
    licence: str | None
    gated: bool


@dataclass(frozen=True)
class Pull:
    """What was pulled, and to where. `moved` has a line for each thing that an update changed."""

    repo_id: str
    commit: str
    kind: Kind
    path: Path
    files: tuple[str, ...]
    inputs: tuple[Input, ...] = ()
    moved: tuple[str, ...] = ()


class PulledFile(VersionedFile):
    """hub.json: where a pulled directory came from. `files` maps names to sha256."""

    repo_id: str
    revision: str | None
    commit: str
    files: dict[str, str]

    @field_validator("files")
    @classmethod
    def _only_ours(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if name != CARD and not any(is_allowed(kind, name) for kind in ALLOWED_FILES):
                raise ValueError(f"{name!r} is not a file that a pull writes")
        return files


@dataclass(frozen=True)
class _Snapshot:
    """The files of one commit in the cache."""

    repo_id: str
    revision: str | None
    commit: str
    kind: Kind
    names: tuple[str, ...]
    path: Path

    def digest_files(self) -> dict[str, str]:
        """Return the sha256 of each file by name; reads every file."""
        return {name: sha256_file((self.path / name).resolve()) for name in self.names}


def pull(
    repo_id: str,
    out: AnyPath | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    update: bool = False,
) -> Pull:
    """Pull a vector, a recipe or a merged model from the Hub to `out` (None: the name of the
    repository). Of a recipe, only its small files are downloaded.

    `repo_id` may include the revision (`org/name@rev`, `hf://`). The revision is resolved to a
    commit once. Every file is compared with the sha256 (git's sha1 for small ones) that the Hub
    lists. A directory that was pulled before stays at its commit unless `update` is true. Raises
    HubError, and then nothing has been written to `out`.
    """
    ref = Reference(repo_id)
    name, given = ref.repo
    revision = revision or given
    target = Path(out or name.rpartition("/")[2])
    with explaining_errors(name):
        validate_repo_id(name)
        _put_pending_in_place(target)
        if constants.is_offline_mode():
            return _place(None, _find_in_cache(name, revision), target, update=False)
        logger.info("pull: asking the Hub about %s", name)
        api = HfApi(token=token)
        info = describe_repo(api, name, revision)
        listed = {file.rfilename: file for file in info.siblings or []}
        snapshot = _Snapshot(
            info.id,
            revision,
            str(info.sha),
            _kind_of_remote(info.id, listed),
            (),
            Path(constants.HF_HUB_CACHE),
        )
        _refuse_oversized(snapshot, listed)
        _refuse_change(target, snapshot, update)
        return _place(api, _fetch(snapshot, listed, target, token), target, update)


# -- the cache -------------------------------------------------------------------------------------


def _fetch(
    snapshot: _Snapshot, listed: Mapping[str, Any], target: Path, token: str | None
) -> _Snapshot:
    """Download and check the small files, then the weights."""
    wanted = [name for name in listed if is_pulled(snapshot.kind, name)]
    small = tuple(name for name in wanted if not is_weights(name))
    first = replace(snapshot, names=small, path=_download(snapshot, small, token))
    _refuse_damaged(first, listed)
    _check_record(first)
    if len(small) == len(wanted):
        return first
    sizes = {name: listed[name].size or 0 for name in wanted if name not in small}
    _refuse_full_disk(first, sizes, target)
    whole = replace(first, names=tuple(wanted), path=_download(first, tuple(wanted), token))
    _refuse_damaged(whole, listed)
    return whole


def _download(snapshot: _Snapshot, names: tuple[str, ...], token: str | None) -> Path:
    """Download files of a commit and return their folder in the cache. Offline, the cache can then
    resolve the revision, too.
    """
    path = Path()
    for revision in (snapshot.revision, snapshot.commit):
        request = partial(
            snapshot_download,
            snapshot.repo_id,
            revision=revision,
            allow_patterns=list(names),
            token=token,
        )
        path = Path(retry(request))
        if path.name == snapshot.commit:
            break
    return path


def _find_in_cache(repo_id: str, revision: str | None) -> _Snapshot:
    """Return the files in the cache from a repository that was pulled before."""
    try:
        named = sorted(frozenset().union(*ALLOWED_FILES.values()))
        roles = sorted(frozenset().union(*ALLOWED_ROLES.values()))
        allowed = [CARD, *patterns(*roles), *named]
        path = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=allowed, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        raise HubError(
            f"{repo_id}: is not in the cache, and HF_HUB_OFFLINE is set. Go online once and pull "
            "it."
        ) from None
    names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    kind = _kind_of_remote(repo_id, names)
    wanted = tuple(sorted(name for name in names if is_pulled(kind, name)))
    return _Snapshot(repo_id, revision, path.name, kind, wanted, path)


def _kind_of_remote(repo_id: str, names: Collection[str]) -> Kind:
    kind = kind_of(list(names))
    if kind is not None:
        return kind
    has_weights = any(name.endswith(".safetensors") for name in names)
    if not has_weights and any(role_of(name) == "pickle" for name in names):
        raise HubError(
            f"{repo_id}: contains only pickled weights, which can run code when they are read. Ask "
            "its author for safetensors."
        )
    raise HubError(
        f"{repo_id}: found neither vector.json nor recipe.yaml, expected a vector, a recipe or a "
        "merged model of optimer-hf. `hf download` fetches any repository."
    )


def _refuse_oversized(snapshot: _Snapshot, listed: Mapping[str, Any]) -> None:
    for name, file in listed.items():
        is_text = is_pulled(snapshot.kind, name) and not is_weights(name)
        if is_text and (file.size or 0) > LARGEST_TEXT:
            raise HubError(
                f"{snapshot.repo_id}: {name} has {file.size} bytes, expected at most "
                f"{LARGEST_TEXT}. Ask its author for a smaller file."
            )


def _refuse_full_disk(snapshot: _Snapshot, sizes: Mapping[str, int], target: Path) -> None:
    """Raise HubError if the weights do not fit on the disks of the cache and of `target`."""
    folder = next(each for each in (target.absolute(), *target.absolute().parents) if each.exists())
    to_fetch = sum(size for name, size in sizes.items() if not (snapshot.path / name).exists())
    to_copy = sum(size for name, size in sizes.items() if not (target / name).exists())
    needed: dict[int, int] = {}
    for place, n_bytes in ((snapshot.path, to_fetch), (folder, to_copy)):
        device = place.stat().st_dev
        needed[device] = needed.get(device, 0) + n_bytes
        free = shutil.disk_usage(place).free
        if needed[device] > free:
            raise HubError(
                f"{snapshot.repo_id}: needs {needed[device]:,} bytes on the disk of {place}, which "
                f"has {free:,} free. Free space, or set HF_HOME to another disk."
            )


def _refuse_damaged(snapshot: _Snapshot, listed: Mapping[str, Any]) -> None:
    """Raise HubError unless every file has the digest that the Hub lists. A damaged file is removed
    from the cache.
    """
    for name in snapshot.names:
        path, file = snapshot.path / name, listed[name]
        if not path.exists():
            raise HubError(f"{snapshot.repo_id}: {name} did not arrive. Pull again.")
        if file.lfs is not None:
            is_right = sha256_file(path.resolve()) == file.lfs.sha256
        else:
            is_right = git_hash(path.read_bytes()) == file.blob_id
        if not is_right:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise HubError(
                f"{snapshot.repo_id}: {name} was damaged on the way: its digest is not the one on "
                "the Hub. It was removed from the cache; pull again."
            )


def _check_record(snapshot: _Snapshot) -> Recipe | VectorFile:
    """Validate the small files of a snapshot and return its record."""
    with TemporaryDirectory() as scratch:
        for name in snapshot.names:  # the cache has links to files without an ending
            if not is_weights(name):
                copy = Path(scratch) / name
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(snapshot.path / name, copy)
        try:
            return check_pulled(snapshot.kind, Path(scratch))
        except OptimerError as error:
            text = str(error).replace(f"{scratch}/", f"{snapshot.repo_id}: ")
            raise type(error)(text) from None
        except (ValidationError, ValueError, TypeError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise HubError(
                f"{snapshot.repo_id}: contains a file that cannot be used ({reason}). Ask its "
                "author to push it again."
            ) from None


# -- the directory ---------------------------------------------------------------------------------


def _refuse_change(target: Path, snapshot: _Snapshot, update: bool) -> PulledFile | None:
    """Return the record of an earlier pull into a directory.

    Raises HubError for a change that was not requested, and for files that were edited since.
    """
    before = _record_in(target)
    if before is None:
        require_empty(target)
        return None
    if before.repo_id != snapshot.repo_id:
        raise HubError(
            f"{target}: was pulled from {before.repo_id}. Give another directory for "
            f"{snapshot.repo_id}."
        )
    if before.commit != snapshot.commit and not update:
        raise HubError(
            f"{target}: was pulled at {before.commit}, and {snapshot.repo_id} is now at "
            f"{snapshot.commit}. Take it with --update, which says what has changed, or stay with "
            f"{snapshot.repo_id}@{before.commit}."
        )
    here = target.resolve()
    for name in before.files:
        if not (target / name).parent.resolve().is_relative_to(here):
            raise HubError(f"{target}: {name} is behind a link to another place. Remove the link.")
    edited = [
        name
        for name, sha256 in before.files.items()
        if name != LOCK and (target / name).exists() and sha256_file(target / name) != sha256
    ]  # a build adds digests to the lock
    if edited:
        raise HubError(
            f"{target}: {', '.join(edited)} was edited here since the pull. Move the directory "
            "away, or pull to another one."
        )
    return before


def _place(api: HfApi | None, snapshot: _Snapshot, target: Path, update: bool) -> Pull:
    """Check the content of a snapshot and put it in place, whole or not at all."""
    is_there = _refuse_change(target, snapshot, update) is not None
    record, digests = _check_record(snapshot), snapshot.digest_files()
    if snapshot.kind == "model":
        refuse_other_weights(snapshot.repo_id, Lock.read(snapshot.path / LOCK), digests)
    pulled = PulledFile(
        repo_id=snapshot.repo_id,
        revision=snapshot.revision,
        commit=snapshot.commit,
        files=digests,
    )
    moved: tuple[str, ...] = ()
    if is_there:
        with hold_place(target, beside=target):
            before = _refuse_change(target, snapshot, update) or pulled  # read under the lock
            moved = _list_changes(before, target, snapshot.commit, digests, record)
            _stage_update(snapshot, pulled, before, target)
            _finish_update(target)
    else:
        with staged_directory(target) as staging:
            _copy(snapshot, digests, staging)
            pulled.write(staging / RECORD)
    done = Pull(
        snapshot.repo_id, snapshot.commit, snapshot.kind, target, tuple(digests), moved=moved
    )
    if api is None or snapshot.kind != "recipe" or not isinstance(record, Recipe):
        return done
    references = [record.base_model, *(item.source for item in record.vectors.values())]
    if record.tokenizer_reference is not None:
        references.append(record.tokenizer_reference)
    done = replace(done, inputs=inputs_of(api, references))
    _warn_of_full_disk(done)
    return done


def _warn_of_full_disk(done: Pull) -> None:
    """Warn if a build could not download the inputs of a pulled recipe to its disk."""
    n_bytes = sum(each.n_bytes or 0 for each in done.inputs)
    free = shutil.disk_usage(done.path).free
    if n_bytes > free:
        logger.warning(
            "%s: a build downloads up to %s bytes, and this disk has %s free",
            done.path,
            f"{n_bytes:,}",
            f"{free:,}",
        )


def _stage_update(
    snapshot: _Snapshot, pulled: PulledFile, before: PulledFile, target: Path
) -> None:
    """Put the files that differ from an earlier pull, and the new record, into PENDING, whole or
    not at all.
    """
    missing = {
        name
        for name, sha256 in pulled.files.items()
        if not (target / name).exists() or before.files.get(name) != sha256
    }
    with staged_directory(target / PENDING) as staging:
        _copy(snapshot, missing, staging)
        pulled.write(staging / RECORD)


def _put_pending_in_place(target: Path) -> None:
    """Finish an update that had arrived whole when it was killed."""
    if (target / PENDING).is_dir():
        with hold_place(target, beside=target):
            _finish_update(target)


def _finish_update(target: Path) -> None:
    """Move an update that has arrived whole into place. hub.json is moved last: once it is gone,
    only empty folders are left to remove.
    """
    pending = target / PENDING
    with naming_disk_errors(target, "The update has arrived whole; the same command finishes it"):
        _move_update(pending, target)
    shutil.rmtree(pending, ignore_errors=True)


def _move_update(pending: Path, target: Path) -> None:
    if (pending / RECORD).exists():
        new, old = PulledFile.read(pending / RECORD), _record_in(target)
        for name in () if old is None else old.files.keys() - new.files.keys():
            (target / name).unlink(missing_ok=True)
        for name in [*new.files, RECORD]:
            if (pending / name).exists():
                (target / name).parent.mkdir(exist_ok=True)
                (pending / name).replace(target / name)


def _record_in(target: Path) -> PulledFile | None:
    return PulledFile.read(target / RECORD) if (target / RECORD).exists() else None


def _copy(snapshot: _Snapshot, names: Collection[str], target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(snapshot.path / name, target / name)


def _list_changes(
    before: PulledFile,
    target: Path,
    commit: str,
    digests: Mapping[str, str],
    record: Recipe | VectorFile,
) -> tuple[str, ...]:
    """Return a line for each difference between a pulled directory and the new pull."""
    if before.commit == commit:
        return ()
    lines = [f"commit: {before.commit} -> {commit}"]
    if isinstance(record, Recipe) and (target / "recipe.yaml").exists():
        old = Recipe.read(target / "recipe.yaml")
        if old.base_model != record.base_model:
            lines.append(f"base_model: {old.base_model} -> {record.base_model}")
        if old.tokenizer_source != record.tokenizer_source:
            named = [each.tokenizer_source or "base" for each in (old, record)]
            lines.append(f"tokenizer_source: {' -> '.join(named)}")
        for name in sorted(old.vectors.keys() | record.vectors.keys()):
            was, now = old.vectors.get(name), record.vectors.get(name)
            if was != now:
                texts = [f"{v.weights_text} x {v.source}" if v else "none" for v in (was, now)]
                lines.append(f"vectors.{name}: {texts[0]} -> {texts[1]}")
    names = sorted(before.files.keys() | digests.keys())
    changed = [name for name in names if before.files.get(name) != digests.get(name)]
    return (*lines, f"files: {', '.join(changed)}")


# -- what a build will fetch -----------------------------------------------------------------------


def inputs_of(api: HfApi, references: Sequence[str]) -> tuple[Input, ...]:
    """Return what the Hub says about models. A model that it does not show counts as gated."""
    inputs = []
    for text in dict.fromkeys(references):
        ref = Reference(text)
        if ref.package is not None:
            inputs.append(Input(text, None, None, False))
            continue
        try:
            info = describe_input(api, ref)
        except (HubError, HTTPError, ConnectionError) as error:  # the recipe itself is in place
            logger.warning("%s", error)
            inputs.append(Input(text, None, None, True))
            continue
        sizes = [file.size or 0 for file in info.siblings or [] if may_fetch(file.rfilename)]
        inputs.append(Input(text, sum(sizes), licence_of(info), bool(info.gated)))
    return tuple(inputs)
