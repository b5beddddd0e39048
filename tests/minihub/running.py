"""The one server of the test suite, started when this is imported."""

import tempfile
from pathlib import Path

from .server import HubServer

_scratch = tempfile.TemporaryDirectory(prefix="hub-")
HOME = Path(_scratch.name) / "hf"
HUB = HubServer(Path(_scratch.name) / "server").__enter__()


def stop() -> None:
    """Stop the server and remove what it stored."""
    HUB.__exit__()
    _scratch.cleanup()
