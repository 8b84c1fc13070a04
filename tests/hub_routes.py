"""What the Hub answers: written after what ``huggingface_hub`` sends and reads, route by route."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs

import yaml
from hub_http import Request, Response, Routes
from hub_repo import Blob, Change, HubError, Repo, wants_lfs

REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+(?:/[^/]+)?)"
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"  # quoted: a slash within it is %2F

hub_route = Routes()
storage_route = Routes()  # of the other origin, where large files lie


# Users and repositories


@hub_route("GET", "/api/whoami-v2")
def whoami(request: Request) -> dict[str, Any]:
    user = request.require_user()
    access = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
    return {"type": "user", "name": user.name, "fullname": user.name, "orgs": [], "auth": access}


@hub_route("POST", "/api/repos/create")
def create_repo(request: Request) -> dict[str, Any]:
    wanted, hub = request.json(), request.hub
    user = request.require_write(wanted.get("organization") or request.require_user().name)
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # the latter from 1.x
    repo = Repo(f"{wanted.get('type', 'model')}s", f"{user.name}/{wanted['name']}", private)
    url = f"{hub.url}/{repo.name}"
    if repo.name in hub.repos:
        raise HubError(409, f"You already created this repo: {repo.id}", url=url)
    hub.repos[repo.name] = repo
    return {"url": url, "name": repo.id, "id": repo.id}


@hub_route("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> dict[str, Any]:
    wanted = request.json()
    owner = wanted.get("organization") or request.require_user().name
    request.parts = {"kind": f"{wanted.get('type', 'model')}s", "id": f"{owner}/{wanted['name']}"}
    repo = request.repo
    request.require_write(repo.owner)
    del request.hub.repos[repo.name]
    return {}


@hub_route("GET", REPO)
@hub_route("GET", f"{REPO}/revision/{REVISION}")
def info(request: Request) -> dict[str, Any]:
    repo = request.repo
    commit = repo.resolve(request.revision)
    siblings: list[dict[str, Any]] = []
    for path, blob in commit.files.items():
        lfs = {"lfs": {**blob.lfs_info, "sha256": blob.sha256}} if blob.lfs else {}
        details = {"size": blob.size, "blobId": blob.oid, **lfs} if request.flag("blobs") else {}
        siblings.append({"rfilename": path, **details})
    state: dict[str, Any] = {
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "tags": [],
    }
    dates = {"createdAt": repo.commits[0].date, "lastModified": commit.date}
    return {"id": repo.id, "author": repo.owner, "sha": commit.oid, "siblings": siblings, **state, **dates}


@hub_route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Response:
    """Refuses names that no repository can have, and all metadata if ``hub.card_errors`` holds something; warns, as the
    Hub does, where there is none."""
    content = request.json()["content"]
    empty = not content.startswith("---")
    warnings = [{"message": "empty or missing yaml metadata in repo card"}] if empty else []
    errors = [{"message": message} for message in [*request.hub.card_errors, *misnamed(content)]]
    return Response.of({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def misnamed(card: str) -> Iterator[str]:
    """What names no repository where a card's metadata has to."""
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    metadata = (yaml.safe_load(front[1]) if front else None) or {}
    for field in ("base_model", "datasets"):
        names = metadata.get(field) or []
        for name in [names] if isinstance(names, str) else names:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                yield f'"{field}" with value "{name}" is not valid'


# Trees and refs


@hub_route("GET", f"{REPO}/tree/{REVISION}(?:/(?P<path>.+))?")
def tree(request: Request) -> list[dict[str, Any]]:
    below = f"{request.parts['path']}/" if "path" in request.parts else ""
    entries = [entry for entry in request.repo.resolve(request.revision).entries() if entry["path"].startswith(below)]
    if below and not entries:
        raise HubError(404, f"{below} does not exist on {request.revision}", "EntryNotFound")
    return [entry for entry in entries if request.flag("recursive") or "/" not in entry["path"].removeprefix(below)]


@hub_route("POST", f"{REPO}/paths-info/{REVISION}")
def paths_info(request: Request) -> list[dict[str, Any]]:
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return [entry for entry in request.repo.resolve(request.revision).entries() if entry["path"] in wanted]


@hub_route("GET", f"{REPO}/refs")
def refs(request: Request) -> dict[str, Any]:
    def listed(prefix: str) -> list[dict[str, str]]:
        named = request.repo.named(prefix).items()
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in named]

    found = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
    return {**found, "pullRequests": listed("refs/pr/")} if request.flag("include_prs") else found


@hub_route("GET", f"{REPO}/commits/{REVISION}")
def commits(request: Request) -> list[dict[str, Any]]:
    return [
        {"id": c.oid, "authors": [{"user": c.author}], "title": c.title, "message": c.message, "date": c.date}
        for c in request.repo.history(request.revision)
    ]


@hub_route("POST DELETE", f"{REPO}/(?P<kind_of_ref>branch|tag)/{REVISION}")
def ref(request: Request) -> dict[str, Any]:
    """The path names the branch, or the tag that is deleted, or the revision that is tagged."""
    repo, name, start = request.repo, request.revision, request.json().get("startingPoint", "main")
    request.require_write(repo.owner)
    prefix = "refs/heads/"
    if request.parts["kind_of_ref"] == "tag":
        prefix, name, start = "refs/tags/", request.json().get("tag", name), name
    if request.method == "POST":
        repo.add_ref(prefix + name, start)
    else:
        repo.delete_ref(prefix + name)
    return {}


@hub_route("POST", f"{REPO}/discussions")
def open_pull_request(request: Request) -> dict[str, Any]:
    """One that gets its commits later. There are no discussions of another kind here."""
    request.require_user()
    return {"num": request.repo.open_pull_request()}


