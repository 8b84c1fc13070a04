"""PromptedModel: a VPTModel as PEFT uses one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .. import hub, io
from ..adapter import Adapter
from ..backbones import Backbone
from ..errors import AdapterError, truncate_list
from ..injection import ForwardContext
from ..model import VPTModel
from ..model.arguments import check_adapter_name
from ..model.backbone_checks import check_untrained, find_bare_backbone, warn_of_float16_on_cpu, with_head
from .config import VPTConfig

MAX_LISTED = 5


class _Calls(threading.local):
    """The calls of this thread: models, and the adapter of each image."""

    def __init__(self) -> None:
        self.mixed: list[tuple[object, Sequence[str]]] = []


_calls = _Calls()


class PromptedModel(VPTModel):
    """A VPTModel whose adapters can be switched off for good, and are made before their tensors are loaded.

    Until they are loaded, these are NaN, and a forward pass raises AdapterError.

    Args:
        model: the backbone.
        config: of the first adapter.
        adapter_name: its name.

    Raises:
        VPTError: as by :func:`~vpt_peft.get_vpt_model` or, for the config of a saved adapter, by
            :meth:`VPTModel.from_pretrained`; the model is unchanged.
    """

    enabled = True
    _unloaded: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, config: VPTConfig, adapter_name: str) -> None:
        if not config.is_saved:
            super().__init__(model, _new_config(config, model), adapter_name, **config.labels())
            return
        check_adapter_name(adapter_name)
        backbone = with_head(find_bare_backbone(model), config.vpt_task_type, config.labels())
        fingerprint = io.take_fingerprint(backbone)
        adapter = _make_unloaded(config, backbone, fingerprint)
        warn_of_float16_on_cpu(backbone, stacklevel=3)
        hub.warn_if_revision_differs(adapter.config, model)
        self._build(backbone, fingerprint, adapter_name, adapter, training=model.training)
        self._unloaded = frozenset([adapter_name])

    def add(self, adapter_name: str, config: VPTConfig) -> None:
        """Adds an adapter. The active one remains active.

        Raises:
            VPTError: as for the first one; nothing has changed.
        """
        if not config.is_saved:
            self.add_adapter(adapter_name, _new_config(config, self.base_model), **config.labels())
            return
        check_adapter_name(adapter_name)
        if adapter_name in self.adapters:
            raise AdapterError(f"An adapter '{adapter_name}' exists already. Delete it first, or choose another name.")
        adapter = _make_unloaded(config, self.backbone, self._fingerprint)
        hub.warn_if_revision_differs(adapter.config, self.base_model)
        self._insert(adapter_name, adapter)
        self._unloaded |= {adapter_name}

    # -- forward pass -----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in :class:`~vpt_peft.VPTModel`."""
        names = next((names for model, names in reversed(_calls.mixed) if model is self), None)
        if names is not None:
            kwargs["adapter_names"] = names
        with self._switched():
            return super().forward(*args, **kwargs)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As in :class:`~vpt_peft.VPTModel`."""
        with self._switched():
            return super().get_image_features(*args, **kwargs)

    def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
        """As in :class:`~vpt_peft.VPTModel`."""
        with self._switched():
            return super().get_text_features(*args, **kwargs)

    @contextmanager
    def _switched(self) -> Iterator[None]:
        if self.enabled:
            yield
        else:
            with self.disable_adapter():
                yield

    @contextmanager
    def mixing(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """A context in which forward passes of this thread have ``adapter_names``."""
        entry = (self, adapter_names)
        _calls.mixed.append(entry)
        try:
            yield
        finally:
            _calls.mixed.remove(entry)

    def _make_context(self, num_images: int, adapter_names: Sequence[str] | None) -> ForwardContext:
        for name in self._unloaded.intersection([self._active_adapter] if adapter_names is None else adapter_names):
            self._check_tensors(name)
        return super()._make_context(num_images, adapter_names)

    def _check_tensors(self, adapter_name: str) -> None:
        """Raises AdapterError if tensors of a saved adapter have not been loaded."""
        adapter = self._adapters[adapter_name]
        missing = [name for name, tensor in adapter.state_dict().items() if tensor.is_meta or tensor.isnan().any()]
        if missing:
            raise AdapterError(
                f"The adapter '{adapter_name}' has the config of a saved one, but its tensors have not been loaded: "
                f"{truncate_list(missing, MAX_LISTED)}. Load it by PeftModel.from_pretrained() or load_adapter(), from "
                "a complete folder; for a new adapter, make a new VPTConfig."
            )
        self._unloaded -= {adapter_name}

    # -- adapters ---------------------------------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:  # type: ignore[override]  # as in VPTModel
        """As in :class:`~vpt_peft.VPTModel`."""
        super().delete_adapter(adapter_name)
        self._unloaded -= {adapter_name}

    def tensors_to_save(self, adapter_name: str, config: VPTConfig, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter by their names in its file.

        Args:
            config: of the adapter, which gets all that is saved with the tensors.
            given: some of them, gathered from several processes; the others are the adapter's own.

        Raises:
            CheckpointError, ConfigError: the adapter could not be loaded again; AdapterError: the backbone was trained.
        """
        check_untrained(self.backbone, self._fingerprint)
        adapter = self._adapters[adapter_name]
        tensors = {**io.gather_state_dict(adapter), **given}
        outcome = f"Nothing was saved, since '{adapter_name}' could not be loaded again."
        io.check_state_dict(adapter.layout, tensors, outcome=outcome)
        config.describe(adapter, self._fingerprint)
        return tensors


update_wrapper(PromptedModel.forward, VPTModel.forward, assigned=())  # with its signature, which Trainer reads


def _new_config(config: VPTConfig, model: Any) -> Any:
    """The config of a new adapter. PEFT has set the name of the backbone; its revision is found if that is left out."""
    own = config.prompt_config()
    if own.revision is None and own.base_model_name_or_path == model.config.name_or_path:
        return own.replace(base_model_name_or_path=None)
    return own


@torch.no_grad()
def _make_unloaded(config: VPTConfig, backbone: Backbone, fingerprint: io.Fingerprint) -> Adapter:
    """An adapter with the config of a saved one, whose tensors are NaN."""
    saved = io.parse_config(config.to_dict())
    adapter = io.make_adapter(saved, backbone, fingerprint, is_trainable=not config.inference_mode)
    adapter.materialize(backbone.device, None)
    for tensor in chain(adapter.parameters(), adapter.buffers()):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    return adapter
