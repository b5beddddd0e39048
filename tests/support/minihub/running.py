"""The one server of a test process, started when this is imported."""

import shutil
import tempfile
from pathlib import Path

from .server import HubServer

# no TemporaryDirectory: a forked child that exits would remove it under its parent
_scratch = Path(tempfile.mkdtemp(prefix="hub-"))
HOME = _scratch / "hf"
HUB = HubServer(_scratch / "server").__enter__()


def stop() -> None:
    """Stop the server and remove what it stored."""
    HUB.__exit__()
    shutil.rmtree(_scratch, ignore_errors=True)
