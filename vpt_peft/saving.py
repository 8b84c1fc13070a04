"""SavableModel: adapters on their way out, to folders, checkpoints and the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import EllipsisType
from typing import Any

from huggingface_hub import CommitInfo
from torch import Tensor

from . import card, checkpoint, hub, state
from .batch import check_known
from .errors import AdapterError
from .files import save_whole
from .origin import warn_of_local
from .prompted import PromptedModel
from .version import __version__


class SavableModel(PromptedModel):
    """A frozen backbone with adapters that can be saved and pushed; the backbone stays where it is."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        image_processor: Any = None,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | EllipsisType | None = ...,
        save_function: Any = None,
        **card_details: Any,
    ) -> None:
        """Saves adapters: "default" into ``save_directory`` itself, any other into a subfolder of its name.

        Args:
            selected_adapters: None: all.
            image_processor: saved beside the adapters, so that ``AutoImageProcessor`` finds it there.
            is_main_process: False: writes nothing, and only helps to gather what several processes share.
            state_dict: the module's state dict, gathered from several processes; None: it is as it is here. Given
                either way, as by ``Trainer``, it makes a checkpoint: of the active adapter alone, with the same
                weights as ``model.safetensors`` too, where ``Trainer`` looks for them; of a model with several
                adapters under the names of its state dict.
            save_function: taken from scripts that have one, and not used: files are replaced at once.
            card_details: see :meth:`create_or_update_model_card`.

        Raises:
            CheckpointError: a folder holds a whole model, or ``state_dict`` lacks tensors. Nothing was saved.
        """
        self._check_attached()
        unknown = sorted(card_details.keys() - card.DETAILS)
        if unknown:
            raise TypeError(
                f"save_pretrained takes no {', '.join(unknown)}; of a card it takes {sorted(card.DETAILS)}."
            )
        is_checkpoint = state_dict is not ...
        gathered = None if state_dict is ... else state_dict
        names = list(self.adapters) if selected_adapters is None else list(selected_adapters)
        check_known(self.adapters, names)  # type: ignore[arg-type]
        if is_checkpoint and selected_adapters is None:
            names = [self._active_adapter]
        if not names:
            raise AdapterError(f"selected_adapters must name some of {', '.join(self.adapters)}, got none.")
        places = {_folder(save_directory, name) for name in names}
        if is_checkpoint:
            places.add(Path(save_directory))
        for place in sorted(places):
            checkpoint.check_place(place)  # in every process, since what follows may need them all
        for name in names:
            adapter = self._adapters[name]
            prefix = f"adapters.{name}."
            tensors = state.translate(adapter, prefix, gathered) if gathered else state.state_dict(adapter)
            if not is_main_process:
                continue
            folder = _folder(save_directory, name)
            checkpoint.save(adapter, folder, __version__, tensors)
            if image_processor is not None:
                save_whole(image_processor, folder)
            self.create_or_update_model_card(save_directory, name, **card_details)
        if is_main_process and (is_checkpoint or checkpoint.is_linked(Path(save_directory))):
            linked = self._active_adapter if self._active_adapter in names else names[0]
            # Among several adapters, Trainer must find again the one whose weights these are.
            whose = state.places(self._adapters[linked], f"adapters.{linked}.") if len(self.adapters) > 1 else None
            checkpoint.link(_folder(save_directory, linked), Path(save_directory), whose)

    def create_or_update_model_card(
        self, output_dir: str | os.PathLike[str], adapter_name: str = "default", **details: Any
    ) -> None:
        """Writes the adapter's model card, or refreshes the generated part and the metadata of the one that is there.

        Args:
            output_dir: as given to :meth:`save_pretrained`.
            details: ``model_id``, ``training_data``, ``metrics`` (``{name: value}``) and ``license``, where known.
        """
        check_known(self.adapters, [adapter_name])  # type: ignore[arg-type]
        subfolder = None if adapter_name == "default" else adapter_name
        card.write(self._adapters[adapter_name], _folder(output_dir, adapter_name), subfolder=subfolder, **details)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        selected_adapters: Sequence[str] | None = None,
        image_processor: Any = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        commit_message: str | None = None,
        **card_details: Any,
    ) -> CommitInfo:
        """Saves adapters and uploads them; files that are there already as they are, are not uploaded again.

        Args:
            repo_id: the repository, such as "me/birds-vpt"; created if it does not exist.
            private, revision, create_pr, token, commit_message: as everywhere on the Hub.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the client's own errors.
        """
        self._check_attached()
        details = {"model_id": repo_id, **card_details}
        with TemporaryDirectory() as folder:
            hub.fetch_cards(repo_id, folder, revision=revision, token=token)
            self.save_pretrained(folder, selected_adapters, image_processor, **details)
            for name in self.adapters if selected_adapters is None else selected_adapters:
                warn_of_local(self._adapters[name].config.base_model_name_or_path)
            return hub.push(
                Path(folder), repo_id, private=private, revision=revision, create_pr=create_pr, token=token,
                commit_message=commit_message,
            )  # fmt: skip


def _folder(save_directory: str | os.PathLike[str], adapter_name: str) -> Path:
    return Path(save_directory) if adapter_name == "default" else Path(save_directory) / adapter_name
