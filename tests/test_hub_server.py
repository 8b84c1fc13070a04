"""The tests' own Hub, seen through the real client."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from hub_server import ClientError, HubServer

CONFIG = json.dumps({"peft_type": "VPT", "num_tokens": 5}).encode()
WEIGHTS = bytes(range(256)) * 400
PUSHED = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
ID = "me/birds"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.add_user("me", "hf_me")
        hub.add_user("you", "hf_you")
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter, and a file that nobody wants to push."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in {**PUSHED, "optimizer.pt": b"much"}.items():
        (folder / name).write_bytes(content)
    return folder


def push(folder: str, **options: object) -> dict[str, Any]:
    from huggingface_hub import create_repo, upload_folder

    create_repo("me/birds", exist_ok=True)
    names = ["adapter_config.json", "adapter_model.safetensors"]
    info = upload_folder(repo_id="me/birds", folder_path=folder, allow_patterns=names, **options)
    return {"oid": info.oid, "pr": info.pr_revision, "repo": info.repo_url.repo_id}


def pull(revisions: list[str], **options: object) -> dict[str, dict[str, str]]:
    from pathlib import Path

    from huggingface_hub import snapshot_download

    found = {}
    for revision in revisions:
        folder = snapshot_download("me/birds", revision=revision, allow_patterns=["adapter_*"], **options)
        found[revision] = {path.name: path.read_bytes().hex() for path in Path(folder).iterdir()}
    return found


def download(repo: str = "me/birds", file: str = "adapter_model.safetensors", revision: str = "main") -> str:
    from pathlib import Path

    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, file, revision=revision)).read_bytes().hex()


def in_hex(files: dict[str, bytes]) -> dict[str, str]:
    return {name: content.hex() for name, content in files.items()}


# Uploads


def test_a_push_sends_the_allowed_files_and_the_large_ones_to_the_storage(hub: HubServer, folder: Path) -> None:
    pushed = hub.run(push, token="hf_me", folder=folder)
    repo = hub.repo(ID)
    assert pushed == {"oid": repo.branches["main"], "pr": None, "repo": ID}
    assert {**repo.files(), ".gitattributes": b""} == {**PUSHED, ".gitattributes": b""}
    assert [path for path, blob in repo.resolve().files.items() if blob.lfs] == ["adapter_model.safetensors"]
    assert hub.count("PUT", "/lfs/me/birds/") == 1 and list(repo.lfs.values()) == [WEIGHTS]


def test_a_second_push_of_the_same_files_makes_no_commit(hub: HubServer, folder: Path) -> None:
    first = hub.run(push, token="hf_me", folder=folder)
    hub.requests.clear()
    assert hub.run(push, token="hf_me", folder=folder) == first
    assert len(hub.repo(ID).commits) == 2 and hub.count("POST", "/commit/") == hub.count("PUT") == 0


def test_a_push_after_a_change_sends_only_what_changed(hub: HubServer, folder: Path) -> None:
    hub.run(push, token="hf_me", folder=folder)
    (folder / "adapter_config.json").write_bytes(b"{}")
    hub.requests.clear()
    hub.run(push, token="hf_me", folder=folder, commit_message="fewer")
    before, after = hub.repo(ID).commits[-2:]
    assert {path for path in after.files if after.files[path] != before.files[path]} == {"adapter_config.json"}
    assert after.title == "fewer" and after.author == "me" and hub.count("PUT") == 0


def test_an_upload_that_breaks_off_commits_nothing_until_it_is_tried_again(hub: HubServer, folder: Path) -> None:
    hub.break_uploads(1)
    try:
        hub.run(push, token="hf_me", folder=folder)
    except ClientError as error:  # older clients leave it to their user to try again
        assert error.message.startswith("Error while uploading 'adapter_model.safetensors'")
        assert len(hub.repo(ID).commits) == 1
        hub.run(push, token="hf_me", folder=folder)
    assert hub.repo(ID).files()["adapter_model.safetensors"] == WEIGHTS and hub.count("PUT") == 2


@pytest.mark.parametrize("xet", [False, True])
def test_a_pull_request_leaves_the_branch_alone(hub: HubServer, folder: Path, xet: bool) -> None:
    """The client opens it in another way where hf_xet is at work."""
    if xet and importlib.util.find_spec("hf_xet") is None:
        pytest.skip("hf_xet is not installed")
    if xet:
        (folder / "adapter_model.safetensors").unlink()  # there is no Xet storage here
    pushed = hub.run(push, token="hf_me", folder=folder, create_pr=True, env={"HF_HUB_DISABLE_XET": str(int(not xet))})
    repo = hub.repo(ID)
    assert pushed["pr"] == "refs/pr/1" and repo.pull_requests == {"1": pushed["oid"]}
    assert list(repo.files()) == [".gitattributes"] and repo.files("refs/pr/1")["adapter_config.json"] == CONFIG


def test_anyone_may_open_a_pull_request_where_they_may_not_push(hub: HubServer, folder: Path) -> None:
    hub.add_repo(ID)
    with pytest.raises(ClientError, match=r"(?s)HfHubHTTPError.*403 Forbidden: You don't have the rights"):
        hub.run(push, token="hf_you", folder=folder)
    hub.run(push, token="hf_you", folder=folder, create_pr=True)
    assert hub.repo(ID).commits[-1].author == "you" and len(hub.repo(ID).pull_requests) == 1


def test_a_push_needs_a_token_that_may_write_and_a_branch(hub: HubServer, folder: Path) -> None:
    hub.add_user("me", "hf_reader", role="read")
    for token, error in ((None, r"(?s)HfHubHTTPError.*401"), ("hf_reader", r"(?s)HfHubHTTPError.*403 Forbidden")):
        with pytest.raises(ClientError, match=error):
            hub.run(push, token=token, folder=folder)
    with pytest.raises(ClientError, match="RevisionNotFoundError"):
        hub.run(push, token="hf_me", folder=folder, revision="dev")
    assert len(hub.repo(ID).commits) == 1


def test_a_commit_can_delete_and_can_insist_on_its_parent(hub: HubServer) -> None:
    first = hub.add_repo(ID, {"a.txt": b"1", "old/b.txt": b"2", "old/c.bin": b"3"}).commits[-1].oid

    def delete(parent: str) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, create_commit

        gone = [CommitOperationDelete("old/"), CommitOperationDelete("a.txt")]
        operations = [*gone, CommitOperationAdd("new.txt", b"4")]
        create_commit("me/birds", operations, commit_message="tidy", parent_commit=parent)

    hub.run(delete, token="hf_me", parent=first)
    assert set(hub.repo(ID).files()) == {".gitattributes", "new.txt"}
    with pytest.raises(ClientError, match=r"(?s)HfHubHTTPError.*412"):
        hub.run(delete, token="hf_me", parent=first)


def test_the_metadata_of_a_card_can_be_refused(hub: HubServer) -> None:
    hub.add_repo(ID)
    code = """
        import warnings
        from huggingface_hub import upload_file
        with warnings.catch_warnings(record=True) as caught:
            upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/birds")
        result = [str(warning.message) for warning in caught]
    """
    assert hub.run(code, token="hf_me", card="---\nlicense: mit\n---\n") == []
    assert "empty or missing yaml metadata" in hub.run(code, token="hf_me", card="# Birds")[0]
    with pytest.raises(ClientError, match=r'"base_model" with value "small ViT" is not valid'):
        hub.run(code, token="hf_me", card="---\nbase_model: small ViT\n---\n")
    with pytest.raises(ClientError, match=r'"datasets" with value "my own" is not valid'):
        hub.run(code, token="hf_me", card="---\nbase_model: me/vit\ndatasets:\n- birds\n- my own\n---\n")
    hub.card_errors.append('"license" must be one of mit')
    with pytest.raises(ClientError, match=r"ValueError: Invalid metadata in README.md.\n- \"license\" must be"):
        hub.run(code, token="hf_me", card="---\nlicense: my\n---\n")


# Repositories


def test_repositories_are_made_listed_and_deleted(hub: HubServer) -> None:
    def live() -> list[Any]:
        from huggingface_hub import HfApi

        api = HfApi()
        made = api.create_repo("birds", private=True)  # the name's owner is whose token it is
        again = api.create_repo("me/birds", exist_ok=True)
        sets = api.create_repo("me/photos", repo_type="dataset")
        api.create_branch("me/birds", branch="dev/one")
        api.create_branch("me/birds", branch="dev/one", exist_ok=True)
        api.create_tag("me/birds", tag="v1", revision="dev/one", exist_ok=True)
        api.create_tag("me/birds", tag="v2")
        api.delete_tag("me/birds", tag="v2")
        api.create_branch("me/birds", branch="old")
        api.delete_branch("me/birds", branch="old")
        refs = api.list_repo_refs("me/birds", include_pull_requests=True)
        names = [[ref.name for ref in group] for group in (refs.branches, refs.tags, refs.pull_requests)]
        title = api.list_repo_commits("me/birds", revision="dev/one")[0].title
        state = [api.whoami()["name"], api.model_info("me/birds").private, api.repo_exists("me/none"), title]
        api.delete_repo("me/photos", repo_type="dataset")
        api.delete_repo("me/none", missing_ok=True)
        return [made.repo_id, made == again, sets.repo_type, names, state]

    refs = [["main", "dev/one"], ["v1"], []]
    assert hub.run(live, token="hf_me") == [ID, True, "dataset", refs, ["me", True, False, "initial commit"]]
    assert list(hub.repos) == [ID] and hub.repo(ID).private
    with pytest.raises(ClientError, match=r"(?s)HfHubHTTPError.*409.*already created"):
        hub.run("from huggingface_hub import create_repo; create_repo('me/birds')", token="hf_me")


def test_trees_tell_sizes_and_hashes(hub: HubServer) -> None:
    def look() -> list[Any]:
        from huggingface_hub import HfApi, RepoFile

        api = HfApi()
        files = [entry for entry in api.list_repo_tree("me/birds", recursive=True) if isinstance(entry, RepoFile)]
        told = {file.path: [file.size, file.lfs.sha256 if file.lfs else file.blob_id] for file in files}
        top = [entry.path for entry in api.list_repo_tree("me/birds")]
        below = [entry.path for entry in api.list_repo_tree("me/birds", "sub", recursive=True)]
        some = [entry.path for entry in api.get_paths_info("me/birds", ["sub", "none", "a.json"])]
        sizes = {file.rfilename: file.size for file in api.model_info("me/birds", files_metadata=True).siblings}
        assert sizes == {path: size for path, (size, _) in told.items()}
        return [told, top, below, some]

    repo = hub.add_repo(ID, {"a.json": CONFIG, "sub/w.safetensors": WEIGHTS})
    told, top, below, some = hub.run(look)
    assert told == {path: [blob.size, blob.etag] for path, blob in repo.resolve().files.items()}
    assert top == [".gitattributes", "a.json", "sub"] and below == ["sub/w.safetensors"] and some == ["a.json", "sub"]


# Downloads


def test_a_pull_takes_branch_tag_commit_or_pull_request(hub: HubServer) -> None:
    repo = hub.add_repo(ID, PUSHED, private=True)
    repo.add_ref("refs/tags/v1", "main")
    first = repo.commits[-1].oid
    repo.add_ref("refs/heads/dev/one", "main")
    later = {**PUSHED, "adapter_model.safetensors": WEIGHTS[::-1]}
    repo.put(later, revision="dev/one")
    repo.open_pull_request()
    repo.put({"adapter_config.json": b"{}"}, revision="refs/pr/1")
    expected = {"main": PUSHED, "v1": PUSHED, first: PUSHED, "dev/one": later}
    expected["refs/pr/1"] = {**PUSHED, "adapter_config.json": b"{}"}
    pulled = hub.run(pull, token="hf_me", revisions=list(expected))
    assert pulled == {revision: in_hex(files) for revision, files in expected.items()}


def test_a_download_reads_one_file(hub: HubServer) -> None:
    hub.add_repo(ID, {"sub folder/ä%.json": CONFIG, "empty.txt": b""})
    assert hub.run(download, file="sub folder/ä%.json") == CONFIG.hex()
    assert hub.run(download, file="empty.txt") == ""


@pytest.mark.parametrize("part", ["/lfs/", "adapter_config"])
def test_a_download_that_breaks_off_goes_on_where_it_was(hub: HubServer, part: str) -> None:
    def stubborn(**options: str) -> str:
        """Older clients leave it to their user to try again."""
        from pathlib import Path

        from huggingface_hub import hf_hub_download

        for attempt in range(4):
            try:
                return Path(hf_hub_download("me/birds", **options)).read_bytes().hex()
            except Exception:
                if attempt == 3:
                    raise

    hub.add_repo(ID, PUSHED)
    hub.break_downloads(2, part=part)
    file = "adapter_config.json" if part == "adapter_config" else "adapter_model.safetensors"
    assert hub.run(stubborn, filename=file) == PUSHED[file].hex()
    assert hub.count("GET", part) == 3


def test_a_range_of_a_file_is_sent_alone(hub: HubServer) -> None:
    hub.add_repo(ID, PUSHED)
    connection = HTTPConnection(hub.url.removeprefix("http://"))
    answers = []
    for wanted in ("bytes=3-", "bytes=3-5", f"bytes={len(CONFIG)}-"):
        connection.request("GET", f"/{ID}/resolve/main/adapter_config.json", headers={"Range": wanted})
        response = connection.getresponse()
        answers.append((response.status, response.getheader("Content-Range"), response.read()))
    size = len(CONFIG)
    assert answers[0] == (206, f"bytes 3-{size - 1}/{size}", CONFIG[3:])
    assert answers[1] == (206, f"bytes 3-5/{size}", CONFIG[3:6])
    assert answers[2][0] == 416


@pytest.mark.parametrize("repo", [ID, "me/none", "none"])
def test_what_is_private_or_missing_is_not_found(hub: HubServer, repo: str) -> None:
    hub.add_repo(ID, PUSHED, private=True)
    for token in (None, "hf_you"):
        with pytest.raises(ClientError, match=rf"(?s)RepositoryNotFoundError.*{repo}"):
            hub.run(download, repo=repo, token=token)
    assert hub.run(download, token="hf_me") == WEIGHTS.hex()


def test_a_bad_token_is_refused_everywhere(hub: HubServer, folder: Path) -> None:
    hub.add_repo(ID, PUSHED)
    for run, options in ((push, {"folder": folder}), (pull, {"revisions": ["main"]}), (download, {})):
        with pytest.raises(ClientError, match=r"(?s)HfHubHTTPError.*401") as failed:
            hub.run(run, token="hf_wrong", **options)
        assert "RepositoryNotFoundError" not in failed.value.names
    with pytest.raises(ClientError, match="Invalid user token"):
        hub.run("from huggingface_hub import whoami; whoami()", token="hf_wrong")


def test_a_gated_repository_is_seen_by_all_and_read_by_some(hub: HubServer) -> None:
    hub.add_repo(ID, PUSHED)
    hub.set_gated(ID)
    for token in (None, "hf_you"):
        with pytest.raises(ClientError, match=r"(?s)GatedRepoError.*me/birds"):
            hub.run(download, token=token)
        with pytest.raises(ClientError, match="GatedRepoError"):
            hub.run(pull, token=token, revisions=["main"])
    hub.set_gated(ID, "you")
    for token in ("hf_me", "hf_you"):
        assert hub.run(download, token=token) == WEIGHTS.hex()


def test_missing_revisions_and_files_have_errors_of_their_own(hub: HubServer) -> None:
    hub.add_repo(ID, PUSHED)
    with pytest.raises(ClientError, match=r"(?s)EntryNotFoundError.*none.json"):
        hub.run(download, file="none.json")
    for revision in ("dev", "f" * 40):
        with pytest.raises(ClientError, match="RevisionNotFoundError"):
            hub.run(download, revision=revision)
    with pytest.raises(ClientError, match="RevisionNotFoundError"):
        hub.run(pull, revisions=["dev"])


def test_the_cache_serves_without_a_request(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo(ID, PUSHED)
    hub.run(pull, revisions=["main"], cache=tmp_path)
    hub.requests.clear()
    assert hub.run(pull, revisions=["main"], cache=tmp_path, offline=True)["main"] == in_hex(PUSHED)
    assert hub.run(pull, revisions=["main"], cache=tmp_path, local_files_only=True)["main"] == in_hex(PUSHED)
    with pytest.raises(ClientError, match="LocalEntryNotFoundError"):
        hub.run(pull, revisions=["main"], offline=True)
    assert hub.requests == []


# The tests' side


def test_what_the_hub_does_not_know_is_told_at_the_end(hub: HubServer) -> None:
    code = "from huggingface_hub import HfApi; HfApi().list_models(limit=1).__iter__().__next__()"
    with pytest.raises(ClientError, match="501"):
        hub.run(code)
    with pytest.raises(AssertionError, match="GET /api/models: there is no such route"):
        hub.check()
    hub.problems.clear()


def test_one_process_can_change_its_token_and_its_cache_and_be_offline(hub: HubServer) -> None:
    def session() -> list[str]:
        from hub_server import HubServer

        with HubServer() as hub:
            hub.take_process()
            from huggingface_hub import constants, errors, get_token, hf_hub_download

            def outcome() -> str:
                try:
                    return hf_hub_download("me/birds", "a.json").removeprefix(constants.HF_HUB_CACHE)[:16]
                except errors.HfHubHTTPError as error:
                    return type(error).__name__
                except errors.LocalEntryNotFoundError as error:
                    return type(error).__name__

            hub.add_user("me", "hf_me")
            hub.add_repo("me/birds", {"a.json": b"{}"}, private=True)
            outcomes = []
            with hub.client():
                outcomes.append(outcome())
            with hub.client(token="hf_me"):
                outcomes.append(outcome())
                cache = constants.HF_HUB_CACHE
            with hub.client(offline=True):
                outcomes.append(outcome())
            with hub.client(offline=True, cache=cache):
                outcomes.append(outcome())
            return [*outcomes, get_token()]

    found = "/models--me--bir"
    outcomes = ["RepositoryNotFoundError", found, "LocalEntryNotFoundError", found, None]
    assert hub.run(session, token="hf_other") == outcomes


def test_the_environment_names_nobody_but_this_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "http://somebody.else")
    assert "http://somebody.else" not in hub.environment().values()
    assert hub.environment()["HF_HOME"] != hub.environment()["HF_HOME"]
    assert os.environ["HF_TOKEN"] == "http://somebody.else"
