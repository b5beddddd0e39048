"""Send requests to a Hub: try again after a passing fault, and say what to do about an error."""

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
TRIES = 4  # for each request
LONGEST_WAIT = 60.0  # seconds between two tries
TRANSIENT = (408, 500, 502, 503, 504)
UNREACHABLE = (
    "the Hub cannot be reached. Check the network and run the same command again; files that have "
    "arrived are kept."
)


def retry(request: Callable[[], ResultT]) -> ResultT:
    """Return the answer to a request. A request that fails for a passing reason is sent again.

    Raises HubError for an answer that no Hub would give.
    """
    for attempt in range(TRIES):
        try:
            with checking_answers():
                return request()
        except HfHubHTTPError as error:
            wait = _seconds_to_wait(error, attempt)
            if wait is None or attempt == TRIES - 1:
                raise
        except OfflineModeIsEnabled:
            raise
        except (TransportError, LocalEntryNotFoundError) as error:
            # the client raises the second for every fault if the cache has no copy
            cause = error.__cause__
            wait = (
                _seconds_to_wait(cause, attempt)
                if isinstance(cause, HfHubHTTPError)
                else 2.0**attempt
            )
            if wait is None or attempt == TRIES - 1:
                raise
        logger.warning("the Hub does not answer; trying again in %.0f s", wait)
        time.sleep(wait)
    raise AssertionError("unreachable")


def _seconds_to_wait(error: HfHubHTTPError, attempt: int) -> float | None:
    """Return the seconds until a request may be sent again, or None if that would not help."""
    status = error.response.status_code
    if status in TRANSIENT:
        return min(float(_seconds_left(error) or 2.0**attempt), LONGEST_WAIT)
    if status == 429 and not _is_commit_quota(error):
        wait = float(_seconds_left(error) or 2.0**attempt)
        return wait if wait <= LONGEST_WAIT else None
    return None


def _seconds_left(error: HfHubHTTPError) -> int | None:
    """Return the seconds in the header Retry-After, or in `t` of the header RateLimit."""
    headers = error.response.headers
    text = headers.get("retry-after") or headers.get("ratelimit", "").rpartition("t=")[2]
    return int(text) if text.strip().isdecimal() else None


def _is_commit_quota(error: HfHubHTTPError) -> bool:
    return "rate limit for repository commits" in str(error)


@contextmanager
def explaining_errors(repo_id: str, *, proposes: bool = False) -> Iterator[None]:
    """Turn the errors of the client into a HubError that says what to do. `proposes`: the request
    is for a pull request.
    """
    try:
        yield
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r}: not a valid repository name. {str(error).splitlines()[0]}"
        ) from None
    except OfflineModeIsEnabled:
        raise HubError(f"{repo_id}: the Hub is offline (HF_HUB_OFFLINE). Unset it.") from None
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise HubError(f"{repo_id}: {_remedy(error.__cause__, proposes)}") from None
        raise HubError(f"{repo_id}: {UNREACHABLE}") from None
    except HfHubHTTPError as error:
        raise HubError(f"{repo_id}: {_remedy(error, proposes)}") from None
    except (HTTPError, ConnectionError) as error:
        raise HubError(f"{repo_id}: {UNREACHABLE} ({type(error).__name__})") from None


def _remedy(error: HfHubHTTPError, proposes: bool) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"is gated ({status}). Ask for access on its page, then `hf auth login`."
    if status == 401:
        return "not found, or the token is wrong or missing (401). Log in with `hf auth login`."
    if status == 403:
        proposal = "" if proposes else ", or propose the change with --create-pr"
        return (
            f"the token may not do this (403: {error.server_message}). Use a token with write "
            f"access to the namespace{proposal}."
        )
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision (404). Check the branch, tag or commit."
    if status == 404:
        return "not found (404). Check the name; a private one needs `hf auth login`."
    if status == 429:
        seconds = _seconds_left(error)
        when = f"in {seconds} s" if seconds is not None else "in about an hour"
        what = "commits to a repository" if _is_commit_quota(error) else "requests"
        return (
            f"the Hub's quota of {what} is used up (429). What was sent is kept; run the same "
            f"command again {when}."
        )
    return (
        f"the Hub answered {status} ({error.server_message or 'no reason given'}). Files that "
        "have arrived are kept: run the same command again."
    )


def describe_repo(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo:
    """Return what the Hub says about a repository, with the sizes of its files. A repository that
    was renamed is found under its new name, with a warning.
    """
    info = retry(partial(api.model_info, repo_id, revision=revision, files_metadata=True))
    if info.id == repo_id:
        return info
    logger.warning("%s is now called %s; change the name where you use it", repo_id, info.id)
    return retry(partial(api.model_info, info.id, revision=revision, files_metadata=True))


def describe_input(api: HfApi, ref: Reference) -> ModelInfo:
    """Return what the Hub says about an input. Raises HubError if this token cannot see it."""
    try:
        return describe_repo(api, *ref.repo)
    except GatedRepoError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise HubError(
            f"{ref.text}: is not on the Hub, or you may not see it "
            f"({error.response.status_code}). Check the name and commit, and log in with `hf auth "
            "login`."
        ) from None


def values_in_card(info: ModelInfo, field: str) -> list[str]:
    """Return the values of a field in the metadata of a card: none, one or several."""
    value = info.card_data.to_dict().get(field) if info.card_data is not None else None
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def licence_of(info: ModelInfo) -> str | None:
    """Return the licence in the card of a repository, or None."""
    return next(iter(values_in_card(info, "license")), None)
