"""Requests to a Hub: those that a passing fault broke are sent again, and what is refused says what
to do.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from httpx2 import HTTPError, TransportError
from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from optimer_hf.errors import HubError
from optimer_hf.files.reference import Reference
from optimer_hf.models.hub_answers import checking_answers

logger = logging.getLogger(__name__)


ResultT = TypeVar("ResultT")
TRIES = 4  # of a request that a passing fault of the Hub broke
LONGEST_WAIT = 60.0  # seconds between two tries
TRANSIENT = (408, 500, 502, 503, 504)
UNREACHABLE = (
    "the Hub cannot be reached. Files that arrived stay there: run the same command again."
)


def tried(request: Callable[[], ResultT]) -> ResultT:
    """Return the answer of a request; retry transient faults.

    Raises HubError for an answer that no Hub gives.
    """
    for attempt in range(TRIES):
        try:
            with checking_answers():
                return request()
        except HfHubHTTPError as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == TRIES - 1:
                raise
        except OfflineModeIsEnabled:
            raise
        except (TransportError, LocalEntryNotFoundError) as error:
            # the second is what the client makes of any fault when the cache has no copy
            cause = error.__cause__
            wait = _wait(cause, attempt) if isinstance(cause, HfHubHTTPError) else 2.0**attempt
            if wait is None or attempt == TRIES - 1:
                raise
        logger.warning("the Hub does not answer; trying again in %.0f s", wait)
        time.sleep(wait)
    raise AssertionError("unreachable")


def _wait(error: HfHubHTTPError, attempt: int) -> float | None:
    """Return the seconds until a request may be sent again; None: it makes no sense now."""
    status = error.response.status_code
    if status in TRANSIENT:
        return min(float(_seconds_left(error) or 2.0**attempt), LONGEST_WAIT)
    if status == 429 and not _is_commit_quota(error):
        wait = float(_seconds_left(error) or 2.0**attempt)
        return wait if wait <= LONGEST_WAIT else None
    return None


def _seconds_left(error: HfHubHTTPError) -> int | None:
    """Return what Retry-After, or `t` of the RateLimit header, says."""
    headers = error.response.headers
    text = headers.get("retry-after") or headers.get("ratelimit", "").rpartition("t=")[2]
    return int(text) if text.strip().isdecimal() else None


def _is_commit_quota(error: HfHubHTTPError) -> bool:
    return "rate limit for repository commits" in str(error)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into a HubError that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r}: no name of a repository. {str(error).splitlines()[0]}"
        ) from None
    except OfflineModeIsEnabled:
        raise HubError(f"{repo_id}: the Hub is offline (HF_HUB_OFFLINE). Unset it.") from None
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise HubError(f"{repo_id}: {_advice(error.__cause__)}") from None
        raise HubError(f"{repo_id}: {UNREACHABLE}") from None
    except HfHubHTTPError as error:
        raise HubError(f"{repo_id}: {_advice(error)}") from None
    except (HTTPError, ConnectionError) as error:
        raise HubError(f"{repo_id}: {UNREACHABLE} ({type(error).__name__})") from None


def _advice(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"is gated ({status}). Ask for access on its page, then `hf auth login`."
    if status == 401:
        return "not found, or the token is wrong or missing (401). Log in with `hf auth login`."
    if status == 403:
        return (
            f"the token may not do this (403: {error.server_message}). Take a token with write "
            "access to the namespace, or propose the change with --create-pr."
        )
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision (404). Check the branch, tag or commit."
    if status == 404:
        return "not found (404). Check the name; a private one needs `hf auth login`."
    if status == 429:
        seconds = _seconds_left(error)
        when = f"in {seconds} s" if seconds is not None else "in about an hour"
        what = "commits of a repository" if _is_commit_quota(error) else "requests"
        return (
            f"the Hub's quota of {what} is used up (429). What was sent stays there; run the same "
            f"command again {when}."
        )
    return (
        f"the Hub answered {status} ({error.server_message or 'no reason given'}). Files that "
        "arrived stay there: run the same command again."
    )


def described(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo:
    """Return what the Hub says of a repository, under its name of today, with sizes of files."""
    info = tried(partial(api.model_info, repo_id, revision=revision, files_metadata=True))
    if info.id == repo_id:
        return info
    logger.warning("%s is called %s now; change the name where you use it", repo_id, info.id)
    return tried(partial(api.model_info, info.id, revision=revision, files_metadata=True))


def described_input(api: HfApi, ref: Reference) -> ModelInfo:
    """Return what the Hub says of an input; raise HubError when it is not there for this token."""
    try:
        return described(api, *ref.repo)
    except GatedRepoError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise HubError(
            f"{ref.text}: is not on the Hub, or not for you ({error.response.status_code}). Check "
            "the name and commit, and log in with `hf auth login`."
        ) from None


def stated(info: ModelInfo, field: str) -> list[str]:
    """Return what the card of a repository states in a field: nothing, one text or several."""
    value = info.card_data.to_dict().get(field) if info.card_data is not None else None
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def licence_of(info: ModelInfo) -> str | None:
    """Return the licence that the card of a repository names."""
    return next(iter(stated(info, "license")), None)
