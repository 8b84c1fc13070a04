"""Callbacks of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .. import hub
from ..model import VPTModel, check_repository
from .optimizer import find_vpt_models


class PushAdapter(TrainerCallback):
    """Makes each push of a ``Trainer(vpt, args, callbacks=[PushAdapter()])`` a complete adapter.

    During training, Trainer uploads the files of a full model, and those of an adapter only if ``peft`` is installed.
    Its last push is complete in any case, but with Trainer's own model card; ``vpt.push_to_hub`` writes ours. For
    sharded adapters (FSDP2), the callback writes no files.

    A backbone that is a local folder is removed from the adapters' config, since Trainer would publish its path.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Prepares adapters that are going to be pushed.

        Raises:
            CheckpointError: the repository contains a full model, which could not be loaded any more.
        """
        for vpt in find_vpt_models(model) if args.push_to_hub else []:
            _prepare(vpt)
            if state.is_world_process_zero:
                self._check_repository(args, vpt)

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Saves the active adapter, with a card that names the repository, into the folder that Trainer uploads.

        Raises:
            CheckpointError: the repository contains a full model, which could not be loaded any more.
        """
        found = find_vpt_models(model)
        for vpt in found:
            _prepare(vpt)
        is_shared = any(isinstance(parameter, DTensor) for vpt in found for parameter in vpt.adapters.parameters())
        if state.is_world_process_zero and found and not is_shared:  # one process alone cannot gather tensors
            repository = self._check_repository(args, found[0])
            found[0].save_pretrained(args.output_dir, [found[0].active_adapter], model_id=repository)

    def _check_repository(self, args: Any, vpt: VPTModel) -> str:
        """The repository that Trainer pushes to, with its owner."""
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        with hub.suggest_login():
            name = hub.full_repo_id(name, args.hub_private_repo, args.hub_token)
            check_repository(["default", vpt.active_adapter], name, args.hub_revision, args.hub_token)
        return name


def _prepare(vpt: VPTModel) -> None:
    """Removes the paths of local backbones from the configs of adapters."""
    for adapter in vpt._adapters.values():
        published = hub.without_local_backbone(adapter.config)
        if published != adapter.config:
            hub.warn_if_local(adapter.config.base_model_name_or_path)
            adapter.config = published
