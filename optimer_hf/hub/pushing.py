"""A vector, recipe or merged model to the Hub.

A push is one commit on top of the head it has looked at, so that a reader sees the old state or the
new one, and two people who push at once cannot overwrite each other unseen. Files that have
arrived are not sent again, even after a kill.
"""

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelInfo,
    RepoFile,
    constants,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from optimer_hf.errors import HubError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.reference import Reference
from optimer_hf.hub import card
from optimer_hf.hub.client import (
    TRIES,
    described_input,
    explained,
    licence_of,
    stated,
    tried,
)
from optimer_hf.hub.publication import (
    CARD,
    Kind,
    Publication,
    is_allowed,
    is_legal,
    kind_of,
    local_vectors,
    publication,
)
from optimer_hf.models.layout import weight_digests
from optimer_hf.recipes.record import LOCK, Lock, Recipe
from optimer_hf.report.captions import CAPTIONS, CARD_FIGURES, FIGURES, Captions
from optimer_hf.vectors.record import VectorFile

logger = logging.getLogger(__name__)


MOST_FILES = 250  # of one commit
NOT_YET = "0" * 40  # the commit of a vector that is still to be pushed


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
    if create_pr and (tag is not None or vectors):
        option, reason = (
            ("--tag", "a proposal has no tag yet. Tag it once it is merged.")
            if tag is not None
            else ("--vectors", "a proposal is one repository. Push the vectors first, by name.")
        )
        raise HubError(f"{option} with --create-pr: {reason}")
    asked = _Asked(private, licence, commit_message, create_pr, tag, dry_run)
    with explained(repo_id):
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HubError(f"{repo_id!r}: expected a repository as name/repository.")
        target = _Target(HfApi(token=token), repo_id, revision)
        _warn_of_unbuilt(directory / LOCK)
        if vectors:
            return _push_with_vectors(directory, target, asked)
        found, info = publication(directory), target.info()
        _refuse_other_visibility(target, info, private)
        _metadata(target, info, found, asked)
        return _commit(target, found, asked)


def _warn_of_unbuilt(lock: Path) -> None:
    if lock.exists() and not Lock.read(lock).output:
        logger.warning(
            "%s: records no built model, so nobody can compare theirs with it. Run `optimer build` "
            "before you push.",
            lock,
        )


@dataclass(frozen=True)
class _Asked:
    """What one push asks for."""

    private: bool | None
    licence: str | None
    message: str | None
    create_pr: bool
    tag: str | None
    dry_run: bool


# -- a recipe and its vectors ----------------------------------------------------------------------


def _push_with_vectors(directory: Path, target: "_Target", asked: _Asked) -> Push:
    """Check the recipe and every vector, then send the vectors, then the recipe pinned to them."""
    targets = {
        name: replace(target, repo_id=f"{target.repo_id}-{name}", revision=None)
        for name in _vectors_to_push(directory)
    }
    foreseen = {name: f"{each.repo_id}@{NOT_YET}" for name, each in targets.items()}
    found = publication(directory, foreseen)
    paths = local_vectors(directory)
    parts = {name: publication(paths[name]) for name in targets}
    infos = {name: each.info() for name, each in targets.items()}
    _refuse_other_visibility(target, target.info(), asked.private)
    for name, each in targets.items():
        _refuse_other_visibility(each, infos[name], asked.private)
    if not asked.dry_run:  # vectors become what the account makes of the recipe
        asked = replace(asked, private=target.opened(asked.private).private)
    for name, each in targets.items():
        info = infos[name]
        if info is not None and info.private and not asked.private:
            raise HubError(
                f"{each.repo_id}: is private, so a public recipe could not be built by others. "
                "Push with --private, or make it public."
            )
        _metadata(each, info, parts[name], asked)
    _metadata(target, target.info(), found, asked, foreseen.values())
    asked_part = replace(asked, message=None, tag=None)
    pushes = {name: _commit(each, parts[name], asked_part) for name, each in targets.items()}
    if not asked.dry_run:
        pinned = {name: f"{each.repo_id}@{each.commit}" for name, each in pushes.items()}
        found, foreseen = publication(directory, pinned), {}
    done = _commit(target, found, asked, foreseen.values())
    return replace(done, vectors=tuple(pushes.values()))


