"""minihub: a small, real Hugging Face Hub-compatible server for loopback tests.

Every repo is a genuine bare git repository (commits, trees, branches, tags, refs/pr/N);
large files are git-LFS pointers whose content lives in a sha256-addressed store, reached either
through git-LFS (basic + multipart) or through the Xet CAS protocol (xorbs + shards).
Written from the client's source (huggingface_hub 2.4.0) and the public Xet/LFS specs.
"""

from .server import Fault, HubServer  # noqa: F401