@hub_route("GET", f"{REPO}/discussions/(?P<number>[0-9]+)")
def pull_request(request: Request) -> dict[str, Any]:
    repo, number = request.repo, int(request.parts["number"])
    date = repo.resolve(f"refs/pr/{number}").date
    origin = {"author": {"name": repo.owner}, "createdAt": date, "repo": {"name": repo.id, "type": repo.kind[:-1]}}
    state = {"num": number, "title": "", "status": "draft", "events": [], "filesWithConflicts": []}
    return {**state, **origin, "isPullRequest": True, "changes": {"base": "refs/heads/main"}}


# Uploads


def require_commit(request: Request) -> None:
    """Whoever can read a repository can open a pull request there."""
    if request.flag("create_pr"):
        request.require_user()
    else:
        request.require_write(request.repo.owner)


@hub_route("POST", f"{REPO}/preupload/{REVISION}")
def preupload(request: Request) -> dict[str, Any]:
    """How to send each file. The ``oid`` of one that is there lets the client leave it out where it is the same."""
    present = request.repo.resolve(request.revision).files
    require_commit(request)
    files = []
    for file in request.json()["files"]:
        path, mode = file["path"], "lfs" if wants_lfs(file["path"], file["size"]) else "regular"
        oid = {"oid": present[path].etag} if path in present else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
    return {"files": files}


@hub_route("POST", rf"{PAGE}\.git/info/lfs/objects/batch")
def lfs_batch(request: Request) -> dict[str, Any]:
    """Where to put each object; nowhere, when it is there already."""
    repo, objects = request.repo, request.json()["objects"]
    request.require_user()
    for item in objects:
        if item["oid"] not in repo.lfs:
            item["actions"] = {"upload": {"href": f"{request.hub.lfs_url}/{repo.name}/{item['oid']}"}}
    return {"transfer": "basic", "objects": objects}


def read_commit(repo: Repo, lines: Iterable[bytes]) -> tuple[dict[str, Any], Change]:
    """The header, and what the commit changes."""
    header: dict[str, Any] = {}
    change = Change()
    for key, value in ((item["key"], item["value"]) for item in map(json.loads, lines)):
        match key:
            case "header":
                header = value
            case "file":
                change.added[value["path"]] = Blob(base64.b64decode(value["content"]))
            case "lfsFile" if value["oid"] in repo.lfs:
                change.added[value["path"]] = Blob(repo.lfs[value["oid"]], lfs=True)
            case "lfsFile":
                raise HubError(400, f"The large file {value['path']} was not uploaded: {value['oid']}")
            case "deletedFile":
                change.deleted.append(value["path"])
            case "deletedFolder":
                change.deleted_folders.append(value["path"])
            case _:
                raise NotImplementedError(f"a commit with {key}")
    return header, change


@hub_route("POST", f"{REPO}/commit/{REVISION}")
def commit(request: Request) -> dict[str, Any]:
    repo, revision = request.repo, request.revision
    require_commit(request)
    header, change = read_commit(repo, request.body.splitlines())
    head, expected = repo.resolve(revision).oid, header.get("parentCommit")
    if expected not in (None, head):
        raise HubError(412, f"A commit has happened since {expected}: {head}")
    page = f"{request.hub.url}/{repo.name}"
    pull_request = {}
    if request.flag("create_pr"):
        number = repo.open_pull_request(revision)
        revision, pull_request = f"refs/pr/{number}", {"pullRequestUrl": f"{page}/discussions/{number}"}
    author = request.require_user().name
    oid = repo.commit(change, header["summary"], revision, header.get("description", ""), author).oid
    return {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}", **pull_request}


# Files


@hub_route("HEAD GET", f"{PAGE}/resolve/{REVISION}/(?P<path>.+)")
def resolve(request: Request) -> Response:
    """A regular file itself; for a large one, the way to the other origin and what the client wants to know of it."""
    repo, user, path = request.repo, request.user, request.parts["path"]
    if repo.gated and (user is None or user.name not in {repo.owner, *repo.granted}):
        raise HubError(403 if user else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
    commit = repo.resolve(request.revision)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:
        raise HubError(404, f"{path} does not exist on {request.revision}", "EntryNotFound", headers)
    blob = commit.files[path]
    if not blob.lfs:
        return content(request, blob.content, {**headers, "ETag": f'"{blob.etag}"'})
    linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
    location = f"{request.hub.lfs_url}/{repo.name}/{blob.sha256}"
    return Response(b"", 302, {**headers, **linked, "Location": location})


@storage_route("HEAD GET PUT", r"/lfs/(?P<name>.+)/(?P<sha>[0-9a-f]{64})")
def large_file(request: Request) -> Response:
    """Who knows the address may read and write, as when it is signed; a token would be told to a stranger."""
    stored, sha = request.hub.repos[request.parts["name"]].lfs, request.parts["sha"]
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed")
    if request.method != "PUT":
        return content(request, stored[sha], {"ETag": f'"{sha}"'})
    if sha256(request.body).hexdigest() != sha:
        raise HubError(400, f"What was sent as {sha} has another hash")
    stored[sha] = request.body
    return Response()


def content(request: Request, whole: bytes, headers: dict[str, str]) -> Response:
    """A file or a range of it, broken off where the test asked for that."""
    start, stop, status = 0, len(whole), 200
    if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        start, stop, status = int(wanted[1]), min(int(wanted[2] or stop) + 1, stop), 206
        if start >= stop:
            raise HubError(416, f"{wanted[0]} is not within {len(whole)} bytes")
        headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(whole)}"}
    headers = {**headers, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    cut_at = request.hub.cut(request.path, stop - start) if request.method == "GET" else None
    return Response(whole[start:stop], status, headers, cut_at)
