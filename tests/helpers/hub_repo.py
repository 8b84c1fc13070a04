"""A model repository of the Hub server, in memory and without git."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha1, sha256
from typing import NamedTuple

LFS_SUFFIX = ".safetensors"  # of the files in large file storage (LFS)
GITATTRIBUTES = f"*{LFS_SUFFIX} filter=lfs diff=lfs merge=lfs -text\n".encode()


class HubError(Exception):
    """An error response: from its code the client chooses an exception class."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Blob(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """The SHA-256 of an LFS file, the git blob hash of any other; the client compares it with its own file's."""
        if self.lfs:
            return sha256(self.content).hexdigest()
        return sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Commit(NamedTuple):
    oid: str
    title: str
    files: Mapping[str, Blob]


class Repo:
    """A model repository; as on the Hub, its first commit contains ``.gitattributes``.

    Attributes:
        refs: the commits, newest first, of each branch, tag and pull request (``"refs/pr/1"``).
        gated: whether only the owner can download files.
    """

    def __init__(self, id: str, private: bool = False) -> None:
        self.id, self.owner = id, id.partition("/")[0]
        self.private, self.gated = private, False
        self.refs: dict[str, list[Commit]] = {"main": []}
        self.put({".gitattributes": GITATTRIBUTES}, "initial commit")

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a branch, tag or pull request, or those up to a commit hash, newest first."""
        if revision in self.refs:
            return self.refs[revision]
        for commits in self.refs.values():
            for index, commit in enumerate(commits):
                if commit.oid == revision:
                    return commits[index:]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def resolve(self, revision: str = "main") -> Commit:
        return self.history(revision)[0]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The contents of all files, by path."""
        return {path: blob.content for path, blob in self.resolve(revision).files.items()}

    def add_ref(self, ref: str, revision: str = "main") -> None:
        """Adds a branch, tag or pull request, by its full name such as ``"refs/tags/v1"``."""
        ref = ref.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        self.refs[ref] = self.history(revision)

    def put(self, files: Mapping[str, bytes], title: str = "Upload files", revision: str = "main") -> Commit:
        """Commits files to a branch or pull request."""
        parents = self.refs[revision]
        blobs = dict(parents[0].files if parents else {})
        blobs |= {path: Blob(content, path.endswith(LFS_SUFFIX)) for path, content in files.items()}
        # The hash depends on the contents only: a client's cache may be older than this repository.
        parts = [self.id, title, [commit.oid for commit in parents], {path: blob.etag for path, blob in blobs.items()}]
        commit = Commit(sha1(json.dumps(parts).encode()).hexdigest(), title, blobs)
        self.refs[revision] = [commit, *parents]
        return commit
