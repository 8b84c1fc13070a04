"""The repository on the Hub that what was trained goes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError
from images import DataError

CARD = "README.md"


class Repository:
    """A repository, created at once: a name or token that does not do is known before anything is trained.

    Args:
        name: with its owner or without; private: whether it is created as such.

    Raises:
        DataError: it cannot be created.
    """

    def __init__(self, name: str, private: bool) -> None:
        self.name = name
        with self._asked("created"):
            self.name = create_repo(name, private=private or None, exist_ok=True).repo_id

    def fetch_card(self, folder: Path) -> None:
        """Puts the card that is there, if any, into a folder, for ours to go on from what others wrote into it."""
        with self._asked("read"):
            try:
                hf_hub_download(self.name, CARD, local_dir=folder)
            except EntryNotFoundError:
                return

    def push(self, folder: Path) -> str:
        """Uploads model, image processor and card, and tells where they are. It needs one process of several only."""
        with self._asked("written to"):
            commit = upload_folder(
                repo_id=self.name, folder_path=folder, allow_patterns=["*.json", "*.safetensors", CARD],
                ignore_patterns=["seed-*", "backbone/*", "results.json", "settings.json"],
            )  # fmt: skip
        return str(commit.commit_url)

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the Hub's, the client's or the connection's
            raise DataError(f"'{self.name}' on the Hub could not be {what}: {error}") from error
