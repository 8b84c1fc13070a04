"""What the other tests rely on in the Hub server and would not notice themselves."""

from __future__ import annotations

from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path
from urllib.request import urlopen

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, create_commit, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from helpers.hub_server import HubServer

REPO = "me/birds"
ADD = CommitOperationAdd("a.json", b"[]")
REQUESTS: dict[str, Callable[[], object]] = {
    "endpoint": lambda: HfApi().whoami(),
    "operation": lambda: HfApi().delete_file("a.json", REPO),
    "option": lambda: create_commit(REPO, [ADD], commit_message="Add", parent_commit="0" * 40),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_is_not_implemented_fails_the_test(name: str, hub: HubServer) -> None:
    hub.add_repo(REPO, {"a.json": b"{}"})
    hub.check()
    with hub.client(token="hf_me"), pytest.raises(HfHubHTTPError, match="501"):
        REQUESTS[name]()
    with pytest.raises(AssertionError, match="NotImplementedError"):
        hub.check()
    hub.problems.clear()  # or else the fixture `hub` makes this test fail


def test_a_damaged_upload_is_rejected_and_not_committed(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hub.add_repo(REPO).history()
    damaged = CommitOperationAdd("a.safetensors", b"0123")
    damaged.upload_info.sha256 = bytes(32)
    with hub.client(token="hf_me"):
        with pytest.raises(Exception, match=r"a\.safetensors") as error:  # the client's own, of whichever version
            create_commit(REPO, [damaged], commit_message="Add")
        assert "has another hash" in str(error.value.__cause__)
        monkeypatch.setattr(HfApi, "preupload_lfs_files", lambda *_args, **_options: None)
        with pytest.raises(HfHubHTTPError, match=r"a\.safetensors was not uploaded"):
            create_commit(REPO, [damaged], commit_message="Add")
    assert hub.repo(REPO).history() == before and not hub.lfs


def test_a_broken_download_ends_after_half_of_the_file(hub: HubServer) -> None:
    hub.add_repo(REPO, {"a.json": b"0123456789"})
    hub.break_downloads(1)
    url = f"{hub.url}/{REPO}/resolve/main/a.json"
    with pytest.raises(IncompleteRead) as error:
        urlopen(url).read()
    assert error.value.partial == b"01234" and urlopen(url).read() == b"0123456789"


def test_a_repository_made_again_with_other_files_is_not_read_from_the_cache(hub: HubServer, tmp_path: Path) -> None:
    for content in (b"1", b"2"):
        hub.add_repo(REPO, {"a.json": content})
        with hub.client(cache=tmp_path):
            assert Path(hf_hub_download(REPO, "a.json")).read_bytes() == content


def test_clients_use_only_the_settings_of_the_test(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("hf_me", None):
        with hub.client(token=token):
            assert get_token() == token
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "outside")
    assert "outside" not in hub.environment().values()
    assert hub.environment()["HF_HOME"] != hub.environment()["HF_HOME"], "the caches are separate"