def _vectors_to_push(directory: Path) -> Collection[str]:
    """Return the local vectors of a recipe; raise HubError unless they are the locked ones."""
    if not (directory / "recipe.yaml").exists():
        raise HubError(f"{directory}: --vectors belongs to a recipe, and it has no recipe.yaml.")
    paths = local_vectors(directory)
    lock = Lock.read(directory / LOCK)
    for name, path in paths.items():
        where = f"{directory / 'recipe.yaml'}: vectors.{name}"
        if not path.is_dir() or weight_digests(path) != lock.vectors.get(name):
            raise HubError(
                f"{where}: the weights in {path} are not the locked ones. Write the recipe again."
            )
        if not (path / "vector.json").exists():
            raise HubError(
                f"{where}: {path} has no vector.json, which says what it was trained from. "
                "`optimer extract` makes a vector of it."
            )
    return paths


# -- the repository --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """A repository to push to."""

    api: HfApi
    repo_id: str
    revision: str | None

    @property
    def branch(self) -> str:
        return self.revision or constants.DEFAULT_REVISION

    def info(self) -> ModelInfo | None:
        """Return what the Hub says of the branch, or of the default one when it is missing; None:
        there is no repository yet.
        """
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

    def opened(self, private: bool | None) -> ModelInfo:
        """Return what the Hub says, after the repository was made if there was none."""
        info = self.info()
        if info is None:
            tried(partial(self.api.create_repo, self.repo_id, private=private, exist_ok=True))
            info = self.info()
        if info is None:
            raise HubError(f"{self.repo_id}: was made, and is not there. Push again.")
        return info

    def make_branch(self) -> None:
        """Make the branch unless it is there."""
        if self.revision is not None and not self.revision.startswith("refs/"):
            tried(partial(self.api.create_branch, self.repo_id, branch=self.branch, exist_ok=True))

    def listing(self, revision: str) -> dict[str, RepoFile]:
        """Return file name -> entry (size, blob_id, lfs) at a revision."""
        entries = tried(
            lambda: list(self.api.list_repo_tree(self.repo_id, revision=revision, recursive=True))
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def card(self, commit: str | None) -> str | None:
        """Return the card at a commit; None: it has none."""
        try:
            path = tried(lambda: self.api.hf_hub_download(self.repo_id, CARD, revision=commit))
        except RemoteEntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8")


def _refuse_other_content(target: _Target, info: ModelInfo, found: Publication) -> None:
    """Raise HubError when a repository holds something else."""
    names = [file.rfilename for file in info.siblings or []]
    there = kind_of(names)
    if there is not None and there != found.kind:
        raise HubError(
            f"{target.repo_id}: holds a {there}, and this is a {found.kind}. Give another "
            "repository."
        )
    foreign = [name for name in names if is_allowed(found.kind, name) and not is_legal(name)]
    if there is None and foreign:
        raise HubError(
            f"{target.repo_id}: holds files of somebody's model ({', '.join(foreign[:3])} ...), "
            f"which this {found.kind} would replace. Give another repository."
        )


def _refuse_other_visibility(target: _Target, info: ModelInfo | None, private: bool | None) -> None:
    if info is not None and private is not None and private != info.private:
        is_now, option = ("private", "--public") if info.private else ("public", "--private")
        raise HubError(
            f"{target.repo_id}: is {is_now}, and {option} was asked. A push does not change that; "
            "do it in the settings of the repository."
        )


# -- the card --------------------------------------------------------------------------------------


def _metadata(
    target: _Target,
    info: ModelInfo | None,
    found: Publication,
    asked: _Asked,
    foreseen: Collection[str] = (),
) -> tuple[dict[str, Any], str | None]:
    """Return the metadata of the card, and the card that is there.

    Looks at the repository and at every input on the Hub but the `foreseen` ones, which are not
    there yet; raises HubError for what cannot be published there.
    """
    if info is not None:
        _refuse_other_content(target, info, found)
    existing = target.card(info.sha) if info is not None else None
    is_private = bool(info.private if info is not None else asked.private)
    origins = _origins(target.api, found, is_private, foreseen)
    if isinstance(found.record, VectorFile):
        relation = card.RELATIONS[found.record.kind]
        corpus = found.record.corpus
        datasets = card.datasets_of(corpus.name or "") if corpus is not None else []
        origins = replace(origins, datasets=tuple(datasets))
        results = []
    else:
        relation, results = "merge", _evaluations(found.record)
    licence = _licence(target.repo_id, existing, origins, asked.licence)
    return card.metadata_of(
        found.kind, relation, licence, origins, _name(target.repo_id), results
    ), existing


def _origins(
    api: HfApi, found: Publication, is_private: bool, foreseen: Collection[str]
) -> card.Origins:
    """Return what the inputs say of themselves; refuse a private one in a public work."""
    base, *_ = found.inputs
    idle = _idle(found.record)
    licences: dict[str, str | None] = {}
    base_models, datasets, languages = [], [], []
    for text in found.inputs:
        ref = Reference(text)
        if ref.package is not None:
            licences[text] = None
            continue
        is_merged = text != found.lender and text not in idle
        if is_merged:
            base_models.append(ref.repo[0])
        if text in foreseen:
            continue
        there = described_input(api, ref)
        if there.private and not is_private:
            raise HubError(
                f"{text}: is private, so a public {found.kind} could not be built by others. "
                "Push with --private, or make the input public."
            )
        licences[text] = licence_of(there)
        if text != base and is_merged:  # what the base was made of, its own card says
            datasets += stated(there, "datasets")
            languages += stated(there, "language")
    return card.Origins(licences, tuple(base_models), tuple(datasets), tuple(languages))


def _idle(record: VectorFile | Recipe) -> set[str]:
    """Return where vectors of weight 0 are, of which a merge has nothing."""
    if isinstance(record, VectorFile):
        return set()
    vectors = record.vectors.values()
    return {vector.source for vector in vectors if vector.weight == 0}


def _licence(repo_id: str, existing: str | None, origins: card.Origins, asked: str | None) -> str:
    """Return the licence asked for, or that of the card there, or the strictest of the inputs."""
    strictest = card.strictest_licence(origins.licences)
    stays = card.split(existing or "")[0].get("license")
    chosen = asked or stays or strictest
    if not chosen:
        listed = ", ".join(f"{name}: {found or '?'}" for name, found in origins.licences.items())
        raise HubError(
            f"{repo_id}: the licence cannot be told from the inputs ({listed}). Say it: --license "
            "apache-2.0, gemma, ..."
        )
    if strictest is not None and str(chosen).lower() != strictest:
        where = "--license" if asked else "its card"
        logger.warning(
            "%s: %s says %s, but its inputs are under %s", repo_id, where, chosen, strictest
        )
    return str(chosen)


def _name(repo_id: str) -> str:
    """Return the name of a repository without its owner."""
    return repo_id.rpartition("/")[2]


def _evaluations(recipe: Recipe) -> list[EvalResult]:
    sealed = recipe.scores.get("sealed")
    if sealed is None:
        return []
    return card.evaluations(sealed.terms, recipe.metrics, sealed.higher_is_better)


def _card(
    repo_id: str, found: Publication, metadata: Mapping[str, Any], existing: str | None
) -> str:
    record = found.record
    configs = {
        "Merge config for mergekit with optimer-hf installed": found.text("optimer.yml").strip(),
        "Merge config for mergekit alone": found.text("mergekit_config.yml").strip(),
    }
    facts: dict[str, Any] = {
        "kind": found.kind,
        "title": _name(repo_id),
        "repo_id": repo_id,
        "recipe_text": found.text("recipe.yaml").strip(),
        "merge_configs": {title: text for title, text in configs.items() if text},
        "figures": _figures(found),
    }
    if isinstance(record, VectorFile):
        facts["vector"] = record
    else:
        facts["recipe"] = record
        results = found.text("results.md")
        units = card.units_of(record)
        facts |= card.recipe_facts(record.weights, record.ledger, results, units)
    return card.render(metadata, facts, existing)


def _figures(found: Publication) -> list[card.Picture]:
    """Return the figures of a publication for its card."""
    if CAPTIONS not in found.files:
        return []
    texts = Captions.model_validate_json(found.text(CAPTIONS)).captions
    return [
        card.Picture(f"{FIGURES}/{name}.png", texts[name].title, texts[name].conclusion)
        for name in CARD_FIGURES
        if name in texts and f"{FIGURES}/{name}.png" in found.files
    ]


# -- the commit ------------------------------------------------------------------------------------


def _commit(
    target: _Target, found: Publication, asked: _Asked, foreseen: Collection[str] = ()
) -> Push:
    """Send what the branch lacks in one commit on its head; look again when the head has moved."""
    for _ in range(TRIES):
        info = target.info() if asked.dry_run else target.opened(asked.private)
        text = _card(target.repo_id, found, *_metadata(target, info, found, asked, foreseen))
        files = {**found.files, CARD: text.encode()}
        there = target.listing(info.sha) if info is not None and info.sha is not None else {}
        done, operations = _changes(target.repo_id, found.kind, files, there)
        done = replace(done, card=text)
        if asked.dry_run or info is None:
            return done
        if not asked.create_pr:
            target.make_branch()
        _refuse_moved_tag(target, asked.tag, bool(operations), info.sha)
        if not operations:
            return _tagged(target, asked.tag, replace(done, commit=info.sha))
        if asked.create_pr:
            proposed = _proposed(target, found.kind, files, done)
            if proposed is not None:
                return proposed
        message = asked.message or f"Upload {found.kind} {found.record.name} (optimer-hf)"
        sent = _send(target, operations, message, info.sha, asked.create_pr)
        if sent is not None:
            done = replace(done, commit=sent.oid, pull_request=sent.pr_url)
            return _tagged(target, asked.tag, done)
    raise HubError(
        f"{target.repo_id}: {target.branch} was changed by others {TRIES} times during this push. "
        "Nothing is lost; push again."
    )


def _send(
    target: _Target, operations: list[Any], message: str, parent: str | None, create_pr: bool
) -> CommitInfo | None:
    """Return the commit; None: somebody else was faster."""
    request = partial(
        target.api.create_commit,
        target.repo_id,
        operations,
        commit_message=message,
        revision=target.branch,
        parent_commit=parent,
        create_pr=create_pr or None,
    )
    try:
        return request() if create_pr else tried(request)  # a second proposal would stay
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        logger.warning(
            "%s: somebody else pushed to %s meanwhile; looking again", target.repo_id, target.branch
        )
        return None


def _changes(
    repo_id: str, kind: Kind, files: Mapping[str, Path | bytes], there: Mapping[str, RepoFile]
) -> tuple[Push, list[CommitOperationAdd | CommitOperationDelete]]:
    """Return what differs from the head of a branch, and the operations that make it equal."""
    changed = {name: data for name, data in files.items() if not _is_same(data, there.get(name))}
    stale = [
        name
        for name in there
        if name not in files and is_allowed(kind, name) and not is_legal(name)
    ]
    n_changes = len(changed) + len(stale)
    if n_changes > MOST_FILES:
        raise HubError(
            f"{repo_id}: {n_changes} files to change, more than the {MOST_FILES} of one commit. "
            "Write larger shards (--max-shard-size)."
        )
    additions = [CommitOperationAdd(name, data) for name, data in changed.items()]
    deletions = [CommitOperationDelete(name) for name in stale]
    done = Push(
        repo_id,
        kind,
        {name: _n_bytes(data) for name, data in changed.items()},
        tuple(name for name in files if name not in changed),
        tuple(stale),
        card="",
    )
    return done, [*additions, *deletions]


def _proposed(
    target: _Target, kind: Kind, files: Mapping[str, Path | bytes], done: Push
) -> Push | None:
    """Return the open pull request that holds these files already, if there is one."""
    proposals = tried(
        lambda: list(
            target.api.get_repo_discussions(
                target.repo_id, discussion_type="pull_request", discussion_status="open"
            )
        )
    )
    for proposal in proposals:
        if proposal.git_reference is None:
            continue
        there = target.listing(proposal.git_reference)
        if not _changes(target.repo_id, kind, files, there)[1]:
            head = replace(target, revision=proposal.git_reference).info()
            nothing = replace(done, sent={}, deleted=(), unchanged=tuple(files))
            commit = head.sha if head is not None else None
            return replace(nothing, commit=commit, pull_request=proposal.url)
    return None


def _n_bytes(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def _is_same(data: Path | bytes, entry: RepoFile | None) -> bool:
    if entry is None or entry.size != _n_bytes(data):
        return False
    if entry.lfs is not None:
        found = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else sha256_file(data)
        return bool(found == entry.lfs.sha256)
    return bool(git_hash(data if isinstance(data, bytes) else data.read_bytes()) == entry.blob_id)


def _refuse_moved_tag(target: _Target, tag: str | None, changes: bool, head: str | None) -> None:
    if tag is None:
        return
    refs = tried(partial(target.api.list_repo_refs, target.repo_id))
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
