"""The storage of the sandbox's Hub: repositories, commits and contents in a directory.

A commit is a mapping of paths to content hashes; there is no git. A repository is a JSON file,

    {"private": bool, "refs": {branch: commit}, "tags": {tag: commit},
     "commits": {id: {"parent", "title", "user", "date", "files": {path: {"size", "sha256", "oid", "large"}}}}}

and contents lie in files named by their SHA-256.
"""

import hashlib
import json
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.sandbox.hub_xet import XetStore, write_whole

LARGE_TYPES = "parquet arrow bin safetensors pt pth h5 onnx npy npz zip gz tar wav flac mp3 ogg opus msgpack model pkl"
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_TYPES.split())


@dataclass
class User:
    """An account; its token may read, or with the role "write" also write, what is the account's or its orgs'."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def is_in(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git stores in the place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubStore:
    """Everything that the Hub remembers."""

    def __init__(self, root: Path):
        self.root = root
        self.lock = threading.RLock()  # around every change of a repository
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.xet = XetStore(root)

    def repo_path(self, kind: str, repo_id: str) -> Path:
        return self.root / "repos" / kind / f"{repo_id}.json"

    def load(self, kind: str, repo_id: str) -> dict | None:
        path = self.repo_path(kind, repo_id)
        return json.loads(path.read_bytes()) if path.is_file() else None

    def save(self, kind: str, repo_id: str, repo: dict) -> None:
        path = self.repo_path(kind, repo_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(repo).encode())

    def list_repos(self, kind: str) -> list[tuple[str, dict]]:
        paths = sorted(self.repo_path(kind, "x").parent.glob("*/*.json"))
        ids = [f"{path.parent.name}/{path.stem}" for path in paths]
        return [(repo_id, repo) for repo_id in ids if (repo := self.load(kind, repo_id))]

    def add_commit(self, repo: dict, branch: str, title: str, files: dict, user: str) -> str:
        """Make these files the branch's content, and return the id of the commit."""
        commit = {
            "parent": repo["refs"].get(branch),
            "title": title,
            "user": user,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
            "files": files,
        }
        commit_id = hashlib.sha1(json.dumps(commit).encode() + secrets.token_bytes(8)).hexdigest()
        repo["commits"][commit_id] = commit
        repo["refs"][branch] = commit_id
        return commit_id

    def put_blob(self, content: bytes) -> str:
        """Keep a content; its SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not (self.blobs / sha256).exists():
            write_whole(self.blobs / sha256, content)
        return sha256

    def small_file(self, content: bytes) -> dict:
        return {"size": len(content), "sha256": self.put_blob(content), "oid": git_oid(content), "large": False}

    def large_file(self, sha256: str) -> dict:
        """The entry of a file that was uploaded before; FileNotFoundError where it was not."""
        size = (self.blobs / sha256).stat().st_size
        return {"size": size, "sha256": sha256, "oid": git_oid(lfs_pointer(sha256, size)), "large": True}
