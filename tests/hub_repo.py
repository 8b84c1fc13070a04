"""A repository of the Hub in memory: files, commits, branches, tags and pull requests, without git."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from hashlib import sha1, sha256
from pathlib import PurePosixPath
from typing import Any

LFS_SUFFIXES = (".bin", ".npz", ".onnx", ".pt", ".pth", ".safetensors")
LFS_SIZE = 10_000_000
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """What the Hub refuses: an HTTP status, a sentence, the ``X-Error-Code`` that the client looks at, and more."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None, **fields: str
    ) -> None:
        super().__init__(f"{status} {code} {message}")
        self.status, self.message, self.code, self.headers, self.fields = status, message, code, headers or {}, fields


def wants_lfs(path: str, size: int) -> bool:
    """Whether the Hub asks for large-file storage: by the patterns in ``.gitattributes``, or by size."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


@dataclass(frozen=True)
class Blob:
    """The content of a file; in git, an LFS file is a pointer of three lines."""

    content: bytes = field(repr=False)
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()

    @property
    def size(self) -> int:
        return len(self.content)

    @cached_property
    def in_git(self) -> bytes:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return pointer.encode() if self.lfs else self.content

    @cached_property
    def oid(self) -> str:
        """What git calls it."""
        return sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares with a file of its own."""
        return self.sha256 if self.lfs else self.oid

    @property
    def lfs_info(self) -> dict[str, Any]:
        return {"oid": self.sha256, "size": self.size, "pointerSize": len(self.in_git)}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: Commit | None = field(repr=False)
    author: str
    title: str
    message: str
    date: str
    files: Mapping[str, Blob] = field(repr=False)

    def entries(self) -> list[dict[str, Any]]:
        """Files and folders, as the client reads them."""
        above = {str(folder) for path in self.files for folder in PurePosixPath(path).parents} - {"."}
        entries: list[dict[str, Any]] = []
        for folder in above:
            oid = sha1(f"{self.oid} {folder}".encode()).hexdigest()
            entries.append({"type": "directory", "path": folder, "oid": oid, "size": 0})
        for path, blob in self.files.items():
            lfs = {"lfs": blob.lfs_info} if blob.lfs else {}
            entries.append({"type": "file", "path": path, "oid": blob.oid, "size": blob.size, **lfs})
        return sorted(entries, key=lambda entry: entry["path"])


@dataclass
class Change:
    """What a commit does to the files of its parent."""

    added: dict[str, Blob] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    deleted_folders: list[str] = field(default_factory=list)

    def apply(self, files: Mapping[str, Blob]) -> dict[str, Blob]:
        gone = set(self.deleted)
        for folder in self.deleted_folders:
            below = f"{folder.rstrip('/')}/"
            gone |= {path for path in files if path.startswith(below)} or {folder}
        if missing := gone - files.keys():
            raise HubError(404, f"A file with this name doesn't exist: {sorted(missing)}", "EntryNotFound")
        return {path: blob for path, blob in files.items() if path not in gone} | self.added


class Repo:
    """One repository, in which the Hub has already made a first commit.

    ``kind`` is models, datasets or spaces, ``id`` is ``"owner/name"``. The files of a gated repository are for the
    owner and for those who are in ``granted``.
    """

    def __init__(self, kind: str, id: str, private: bool = False) -> None:
        self.kind, self.id, self.private = kind, id, private
        self.owner = id.partition("/")[0]
        self.gated = False
        self.granted: set[str] = set()
        self.commits: list[Commit] = []  # of all branches, in the order in which they were made
        self.refs: dict[str, str] = {"refs/heads/main": ""}
        self.lfs: dict[str, bytes] = {}  # content by sha256, committed or only uploaded
        self.put({".gitattributes": GITATTRIBUTES}, title="initial commit")

    @property
    def name(self) -> str:
        """The repository's place in addresses: models have no prefix."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    @property
    def branches(self) -> dict[str, str]:
        """Name to commit hash; as for ``tags`` and ``pull_requests``."""
        return self.named("refs/heads/")

    @property
    def tags(self) -> dict[str, str]:
        return self.named("refs/tags/")

    @property
    def pull_requests(self) -> dict[str, str]:
        return self.named("refs/pr/")

    def named(self, prefix: str) -> dict[str, str]:
        return {ref.removeprefix(prefix): oid for ref, oid in self.refs.items() if ref.startswith(prefix)}

    def _ref(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str = "main") -> Commit:
        """The commit that a branch, a tag, a pull request's ref or the beginning of a commit hash means."""
        oid = self.refs.get(self._ref(revision) or "", revision)
        for commit in self.commits:
            if len(oid) >= 7 and commit.oid.startswith(oid):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to content."""
        return {path: blob.content for path, blob in self.resolve(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """A commit and all before it, newest first."""
        commits = [self.resolve(revision)]
        while parent := commits[-1].parent:
            commits.append(parent)
        return commits

    def add_ref(self, ref: str, revision: str) -> None:
        oid = self.resolve(revision).oid
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        self.refs[ref] = oid

    def delete_ref(self, ref: str) -> None:
        if ref not in self.refs:
            raise HubError(404, f"Reference does not exist: {ref}", "RevisionNotFound")
        if ref == "refs/heads/main":
            raise HubError(403, "The branch main cannot be deleted")
        del self.refs[ref]

    def open_pull_request(self, revision: str = "main") -> int:
        """A new one without changes; gives its number."""
        number = len(self.pull_requests) + 1
        self.add_ref(f"refs/pr/{number}", revision)
        return number

    def put(self, files: Mapping[str, bytes], title: str = "Upload files", revision: str = "main") -> Commit:
        """A commit made behind the client's back."""
        blobs = {path: Blob(content, wants_lfs(path, len(content))) for path, content in files.items()}
        return self.commit(Change(blobs), title, revision)

    def commit(
        self, change: Change, title: str, revision: str = "main", message: str = "", author: str | None = None
    ) -> Commit:
        """Puts a commit on top of a branch or pull request; like the Hub, also one that changes nothing."""
        ref = self._ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            self.resolve(revision)  # what does not exist at all is another error
            raise HubError(400, f"Only a branch or a pull request takes commits, got {revision}")
        parent = self.resolve(ref) if self.commits else None
        files = change.apply(parent.files if parent else {})
        self.lfs |= {blob.sha256: blob.content for blob in files.values() if blob.lfs}
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        facts = [self.name, len(self.commits), title, date, {path: blob.oid for path, blob in files.items()}]
        oid = sha1(json.dumps(facts).encode()).hexdigest()
        commit = Commit(oid, parent, author or self.owner, title, message, date, files)
        self.commits.append(commit)
        self.refs[ref] = oid
        return commit
