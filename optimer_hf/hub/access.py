"""Whether the account that is signed in may write to a namespace, asked before any work is done."""

from collections.abc import Iterator, Mapping
from typing import Any

from httpx2 import TransportError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from optimer_hf.errors import HubError
from optimer_hf.hub.client import retry

NO_TOKEN = "no token, or a wrong one"
NOT_SAID = "the Hub does not say what you may write to"


def check_access(api: HfApi, repo_id: str, *, proposes: bool, exists: bool) -> str | None:
    """Return why nobody knows whether the account may write to a repository: NO_TOKEN, or what the
    Hub answered; None if it may, as far as the Hub says. `proposes`: a pull request is enough, if
    the repository `exists`.

    Raises HubError if the token is for other namespaces, or for reading only.
    """
    try:
        account = retry(api.whoami)
    except LocalTokenNotFoundError:
        return NO_TOKEN
    except HfHubHTTPError as error:  # 429: it answers few of these questions
        status = error.response.status_code
        return NO_TOKEN if status == 401 else f"{NOT_SAID}: {status}"
    except TransportError:
        return NOT_SAID
    who, namespace = str(account.get("name")), repo_id.partition("/")[0]
    if _role_of_token(account) == "read":
        raise HubError(
            f"{repo_id}: the token of {who} is for reading only. Make one with write access on "
            f"{api.endpoint}/settings/tokens, then `hf auth login`."
        )
    own = [who, *_organisations(account)]
    if (proposes and exists) or namespace.casefold() in {name.casefold() for name in own}:
        return None
    limit = f"{who} may not write to {namespace!r}, only to {', '.join(own)}"
    if proposes:
        raise HubError(
            f"{repo_id}: there is no such repository to propose a change to, or {who} may not see "
            f"it, and {limit}. Check the name, or log in as somebody else (`hf auth login`)."
        )
    proposal = ", or propose a change to what is there with --create-pr" * exists
    raise HubError(
        f"{repo_id}: {limit}. Push there, or log in as somebody else (`hf auth login`){proposal}."
    )


def _role_of_token(account: Mapping[str, Any]) -> str | None:
    auth = account.get("auth")
    token = auth.get("accessToken") if isinstance(auth, Mapping) else None
    return token.get("role") if isinstance(token, Mapping) else None


def _organisations(account: Mapping[str, Any]) -> Iterator[str]:
    """Yield the organisations in which an account may do more than read, if only in a resource
    group.
    """
    for each in account.get("orgs") or ():
        if not isinstance(each, Mapping):
            continue
        groups = [x for x in each.get("resourceGroups") or () if isinstance(x, Mapping)]
        roles = [each.get("roleInOrg"), *(group.get("role") for group in groups)]
        if any(role != "read" for role in roles):
            yield str(each.get("name"))
