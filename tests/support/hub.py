"""Accounts on the Hub server of the tests, and what the tests do there."""

import json
import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

ALICE, BOB = "hf_alice_write", "hf_bob_write"


def run_cli(*arguments, hub, xet: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, online."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": ALICE,
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        **environment,
    }
    command = [sys.executable, "-m", "optimer_hf", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def change_record(vector: Path, **fields) -> None:
    record = json.loads((vector / "vector.json").read_text())
    (vector / "vector.json").write_text(json.dumps(record | fields))


def publish_files(repo_id: str, files: dict[str, bytes | Path]) -> str:
    """Make a repository of these files and return its pinned reference."""
    api = HfApi(token=ALICE)
    api.create_repo(repo_id, exist_ok=True)
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return f"{repo_id}@{api.create_commit(repo_id, operations, commit_message='x').oid}"
