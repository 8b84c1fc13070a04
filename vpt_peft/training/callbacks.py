"""Callbacks of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import create_repo
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .optimizer import find_vpt_models


class PushAdapter(TrainerCallback):
    """Makes each push of a ``Trainer(vpt, args, callbacks=[PushAdapter()])`` a complete adapter.

    During training, Trainer uploads the files of a full model, and those of an adapter only if ``peft`` is installed.
    Its last push is complete in any case, but with Trainer's own model card; ``vpt.push_to_hub`` writes ours. For
    sharded adapters (FSDP2), the callback does nothing.
    """

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Saves the active adapter, with a card that names the repository, into the folder that Trainer uploads."""
        found = find_vpt_models(model)
        is_shared = any(isinstance(parameter, DTensor) for vpt in found for parameter in vpt.adapters.parameters())
        if state.is_world_process_zero and found and not is_shared:  # one process alone cannot gather tensors
            found[0].save_pretrained(args.output_dir, [found[0].active_adapter], model_id=_repository(args))


def _repository(args: Any) -> str:
    """The repository that Trainer pushes to, with its owner."""
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    if "/" in name:
        return str(name)
    return create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True).repo_id
