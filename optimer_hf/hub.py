"""Vectors, recipes and merged models to the Hub and back.

A push is one commit on top of the head it has looked at, so that a reader sees the old state or the
new one, and two people who push at once cannot overwrite each other unseen. Files that are there
already travel no second time, also after a kill. A pull resolves the revision to a commit once,
takes the files of an allow-list, and believes their sha256, not the transfer.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from pydantic import ValidationError

from optimer_hf import card
from optimer_hf.checkpoint import weight_files
from optimer_hf.errors import HubError
from optimer_hf.files import (
    ATOMIC_PREFIX,
    Reference,
    VersionedFile,
    require_empty,
    sha256_file,
    staged_directory,
)
from optimer_hf.publish import (
    ALLOWED,
    LARGEST_TEXT,
    PICKLES,
    WEIGHTS,
    Kind,
    Publication,
    check_pulled,
    is_allowed,
    kind_of,
    local_vectors,
    publication,
)
from optimer_hf.recipe import Lock, RecipeFile
from optimer_hf.remote import TRIES, explained, git_blob, tried

logger = logging.getLogger(__name__)
CARD = "README.md"
RECORD = "hub.json"
MOST_FILES = 250  # of one commit


@dataclass(frozen=True)
class Push:
    """What a push did, or would do (`commit` None): files and their sizes in bytes."""

    repo_id: str
    kind: Kind
    sent: dict[str, int]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    card: str
    commit: str | None = None
    pull_request: str | None = None
    vectors: tuple["Push", ...] = ()


@dataclass(frozen=True)
class Input:
    """A base model or vector of a pulled recipe, as the Hub describes it; sizes in bytes."""

    reference: str
    n_bytes: int | None
    licence: str | None
    gated: bool


@dataclass(frozen=True)
class Pull:
    """What was pulled and to where; `moved` says what an update changed."""

    repo_id: str
    commit: str
    kind: Kind
    path: Path
    files: tuple[str, ...]
    inputs: tuple[Input, ...] = ()
    moved: tuple[str, ...] = ()


class PulledFile(VersionedFile):
    """hub.json: where a pulled directory came from."""

    repo_id: str
    revision: str | None
    commit: str
    files: dict[str, str]


# -- push ------------------------------------------------------------------------------------------


def push(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    licence: str | None = None,
    vectors: bool = False,
    dry_run: bool = False,
) -> Push:
    """Push a vector, recipe or merged model, recognised by its metadata, in one commit.

    `private` None leaves the choice to the account; `revision` is a branch, made when it is
    missing; `tag` is set last. `vectors` pushes the local vectors of a recipe first, each to
    `<repo_id>-<name>`, and pins the recipe to them. Raises HubError, with what to do, before
    anything is sent where that is possible.
    """
    if create_pr and tag is not None:
        raise HubError(
            "--tag with --create-pr: a proposal has no tag yet. Tag it once it is merged."
        )
    with explained(repo_id):
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HubError(f"{repo_id!r}: expected a repository as name/repository.")
        target = _Target(HfApi(token=token), repo_id, revision, private)
        paths = _vectors_to_push(directory) if vectors else {}
        foreseen = {name: f"{repo_id}-{name}@{'0' * 40}" for name in paths}
        found = publication(directory, foreseen)
        _refuse_other_kind(target, found)
        metadata = _metadata(target, found, licence, foreseen.values())
        pushes: dict[str, Push] = {}
        for name, path in paths.items():
            options = {"private": private, "token": token, "licence": licence, "dry_run": dry_run}
            pushes[name] = push(path, f"{repo_id}-{name}", **options)  # type: ignore[arg-type]
        if paths and not dry_run:
            pinned = {name: f"{each.repo_id}@{each.commit}" for name, each in pushes.items()}
            found = publication(directory, pinned)
            metadata = _metadata(target, found, licence)
        request = _Request(found, metadata, commit_message, create_pr, tag, dry_run)
        done = _commit(target, request)
    return replace(done, vectors=tuple(pushes.values()))


def _vectors_to_push(directory: Path) -> dict[str, Path]:
    """Return the local vectors of a recipe; raise HubError unless they are the locked ones."""
    if not (directory / "recipe.yaml").exists():
        raise HubError(f"{directory}: --vectors belongs to a recipe, and it has no recipe.yaml.")
    paths = local_vectors(directory)
    lock = Lock.read(directory / "recipe.lock.json")
    for name, path in paths.items():
        if not path.is_dir() or weight_files(path) != lock.vectors.get(name):
            raise HubError(
                f"{directory / 'recipe.yaml'}: vectors.{name}: the weights in {path} are not the "
                "locked ones. Write the recipe again."
            )
    return paths


@dataclass(frozen=True)
class _Target:
    """A repository as it is when a push begins; `info` None: there is none yet."""

    api: HfApi
    repo_id: str
    revision: str | None
    private: bool | None

    @property
    def branch(self) -> str:
        return self.revision or constants.DEFAULT_REVISION

    def info(self) -> Any:
        """Return what the Hub says of the branch, or of the default one when it is missing."""
        for revision in (self.revision, None):
            request = partial(self.api.model_info, self.repo_id, revision=revision)
            try:
                return tried(request)
            except GatedRepoError:
                raise
            except RevisionNotFoundError:
                continue
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise
                return None
        return None

    def listing(self, commit: str) -> dict[str, Any]:
        """Return file name -> entry (size, blob_id, lfs) at a commit."""
        entries = tried(
            lambda: list(self.api.list_repo_tree(self.repo_id, revision=commit, recursive=True))
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def card(self, commit: str) -> str | None:
        """Return the card at a commit."""
        try:
            path = tried(lambda: self.api.hf_hub_download(self.repo_id, CARD, revision=commit))
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8")


@dataclass(frozen=True)
class _Request:
    """What one push asks for."""

    found: Publication
    metadata: dict[str, Any]
    message: str | None
    create_pr: bool
    tag: str | None
    dry_run: bool


def _refuse_other_kind(target: _Target, found: Publication) -> None:
    info = target.info()
    if info is None:
        return
    there = kind_of([file.rfilename for file in info.siblings or []])
    if there is not None and there != found.kind:
        raise HubError(
            f"{target.repo_id}: holds a {there}, and this is a {found.kind}. Give another "
            "repository."
        )
    if target.private is not None and target.private != info.private:
        is_now, asked = ("private", "--public") if info.private else ("public", "--private")
        raise HubError(
            f"{target.repo_id}: is {is_now}, and {asked} was asked. A push does not change that; "
            "do it in the settings of the repository."
        )


def _metadata(
    target: _Target,
    found: Publication,
    licence: str | None,
    foreseen: Collection[str] = (),
) -> dict[str, Any]:
    """Return the metadata of the card, after a look at every input on the Hub but the `foreseen`
    ones, which are not there yet.
    """
    info = target.info()
    is_private = info.private if info is not None else target.private is True
    references = [ref for ref in map(Reference, found.inputs) if ref.package is None]
    licences: dict[str, str | None] = {
        text: None for text in found.inputs if text.startswith("pypi:")
    }
    for ref in references:
        if ref.text in foreseen:
            continue
        described = _described_input(target.api, ref)
        if described.private and not is_private:
            raise HubError(
                f"{ref.text}: is private, so a public {found.kind} could not be built by others. "
                "Push with --private, or make the input public."
            )
        licences[ref.text] = _licence_of(described)
    existing = card.split(target.card(info.sha) or "")[0] if info is not None else {}
    strictest = card.strictest_licence(licences)
    chosen = licence or strictest or existing.get("license")
    if licence and strictest and licence.lower() != strictest:
        logger.warning(
            "%s: --license %s, but its inputs are under %s", target.repo_id, licence, strictest
        )
    if not chosen:
        listed = ", ".join(f"{name}: {found or 'unknown'}" for name, found in licences.items())
        raise HubError(
            f"{target.repo_id}: the licence cannot be told from the inputs ({listed}). Say it: "
            "--license apache-2.0, gemma, ..."
        )
    names = [ref.repo[0] for ref in references]
    metadata = card.metadata_of(found.kind, chosen, names, _model_index(found))
    datasets = card.datasets_of(found.vector.corpus) if found.vector is not None else []
    return metadata | ({"datasets": datasets} if datasets else {})


def _described(api: HfApi, repo_id: str, revision: str | None) -> Any:
    """Return what the Hub says of a repository, under its name of today, with sizes of files."""
    info = tried(partial(api.model_info, repo_id, revision=revision, files_metadata=True))
    if info.id == repo_id:
        return info
    logger.warning("%s is called %s now; change the name where you use it", repo_id, info.id)
    return tried(partial(api.model_info, info.id, revision=revision, files_metadata=True))


def _described_input(api: HfApi, ref: Reference) -> Any:
    """Return what the Hub says of an input; raise HubError when it is not there for this token."""
    try:
        return _described(api, *ref.repo)
    except GatedRepoError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise HubError(
            f"{ref.text}: is not on the Hub, or not for you ({error.response.status_code}). Check "
            "the name and commit, and log in with `hf auth login`."
        ) from None


def _licence_of(info: Any) -> str | None:
    data = info.card_data.to_dict() if info.card_data is not None else {}
    licence = data.get("license")
    return licence if isinstance(licence, str) else None


def _model_index(found: Publication) -> dict[str, Any] | None:
    if found.recipe is None or "sealed" not in found.recipe.scores:
        return None
    terms = found.recipe.objective.get("terms", [])
    metrics = {
        str(term.get("name") or term.get("task") or Path(str(term.get("text"))).stem): str(
            term.get("metric", "bits_per_byte")
        )
        for term in terms
    }
    return card.model_index(found.recipe.name, found.recipe.scores["sealed"]["terms"], metrics)


def _card(target: _Target, request: _Request, existing: str | None) -> str:
    found = request.found
    facts: dict[str, Any] = {
        "kind": found.kind,
        "title": found.name,
        "repo_id": target.repo_id,
        "vector": found.vector,
        "recipe": found.recipe,
        "recipe_text": found.text("recipe.yaml").strip(),
        "merge_config": (found.text("mergekit_config.yml") or found.text("optimer.yml")).strip(),
        "figure": "comparison.png" in found.files,
    }
    if found.recipe is not None:
        results = found.text("results.md")
        facts |= card.recipe_facts(found.recipe.weights, found.recipe.ledger, results)
    return card.render(request.metadata, facts, existing)


def _commit(target: _Target, request: _Request) -> Push:
    """Send what the branch lacks in one commit on its head; look again when the head has moved."""
    for _ in range(TRIES):
        info = target.info()
        if info is None and not request.dry_run:
            tried(
                lambda: target.api.create_repo(
                    target.repo_id, private=target.private, exist_ok=True
                )
            )
            info = target.info()
        existing = target.card(info.sha) if info is not None else None
        done, operations = _changes(target, request, info, existing)
        if request.dry_run:
            return done
        _refuse_moved_tag(target, request.tag, done, info.sha, bool(operations))
        if not operations:
            return _tagged(target, request.tag, replace(done, commit=info.sha))
        if target.revision and not target.revision.startswith("refs/") and not request.create_pr:
            tried(
                lambda: target.api.create_branch(
                    target.repo_id, branch=target.branch, exist_ok=True
                )
            )
        try:
            commit = _send(target, request, operations, info.sha)
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            logger.warning(
                "%s: somebody else pushed to %s meanwhile; looking again",
                target.repo_id,
                target.branch,
            )
            continue
        sent = replace(done, commit=commit.oid, pull_request=commit.pr_url)
        return _tagged(target, request.tag, sent)
    raise HubError(
        f"{target.repo_id}: {target.branch} was changed by others {TRIES} times during this push. "
        "Nothing is lost; push again."
    )


def _send(target: _Target, request: _Request, operations: list[Any], parent: str) -> Any:
    found = request.found
    return tried(
        lambda: target.api.create_commit(
            target.repo_id,
            list(operations),
            commit_message=request.message or f"Upload {found.kind} {found.name} (optimer-hf)",
            revision=target.branch,
            parent_commit=parent,
            create_pr=request.create_pr or None,
        )
    )


def _changes(
    target: _Target, request: _Request, info: Any, existing: str | None
) -> tuple[Push, list[Any]]:
    """Return what differs from the head of a branch, and the operations that make it equal."""
    text = _card(target, request, existing)
    files: dict[str, Path | bytes] = {**request.found.files, CARD: text.encode()}
    there = target.listing(info.sha) if info is not None else {}
    changed = {name: data for name, data in files.items() if not _is_same(data, there.get(name))}
    kind = request.found.kind
    stale = [name for name in there if name not in files and is_allowed(kind, name)]
    if len(changed) + len(stale) > MOST_FILES:
        raise HubError(
            f"{target.repo_id}: {len(changed) + len(stale)} files to change, more than the "
            f"{MOST_FILES} of one commit. Write larger shards (--max-shard-size)."
        )
    operations = [CommitOperationAdd(name, data) for name, data in changed.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    done = Push(
        target.repo_id,
        kind,
        {name: _n_bytes(data) for name, data in changed.items()},
        tuple(name for name in files if name not in changed),
        tuple(stale),
        text,
    )
    return done, operations


def _n_bytes(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def _is_same(data: Path | bytes, entry: Any) -> bool:
    if entry is None or entry.size != _n_bytes(data):
        return False
    if entry.lfs is not None:
        found = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else sha256_file(data)
        return bool(found == entry.lfs.sha256)
    return bool(git_blob(data if isinstance(data, bytes) else data.read_bytes()) == entry.blob_id)


def _refuse_moved_tag(
    target: _Target, tag: str | None, done: Push, head: str, changes: bool
) -> None:
    if tag is None:
        return
    refs = tried(lambda: target.api.list_repo_refs(target.repo_id))
    there = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
    if there is not None and (changes or there != head):
        raise HubError(
            f"{target.repo_id}: tag {tag!r} is at {there} already, and a tag does not move. Give "
            "another tag."
        )


def _tagged(target: _Target, tag: str | None, done: Push) -> Push:
    if tag is not None and done.commit is not None:
        tried(
            lambda: target.api.create_tag(
                target.repo_id, tag=tag, revision=done.commit, exist_ok=True
            )
        )
    return done


# -- pull ------------------------------------------------------------------------------------------


def pull(
    repo_id: str,
    out: Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    update: bool = False,
) -> Pull:
    """Pull a vector, recipe or merged model to `out` (default: the name of the repository).

    `repo_id` may carry the revision (`org/name@rev`, `hf://`). The revision is resolved to a commit
    once; every file is compared with the sha256 (small ones: git's sha1) that the Hub lists. A
    directory that was pulled before stays at its commit unless `update` is given. Raises HubError
    before anything is written to `out`.
    """
    ref = Reference(repo_id)
    name, given = ref.repo
    revision = revision or given
    target = out or Path(name.rpartition("/")[2])
    with explained(name):
        validate_repo_id(name)
        if constants.is_offline_mode():
            return _pull_offline(name, revision, target)
        api = HfApi(token=token)
        info = _described(api, name, revision)
        name = info.id
        listed = {file.rfilename: file for file in info.siblings or []}
        kind = _kind_of_remote(name, listed)
        _refuse_oversized(name, kind, listed)
        wanted = [file for file in listed if is_allowed(kind, file) or file == CARD]
        before = _pulled_before(target, name, info.sha, update)
        snapshot = _snapshot(name, (revision, info.sha), wanted, token)
        for file in wanted:
            _check_content(name, snapshot / file, listed[file])
        return _finish(api, (name, revision, info.sha), kind, snapshot, wanted, target, before)


def _snapshot(
    repo_id: str, revisions: tuple[str | None, str], names: list[str], token: str | None
) -> Path:
    """Return the cached files of a commit, fetched under the name that was asked for, so that the
    cache answers to that name offline.
    """
    path = Path()
    for revision in revisions:
        request = partial(
            snapshot_download, repo_id, revision=revision, allow_patterns=names, token=token
        )
        path = Path(tried(request))
        if path.name == revisions[1]:
            break
    return path


def _kind_of_remote(repo_id: str, names: Mapping[str, Any]) -> Kind:
    kind = kind_of(list(names))
    if kind is not None:
        return kind
    has_weights = any(Path(name).match(WEIGHTS) for name in names)
    if not has_weights and any(Path(name).match(pattern) for pattern in PICKLES for name in names):
        raise HubError(
            f"{repo_id}: holds pickled weights only, which can run code when they are read. Ask "
            "its author for safetensors."
        )
    raise HubError(
        f"{repo_id}: found neither vector.json nor recipe.yaml, so this is no vector, recipe or "
        "merge of optimer-hf. `hf download` fetches any repository."
    )


def _refuse_oversized(repo_id: str, kind: Kind, listed: Mapping[str, Any]) -> None:
    for name, file in listed.items():
        if is_allowed(kind, name) and not Path(name).match(WEIGHTS) and file.size > LARGEST_TEXT:
            raise HubError(
                f"{repo_id}: {name} has {file.size} bytes, expected at most {LARGEST_TEXT}."
            )


def _check_content(repo_id: str, path: Path, file: Any) -> None:
    """Raise HubError unless a downloaded file is what the Hub lists; a bad one leaves the cache."""
    if file.lfs is not None:
        is_right = sha256_file(path.resolve()) == file.lfs.sha256
    else:
        is_right = git_blob(path.read_bytes()) == file.blob_id
    if not is_right:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HubError(
            f"{repo_id}: {path.name} was damaged on its way: its sha256 is not the one the Hub "
            "lists. It was removed from the cache; pull again."
        )


def _pulled_before(target: Path, repo_id: str, commit: str, update: bool) -> PulledFile | None:
    """Return the record of an earlier pull into a directory; refuse to change it unasked."""
    if not (target / RECORD).exists():
        require_empty(target)
        return None
    before = PulledFile.read(target / RECORD)
    if before.repo_id != repo_id:
        raise HubError(
            f"{target}: was pulled from {before.repo_id}. Give another directory for {repo_id}."
        )
    if before.commit != commit and not update:
        raise HubError(
            f"{target}: was pulled at {before.commit}; {repo_id} is at {commit} now. --update "
            f"takes it and says what moved; {repo_id}@{before.commit} stays."
        )
    return before


def _finish(
    api: HfApi | None,
    source: tuple[str, str | None, str],
    kind: Kind,
    snapshot: Path,
    names: list[str],
    target: Path,
    before: PulledFile | None,
) -> Pull:
    """Check what a snapshot holds and put it in place; hub.json comes last."""
    repo_id, revision, commit = source
    with TemporaryDirectory() as scratch:
        for name in names:  # the small files under their own names, for the messages
            if not Path(name).match(WEIGHTS):
                copy = Path(scratch) / name
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(snapshot / name, copy)
        record = _checked(repo_id, kind, Path(scratch))
    files = {name: sha256_file((snapshot / name).resolve()) for name in names}
    moved = _moved(before, target, commit, files, record) if before is not None else ()
    pulled = PulledFile(repo_id=repo_id, revision=revision, commit=commit, files=files)
    if before is None:
        with staged_directory(target) as staging:
            _copy(snapshot, files, staging)
            pulled.write(staging / RECORD)
    else:
        _copy(snapshot, files, target)
        for name in set(before.files) - set(files):
            (target / name).unlink(missing_ok=True)
        pulled.write(target / RECORD)
    inputs = _inputs(api, record) if api is not None and kind == "recipe" else ()
    return Pull(repo_id, commit, kind, target, tuple(files), inputs, moved)


def _checked(repo_id: str, kind: Kind, directory: Path) -> Any:
    try:
        return check_pulled(kind, directory)
    except (ValidationError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise HubError(f"{repo_id}: holds a file that cannot be used ({reason}).") from None


def _copy(snapshot: Path, files: Mapping[str, str], target: Path) -> None:
    for name, sha256 in files.items():
        out = target / name
        if out.is_file() and sha256_file(out) == sha256:
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{ATOMIC_PREFIX}{out.name}")
        shutil.copyfile(snapshot / name, partial)
        partial.replace(out)


def _moved(
    before: PulledFile, target: Path, commit: str, files: Mapping[str, str], record: Any
) -> tuple[str, ...]:
    """Say what differs between a pulled directory and what is pulled now."""
    if before.commit == commit:
        return ()
    lines = [f"commit: {before.commit} -> {commit}"]
    if isinstance(record, RecipeFile) and (target / "recipe.yaml").exists():
        old = RecipeFile.read(target / "recipe.yaml")
        if old.base_model != record.base_model:
            lines.append(f"base_model: {old.base_model} -> {record.base_model}")
        for name in sorted(old.vectors.keys() | record.vectors.keys()):
            was, now = old.vectors.get(name), record.vectors.get(name)
            if was != now:
                shown = [f"{v.weight:.4g} x {v.source}" if v else "none" for v in (was, now)]
                lines.append(f"vectors.{name}: {shown[0]} -> {shown[1]}")
    names = sorted(before.files.keys() | files.keys())
    changed = [name for name in names if before.files.get(name) != files.get(name)]
    return (*lines, f"files: {', '.join(changed)}")


def _inputs(api: HfApi, recipe: RecipeFile) -> tuple[Input, ...]:
    """Return what building a recipe will fetch."""
    references = [recipe.base_model, *(item.source for item in recipe.vectors.values())]
    found = []
    for text in dict.fromkeys(references):
        ref = Reference(text)
        if ref.package is not None:
            found.append(Input(text, None, None, False))
            continue
        try:
            info = _described_input(api, ref)
        except (HubError, HfHubHTTPError) as error:
            logger.warning("%s", error)
            found.append(Input(text, None, None, True))
            continue
        sizes = [file.size or 0 for file in info.siblings or [] if not _is_pickle(file.rfilename)]
        found.append(Input(text, sum(sizes), _licence_of(info), bool(info.gated)))
    return tuple(found)


def _is_pickle(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in PICKLES)


def _pull_offline(repo_id: str, revision: str | None, target: Path) -> Pull:
    """Pull from the cache what was pulled before."""
    try:
        patterns = [CARD, *(pattern for kind in ALLOWED for pattern in ALLOWED[kind])]
        snapshot = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        raise HubError(
            f"{repo_id}: is not in the cache, and the Hub is offline (HF_HUB_OFFLINE). Go online "
            "once and pull it."
        ) from None
    names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
    kind = _kind_of_remote(repo_id, dict.fromkeys(names))
    wanted = sorted(name for name in names if is_allowed(kind, name) or name == CARD)
    before = _pulled_before(target, repo_id, snapshot.name, update=False)
    source = (repo_id, revision, snapshot.name)
    return _finish(None, source, kind, snapshot, wanted, target, before)


# -- recipes on the Hub ----------------------------------------------------------------------------


def recipes(*, token: str | None = None, limit: int = 50) -> Iterator[tuple[str, str]]:
    """Yield repository and the time of the last change of the recipes that carry our tag."""
    with explained("recipes"):
        for info in HfApi(token=token).list_models(
            filter=card.TAGS["recipe"][1], sort="last_modified", limit=limit
        ):
            changed = info.last_modified
            yield info.id, changed.strftime("%Y-%m-%d") if changed is not None else ""


# -- output ----------------------------------------------------------------------------------------


def to_json(result: Push | Pull) -> str:
    """Return a result as JSON."""
    return json.dumps(_plain(result), indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, (Push, Pull, Input)):
        return {key: _plain(item) for key, item in vars(value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
