"""Recognise secrets: tokens of known forms, and environment variables with telling names."""

import os
import re

TOKEN = re.compile(
    r"\b(?:"
    r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|hf_jwt_[\w.-]{20,}"  # Hugging Face
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"  # any JSON web token
    r"|sk-(?:[a-z]+-)*(?=[\w-]*\d)(?=[\w-]*[A-Z])[A-Za-z0-9_-]{20,}|sk-(?:proj-)?(?=\w*\d)\w{32,}"
    r"|AIza[\w-]{35}|gsk_[A-Za-z0-9]{20,}|r8_[A-Za-z0-9]{30,}"  # of model providers
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|xox[abeprs]-[\w-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-AgE[\w-]{20,}"
    r")(?![\w-])|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
NAME = re.compile(  # of an environment variable
    r"(^|_)(TOKENS?|(API|ACCESS|SECRET|PRIVATE|AUTH)?_?KEYS?|SECRETS?|PASSW(OR)?D|CREDENTIALS?)($|_)",
    re.IGNORECASE,
)
SHORTEST_SECRET = 8  # characters


def own_secrets() -> dict[str, str]:
    """Return the secrets of this process, by a description that does not reveal them.

    They are the Hub token in use and the environment variables whose names suggest a secret.
    """
    from huggingface_hub import get_token

    token = get_token()
    secrets = {"the token in use": token} if token else {}
    for name, value in os.environ.items():
        is_text = value.isalpha() or value.isdecimal() or value.startswith(("/", "~", "."))
        if NAME.search(name) and len(value) >= SHORTEST_SECRET and not is_text:
            secrets[f"the value of {name}"] = value
    return secrets
