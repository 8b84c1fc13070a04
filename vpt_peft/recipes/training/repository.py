"""The repository on the Hub that a fine-tuned model is pushed to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, file_exists, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError

from ...errors import VPTError
from ...hub import is_folder, suggest_login
from ...model import VPTModel, check_repository
from ..errors import RecipeError
from .models import ADAPTER_CONFIG

CARD = "README.md"


class Repository:
    """A model repository on the Hub. It is created immediately, so that an invalid name or token fails before training.

    Args:
        name: with or without the owner.
        private: create it as a private repository.
        for_adapter: it is for an adapter, not for a full model. Together, they could not be loaded.

    Raises:
        RecipeError: the repository cannot be created, or is not for models of this kind.
        CheckpointError: it is to be for an adapter, but contains a full model.
    """

    def __init__(self, name: str, private: bool, for_adapter: bool) -> None:
        self.name, self.private = name, private
        with self._convert_errors("created"):
            self.name = create_repo(name, private=private or None, exist_ok=True).repo_id
            has_adapter = file_exists(self.name, ADAPTER_CONFIG)
        if for_adapter:
            check_repository(["default"], self.name)
        elif has_adapter:
            raise RecipeError(f"'{self.name}' on the Hub contains an adapter. Push a full model to another repository.")

    def fetch_card(self, folder: Path) -> None:
        """Downloads an existing model card into a folder, so that updating it keeps what others wrote."""
        with self._convert_errors("read"):
            try:
                hf_hub_download(self.name, CARD, local_dir=folder)
            except EntryNotFoundError:
                return

    def push_adapter(self, vpt: VPTModel, processor: Any, details: Mapping[str, Any], handler: bool = False) -> str:
        """Uploads an adapter of this library. Returns the URL of the commit.

        Args:
            details: of the model card.
            handler: with the handler of an Inference Endpoint.
        """
        options = {"private": self.private or None, "handler": handler, **details}
        with self._convert_errors("written to"):
            commit = vpt.push_to_hub(self.name, image_processor=processor, **options)
        return str(commit.commit_url)

    def push_folder(self, folder: Path) -> str:
        """Uploads a full model, or an adapter of PEFT, with its card. Returns the URL of the commit.

        Raises:
            RecipeError: others could not load it, or the push failed.
        """
        config = folder / ADAPTER_CONFIG
        if config.is_file():
            backbone = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
            if backbone is None or is_folder(backbone):
                raise RecipeError(
                    "An adapter of PEFT can be pushed only if its backbone is on the Hub, got a local folder. Push the "
                    "backbone first, and train with its name."
                )
        with self._convert_errors("written to"):
            commit = upload_folder(
                repo_id=self.name, folder_path=folder, allow_patterns=["*.json", "*.safetensors", CARD],
                ignore_patterns=["seed-*", "backbone/*", "data/*", "pretraining/*", "results.json", "settings.json"],
            )  # fmt: skip
        return str(commit.commit_url)

    @contextmanager
    def _convert_errors(self, action: str) -> Iterator[None]:
        try:
            with suggest_login():
                yield
        except VPTError:
            raise
        except Exception as error:  # of the Hub, the client or the connection
            raise RecipeError(f"'{self.name}' on the Hub could not be {action}: {error}") from error
