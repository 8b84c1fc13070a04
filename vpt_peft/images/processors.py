"""Image processors: how the images of a task are resized and normalised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from .. import hub
from ..adapter import Adapter
from ..errors import CheckpointError, safe_repr
from ..model import VPTModel


def read_processor(name: str | os.PathLike[str], **options: Any) -> Any:
    """The image processor in a folder or repository.

    Args:
        options: of ``from_pretrained``, and settings in place of those that were saved.

    Raises:
        OSError, ValueError: there is none, or it cannot be read.
    """
    # From its module: the name in `transformers` needs torchvision in some versions, and only there.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **options)


def load_processor(vpt: VPTModel, name: str | os.PathLike[str] | None = None, **source: Any) -> Any:
    """The image processor of the active adapter. Where a border of prompts surrounds images, it makes them smaller.

    Args:
        name: the folder or repository that contains it; None: the backbone's, at the revision that the adapter was
            trained on.
        source: ``token``, ``cache_dir`` and ``local_files_only``, as in ``huggingface_hub``.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    source |= border_settings(cast(Adapter, vpt.adapters[vpt.active_adapter]))
    if name is None:
        name, source["revision"] = vpt.name_or_path, backbone_revision(vpt)
    try:
        return read_processor(name, **source)
    except (OSError, ValueError) as error:  # transformers turns the Hub client's errors into these
        raise CheckpointError(
            "Pass image_processor=..., an object, a folder or a repository. None can be loaded from "
            f"{safe_repr(os.fspath(name))}: {error}"
        ) from error


def border_settings(adapter: Adapter) -> dict[str, Any]:
    """Settings in place of those that were saved: where a border of prompts surrounds images, they are smaller."""
    if adapter.config.location != "border" or adapter.image_size is None:
        return {}
    height, width = adapter.image_size
    return {"size": {"height": height, "width": width}, "do_center_crop": False}


def saved_processor(folder: Path) -> Path | None:
    """The folder of an adapter if an image processor is saved in it, for :func:`load_processor`."""
    return folder if (folder / hub.PREPROCESSOR_NAME).is_file() else None


def backbone_revision(vpt: VPTModel) -> str | None:
    """The revision of the backbone's repository that the active adapter was trained on; None: the newest."""
    config = vpt.active_config
    return config.revision if config.base_model_name_or_path == vpt.name_or_path else None
