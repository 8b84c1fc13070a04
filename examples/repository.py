"""The repository on the Hub that a trained model is pushed to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import create_repo, file_exists, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError
from images import DataError

from vpt_peft.model import check_repository

CARD = "README.md"


class Repository:
    """A model repository on the Hub. It is created immediately, so that an invalid name or token fails before training.

    Args:
        name: with or without the owner.
        private: create it as a private repository.
        for_adapter: it is for an adapter, not for a full model. Together, they could not be loaded.

    Raises:
        DataError: the repository cannot be created, or is not for models of this kind.
        CheckpointError: it is to be for an adapter, but contains a full model.
    """

    def __init__(self, name: str, private: bool, for_adapter: bool) -> None:
        self.name = name
        with self._convert_errors("created"):
            self.name = create_repo(name, private=private or None, exist_ok=True).repo_id
            has_adapter = file_exists(self.name, "adapter_config.json")
        if for_adapter:
            check_repository(["default"], self.name)
        elif has_adapter:
            raise DataError(f"'{self.name}' on the Hub contains an adapter. Push a full model to another repository.")

    def fetch_card(self, folder: Path) -> None:
        """Downloads an existing model card into a folder, so that updating it preserves what others wrote."""
        with self._convert_errors("read"):
            try:
                hf_hub_download(self.name, CARD, local_dir=folder)
            except EntryNotFoundError:
                return

    def push(self, folder: Path) -> str:
        """Uploads model, image processor and card. Returns the URL of the commit. To be called in one process only."""
        with self._convert_errors("written to"):
            commit = upload_folder(
                repo_id=self.name, folder_path=folder, allow_patterns=["*.json", "*.safetensors", CARD],
                ignore_patterns=["seed-*", "backbone/*", "results.json", "settings.json"],
            )  # fmt: skip
        return str(commit.commit_url)

    @contextmanager
    def _convert_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the Hub, the client or the connection
            raise DataError(f"'{self.name}' on the Hub could not be {action}: {error}") from error
