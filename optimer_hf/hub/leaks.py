"""Refuse to publish a file that contains a token, a path on this machine or its name.

Of weights, only the header is read. A vocabulary may contain any text, so only tokens and secrets
are looked for there.
"""

import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimer_hf.errors import HubError
from optimer_hf.files.paths import FREE_TEXT
from optimer_hf.files.reading import parse_yaml
from optimer_hf.files.secret import SHORTEST_SECRET, TOKEN, own_secrets
from optimer_hf.models.layout import role_of

STRUCTURED = (".json", ".jsonl", ".yaml", ".yml", ".safetensors")
SECRET_FIELD = re.compile(  # the value may look harmless: a W&B key is 40 hex digits, like a commit
    r"(^|[._-])(api_?key|(access|auth|hub|secret)_?(token|key)|secret|password|passwd)$",
    re.IGNORECASE,
)
LOCAL_PATH = re.compile(r"(?<![\w/.:-])(/[\w.-]+(?:/[\w.-]+)+)")  # within a text
PATH_VALUE = re.compile(r"(file:/|~[\w.-]*/|/[^\s/]+/|[A-Za-z]:\\)\S.*")  # a whole value


def refuse_private(where: Path, content: Path | bytes) -> None:
    """Raise HubError if a file contains a token, a path on this machine or the name of the machine.

    The message calls the file `where`.
    """
    if where.suffix == ".png":
        return
    text, secrets = _text(content), own_secrets()
    lines = text.split("\n")  # splitlines also splits at marks that JSON keeps within a line
    names = (where.name, "/".join(where.parts[-2:]))  # a template may lie in a folder
    is_vocabulary = any(role_of(name) in ("vocabulary", "tokens", "template") for name in names)
    for number, line in enumerate(lines, start=1):
        leaks = _tokens(line, secrets) if is_vocabulary else _secrets(line, secrets)
        for what, secret in leaks:
            raise HubError(
                f"{where}: line {number}: contains {what} ({secret}), which must not be published. "
                "Replace it and push again."
            )
    if is_vocabulary or where.suffix not in STRUCTURED:
        return
    for field, value in _values(where.suffix, lines):
        if SECRET_FIELD.search(field) and len(value) >= SHORTEST_SECRET:
            raise HubError(
                f"{where}: {field}: contains a secret, judging by its name ({value[:3]}...), which "
                "must not be published. Remove it and push again."
            )
        if PATH_VALUE.fullmatch(value):
            raise HubError(
                f"{where}: {field}: contains a path ({value}), which means nothing on another "
                "machine and is not published. Replace it and push again."
            )


def _text(content: Path | bytes) -> str:
    """Return the text in a file. For weights it is the metadata in their header."""
    if isinstance(content, Path) and content.suffix == ".safetensors":
        with open(content, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return json.dumps(header.get("__metadata__", {}))
    data = content if isinstance(content, bytes) else content.read_bytes()
    return data.decode("utf-8", errors="replace")


def _tokens(line: str, secrets: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    token = TOKEN.search(line)
    if token is not None:
        yield "a token", f"{token[0][:6]}..."
    for name, value in secrets.items():
        if value in line:
            yield name, f"{value[:3]}..."


def _secrets(line: str, secrets: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from _tokens(line, secrets)
    for candidate in LOCAL_PATH.findall(line):
        if Path(candidate).exists() or Path(candidate).is_relative_to(Path.home()):
            yield "a path on this machine", candidate
    host = socket.gethostname()
    if len(host) > 5 and host != "localhost" and re.search(rf"\b{re.escape(host)}\b", line):
        yield "the name of this machine", host


def _values(suffix: str, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield field and value of every string in a structured file, except free text."""
    if suffix == ".jsonl":
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield from _strings(json.loads(line), f"line {number}")
    elif any(map(str.strip, lines)):
        text = "\n".join(lines)
        is_json = suffix in (".json", ".safetensors")
        yield from _strings(json.loads(text) if is_json else parse_yaml(text, "file"), "")


def _strings(value: Any, field: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in FREE_TEXT:
                yield from _strings(item, f"{field}.{key}".strip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{field}.{index}".strip("."))
