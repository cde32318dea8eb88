"""What the sandbox's Hub answers: the routes that huggingface_hub, datasets, transformers and `hf` use.

What the clients hold the real Hub to, and so this one:

- An error's kind is in the header `X-Error-Code` (RepoNotFound, RevisionNotFound, EntryNotFound), its text in
  `X-Error-Message`. A repository that one may not see answers as one that does not exist: 404, and 401 without a token.
- A push asks `preupload` which files are large ("lfs") and what is there already, uploads those by Xet or LFS, and
  posts all in one `commit`: lines of JSON, small files inside in base64, large ones by their SHA-256. A commit whose
  `parentCommit` is not the branch's head is refused with 412.
- A large file's `resolve` redirects to another origin, and names its hash in `X-Linked-Etag`, its size in
  `X-Linked-Size`, and where Xet has it `X-Xet-Hash` and a `Link` to a token.
- Metadata of a README.md that breaks the Hub's rules is refused, by `validate-yaml` and by `commit`.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs

from tests.sandbox.hub_card import check_card
from tests.sandbox.hub_http import Connection, HubError, route
from tests.sandbox.hub_store import GITATTRIBUTES, User, lfs_pointer
from tests.sandbox.hub_xet import read_shard

LARGE_SIZE = 10 * 1024 * 1024  # bytes from which a file is large whatever its name
PAGE = 1000  # entries in one answer of a listing

ID = r"(?P<repo_id>[\w.-]+(/[\w.-]+)?)"
API = rf"/api/(?P<kind>model|dataset|space)s/{ID}"
WEB = rf"/((?P<kind>dataset|space)s/)?{ID}"
SHA256 = "[0-9a-f]{64}"


class Handler(Connection):
    """One connection of a client; `user` is the account that the request came from, or None."""

    def dispatch(self) -> None:
        self.user = self.authenticate()
        super().dispatch()

    # Who may do what

    def authenticate(self) -> User | None:
        """The user whose token was sent; None without one, and where the Hub itself asks for none."""
        header = self.headers.get("Authorization")
        if not header or self.url.path.startswith(("/cas/", "/lfs/", "/cdn/")):
            return None
        user = self.server.tokens.get(header.removeprefix("Bearer "))
        if not user:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def need_user(self) -> User:
        if not self.user:
            # Clients guess RepoNotFound from a bare 401 only at https:// addresses, so it is said here.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        return self.user

    def need_write(self, repo_id: str) -> None:
        user = self.need_user()
        if user.role != "write" or not user.is_in(repo_id.split("/")[0]):
            raise HubError(403, f"You don't have the rights to write to {repo_id}")

    def need_xet_token(self, *rights: str) -> None:
        if self.headers.get("Authorization") not in [f"Bearer xet-{right}" for right in rights]:
            raise HubError(401, "no Xet token for this")

    def may_see(self, repo_id: str, repo: dict) -> bool:
        return not repo["private"] or bool(self.user and self.user.is_in(repo_id.split("/")[0]))

    def find_repo(self, kind: str, repo_id: str, write: bool = False) -> dict:
        repo = self.store.load(kind, repo_id)
        if repo is None or not self.may_see(repo_id, repo):
            self.need_user()
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self.need_write(repo_id)
        return repo

    def find_commit(self, repo: dict, revision: str) -> tuple[str, dict]:
        """The id and the files of a branch, a tag or a commit."""
        name = revision.removeprefix("refs/heads/")
        commit_id = repo["refs"].get(name) or repo["tags"].get(name) or name
        if commit_id not in repo["commits"]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit_id, repo["commits"][commit_id]["files"]

    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self.need_user()
        self.reply(
            {
                "type": "user",
                "id": user.name,
                "name": user.name,
                "fullname": user.name,
                "isPro": False,
                "canPay": False,
                "orgs": [{"type": "org", "name": org, "roleInOrg": user.role} for org in user.orgs],
                "auth": {"type": "access_token", "accessToken": {"displayName": "sandbox", "role": user.role}},
            }
        )

    def named_repo(self, request: dict) -> tuple[str, str]:
        """Kind and id of the repository that a request to create or to delete one names."""
        namespace = request.get("organization") or self.need_user().name
        return request.get("type") or "model", f"{namespace}/{request['name']}"

    def repo_url(self, kind: str, repo_id: str) -> str:
        return f"{self.server.url}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"

    @route("POST", "/api/repos/create")
    def create_repo(self) -> None:
        request = self.read_json()
        kind, repo_id = self.named_repo(request)
        self.need_write(repo_id)
        url = self.repo_url(kind, repo_id)
        with self.store.lock:
            if self.store.load(kind, repo_id):
                raise HubError(409, f"You already created this {kind} repo", url=url)
            repo = {"private": request.get("visibility") == "private", "refs": {}, "tags": {}, "commits": {}}
            files = {".gitattributes": self.store.small_file(GITATTRIBUTES.encode())}
            self.store.add_commit(repo, "main", "initial commit", files, self.user.name)
            self.store.save(kind, repo_id, repo)
        self.reply({"url": url, "name": repo_id, "id": repo_id})

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self) -> None:
        kind, repo_id = self.named_repo(self.read_json())
        with self.store.lock:
            self.find_repo(kind, repo_id, write=True)
            self.store.repo_path(kind, repo_id).unlink()
        self.reply({})

    @route("PUT", f"{API}/settings")
    def change_settings(self, kind: str, repo_id: str) -> None:
        with self.store.lock:
            repo = self.find_repo(kind, repo_id, write=True)
            repo["private"] = self.read_json().get("visibility") == "private"
            self.store.save(kind, repo_id, repo)
        self.reply({"private": repo["private"]})

    @route("GET", f"{API}/auth-check(?P<write>/write)?")
    def check_rights(self, kind: str, repo_id: str, write: str = "") -> None:
        self.find_repo(kind, repo_id, write=bool(write))
        self.reply({})

    @route("GET", "/api/(?P<kind>model|dataset|space)s")
    def list_repos(self, kind: str) -> None:
        found = [
            self.describe(repo_id, repo, *self.find_commit(repo, "main"))
            for repo_id, repo in self.store.list_repos(kind)
            if self.may_see(repo_id, repo)
            and self.query.get("author", repo_id.split("/")[0]) == repo_id.split("/")[0]
            and self.query.get("search", "").lower() in repo_id.lower()
        ]
        self.reply(found[: int(self.query.get("limit", len(found)))])

    @route("GET", f"{API}(/revision/(?P<revision>[^/]+))?")
    def repo_info(self, kind: str, repo_id: str, revision: str = "main") -> None:
        repo = self.find_repo(kind, repo_id)
        self.reply(self.describe(repo_id, repo, *self.find_commit(repo, revision)))

    def describe(self, repo_id: str, repo: dict, commit_id: str, files: dict) -> dict:
        """What the Hub tells of a repository; with ?blobs=true also of its files' sizes and hashes."""
        siblings = []
        for path, file in sorted(files.items()):
            sibling = {"rfilename": path}
            if self.query.get("blobs", "").lower() in ("true", "1"):
                sibling |= {"size": file["size"], "blobId": file["oid"], **describe_lfs(file, "sha256")}
            siblings.append(sibling)
        date = repo["commits"][commit_id]["date"]
        return {
            "_id": repo_id,
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit_id,
            "createdAt": date,
            "lastModified": date,
            "private": repo["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }

    # What is in them

    def describe_file(self, path: str, file: dict) -> dict:
        entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"], **describe_lfs(file, "oid")}
        if file["large"] and (xet_hash := self.store.xet.hash_of(file["sha256"])):
            entry["xetHash"] = xet_hash
        return entry

    @route("GET", f"{API}/tree/(?P<revision>[^/]+)(/(?P<directory>.+))?")
    def list_tree(self, kind: str, repo_id: str, revision: str, directory: str = "") -> None:
        _, files = self.find_commit(self.find_repo(kind, repo_id), revision)
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        prefix = f"{directory.strip('/')}/" if directory else ""
        entries = {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            *parents, _ = path.removeprefix(prefix).split("/")
            for depth in range(len(parents) if recursive else min(len(parents), 1)):
                parent = prefix + "/".join(parents[: depth + 1])
                entries.setdefault(parent, describe_directory(parent))
            if recursive or not parents:
                entries[path] = self.describe_file(path, file)
        if directory and not entries:
            raise HubError(404, f"{directory} does not exist on {revision}", "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        headers = {}
        if len(entries) > start + PAGE:
            following = re.sub(r"[?&]cursor=\d+", "", self.path)
            following += f"{'&' if '?' in following else '?'}cursor={start + PAGE}"
            headers["Link"] = f'<{self.server.url}{following}>; rel="next"'
        self.reply(list(entries.values())[start : start + PAGE], headers=headers)

    @route("POST", f"{API}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        _, files = self.find_commit(self.find_repo(kind, repo_id), revision)
        body = self.body.read()
        paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        entries = []
        for path in paths:
            if path in files:
                entries.append(self.describe_file(path, files[path]))
            elif any(file.startswith(f"{path.strip('/')}/") for file in files):
                entries.append(describe_directory(path))
        self.reply(entries)

    @route("GET|HEAD", f"{WEB}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo_id: str, revision: str, path: str, kind: str = "model") -> None:
        commit_id, files = self.find_commit(self.find_repo(kind, repo_id), revision)
        headers = {"X-Repo-Commit": commit_id}
        if path not in files:
            raise HubError(404, f"Entry not found: {path}", "EntryNotFound")
        file = files[path]
        if not file["large"]:
            return self.reply_file(self.store.blobs / file["sha256"], {**headers, "ETag": f'"{file["oid"]}"'})
        if xet_hash := self.store.xet.hash_of(file["sha256"]):
            headers["X-Xet-Hash"] = xet_hash
            token_url = f"{self.server.url}/api/{kind}s/{repo_id}/xet-read-token/{commit_id}"
            headers["Link"] = f'<{token_url}>; rel="xet-auth"'
        headers |= {"X-Linked-Etag": f'"{file["sha256"]}"', "X-Linked-Size": file["size"]}
        self.reply(status=302, headers={**headers, "Location": f"{self.server.cdn}/cdn/{file['sha256']}"})

    @route("GET|HEAD", f"/cdn/(?P<sha256>{SHA256})")
    def download(self, sha256: str) -> None:
        self.reply_file(self.store.blobs / sha256, {"ETag": f'"{sha256}"'})

    # How it got there

    @route("GET", f"{API}/refs")
    def list_refs(self, kind: str, repo_id: str) -> None:
        repo = self.find_repo(kind, repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in repo["refs"].items()
        ]
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit} for name, commit in repo["tags"].items()
        ]
        self.reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @route("GET", f"{API}/commits/(?P<revision>[^/]+)")
    def list_commits(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.find_repo(kind, repo_id)
        commit_id, _ = self.find_commit(repo, revision)
        commits = []
        while commit_id:
            commit = repo["commits"][commit_id]
            about = {"id": commit_id, "title": commit["title"], "message": "", "date": commit["date"]}
            commits.append({**about, "authors": [{"user": commit["user"]}]})
            commit_id = commit["parent"]
        self.reply(commits)

    @route("POST|DELETE", f"{API}/branch/(?P<name>[^/]+)")
    def change_branch(self, kind: str, repo_id: str, name: str) -> None:
        self.change_ref(kind, repo_id, "refs", name, self.read_json().get("startingPoint") or "main")

    @route("POST|DELETE", f"{API}/tag/(?P<name>[^/]+)")
    def change_tag(self, kind: str, repo_id: str, name: str) -> None:
        # The address has the revision when a tag is made, and the tag when it is deleted.
        self.change_ref(kind, repo_id, "tags", self.read_json().get("tag") or name, name)

    def change_ref(self, kind: str, repo_id: str, refs: str, name: str, revision: str) -> None:
        """Delete a branch ("refs") or tag ("tags"), or point a new one at a revision, as the method says."""
        with self.store.lock:
            repo = self.find_repo(kind, repo_id, write=True)
            if self.command == "DELETE":
                if not repo[refs].pop(name, None):
                    raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            elif name in repo[refs]:
                raise HubError(409, "Reference already exists")
            else:
                repo[refs][name], _ = self.find_commit(repo, revision)
            self.store.save(kind, repo_id, repo)
        self.reply({})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        request = self.read_json()
        errors, warnings = check_card(request["content"], request.get("repoType") or "model")
        report = {"errors": [{"message": error} for error in errors], "warnings": [{"message": w} for w in warnings]}
        if errors:
            raise HubError(400, "Invalid metadata in README.md", **report)
        self.reply(report)

    @route("POST", f"{API}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        """Say of each file whether it is large, and the hash of what is there under its name."""
        _, files = self.find_commit(self.find_repo(kind, repo_id, write=True), revision)
        answer = []
        for file in self.read_json()["files"]:
            path = file["path"]
            binary = b"\0" in base64.b64decode(file.get("sample", ""))
            large = file["size"] > LARGE_SIZE or binary or self.is_large_type(path, files)
            there = files.get(path)
            oid = there and there["sha256" if there["large"] else "oid"]
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answer})

    def is_large_type(self, path: str, files: dict) -> bool:
        """Whether the repository's .gitattributes gives the path to LFS."""
        if ".gitattributes" not in files:
            return False
        attributes = (self.store.blobs / files[".gitattributes"]["sha256"]).read_text()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        return any(fnmatch.fnmatch(name, pattern) for name in (path, Path(path).name) for pattern in patterns)

    @route("POST", f"{API}/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        head, *operations = [json.loads(line) for line in self.body.read().splitlines() if line.strip()]
        branch = revision.removeprefix("refs/heads/")
        parent = head["value"].get("parentCommit")
        if self.query.get("create_pr"):
            raise HubError(400, "this Hub has no pull requests")
        with self.store.lock:
            repo = self.find_repo(kind, repo_id, write=True)
            if branch not in repo["refs"]:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            before, files = self.find_commit(repo, branch)
            if parent and not before.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(files)
            for operation in operations:
                self.apply(operation["key"], operation["value"], files, kind)
            commit_id = self.store.add_commit(repo, branch, head["value"]["summary"], files, self.user.name)
            self.store.save(kind, repo_id, repo)
        url = f"{self.repo_url(kind, repo_id)}/commit/{commit_id}"
        self.reply({"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": ""})

    def apply(self, operation: str, value: dict, files: dict, kind: str) -> None:
        """Change `files` as one line of a commit says."""
        path = value["path"]
        if operation == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md" and (errors := check_card(content.decode(), kind)[0]):
                raise HubError(400, "\n".join(["Invalid metadata in README.md", *errors]))
            files[path] = self.store.small_file(content)
        elif operation == "lfsFile":
            try:
                files[path] = self.store.large_file(value["oid"])
            except FileNotFoundError:
                raise HubError(400, f"LFS pointer of {path} points to a file that does not exist") from None
        elif operation == "deletedFile":
            if not files.pop(path, None):
                raise HubError(404, f"A file with the name {path} does not exist", "EntryNotFound")
        elif operation == "deletedFolder":
            for inside in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[inside]
        else:
            raise HubError(400, f"unknown operation {operation}")

    # Git LFS: the client asks for addresses, sends the contents there, and has their arrival verified.

    @route("POST", rf"{WEB}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str, kind: str = "model") -> None:
        self.find_repo(kind, repo_id, write=True)
        answer = []
        for wanted in self.read_json()["objects"]:
            if not (self.store.blobs / wanted["oid"]).exists():
                upload = {"href": f"{self.server.cdn}/lfs/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/api/lfs-verify"}}
            answer.append(wanted)
        self.reply({"transfer": "basic", "objects": answer})

    @route("PUT", f"/lfs/(?P<sha256>{SHA256})")
    def lfs_upload(self, sha256: str) -> None:
        partial = self.store.blobs / f"{sha256}.{threading.get_ident()}.partial"
        with open(partial, "w+b") as file:
            shutil.copyfileobj(self.body, file)
            file.seek(0)
            arrived = hashlib.file_digest(file, "sha256").hexdigest()
        if arrived != sha256:
            partial.unlink()
            raise HubError(400, f"this content has the SHA-256 {arrived}")
        os.replace(partial, self.store.blobs / sha256)
        self.reply(headers={"ETag": f'"{sha256}"'})

    @route("POST", "/api/lfs-verify")
    def lfs_verify(self) -> None:
        request = self.read_json()
        path = self.store.blobs / request["oid"]
        if not path.exists() or path.stat().st_size != request["size"]:
            raise HubError(404, "this object was not uploaded")
        self.reply({})

    # Xet, see hub_xet.py

    @route("GET", f"{API}/xet-(?P<right>read|write)-token/(?P<revision>[^/]+)")
    def xet_token(self, kind: str, repo_id: str, right: str, revision: str) -> None:
        self.find_repo(kind, repo_id, write=right == "write")
        url, token, expiration = f"{self.server.url}/cas", f"xet-{right}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": expiration}
        self.reply({"casUrl": url, "accessToken": token, "exp": expiration}, headers=headers)

    @route("POST", f"/cas/v1/xorbs/default/(?P<xorb>{SHA256})")
    def put_xorb(self, xorb: str) -> None:
        self.need_xet_token("write")
        self.reply({"was_inserted": self.store.xet.put_xorb(xorb, self.body.read())})

    @route("GET", f"/cas/xorb/(?P<xorb>{SHA256})")
    def get_xorb(self, xorb: str) -> None:
        self.reply_file(self.store.xet.xorbs / xorb, {})

    @route("POST", "/cas/v1/shards")
    def put_shard(self) -> None:
        self.need_xet_token("write")
        for entry in read_shard(self.body.read()):
            try:
                self.store.put_blob(self.store.xet.add_file(entry))
            except ValueError as error:
                raise HubError(400, str(error)) from None
        self.reply({"result": 1})

    @route("GET", f"/cas/v1/reconstructions/(?P<file_hash>{SHA256})")
    def reconstruct(self, file_hash: str) -> None:
        self.need_xet_token("read", "write")
        size = self.store.xet.size(file_hash)
        if size is None:
            raise HubError(404, "no such file")
        start, end = self.wanted_range(size) or (0, size)
        if start >= end and size:
            return self.reply(status=416)
        self.reply(self.store.xet.reconstruction(file_hash, start, end, f"{self.server.url}/cas/xorb"))


def describe_lfs(file: dict, hash_name: str) -> dict:
    """What the Hub tells of a large file besides; the name of the hash differs from answer to answer."""
    if not file["large"]:
        return {}
    pointer_size = len(lfs_pointer(file["sha256"], file["size"]))
    return {"lfs": {hash_name: file["sha256"], "size": file["size"], "pointerSize": pointer_size}}


def describe_directory(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
