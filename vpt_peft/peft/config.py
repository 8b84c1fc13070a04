"""VPTConfig: the config of an adapter, as PEFT keeps it."""

from __future__ import annotations

import enum
import json
from dataclasses import InitVar, dataclass, field, fields
from typing import Any

from peft import PeftConfig

from .. import hub, io
from ..adapter import Adapter
from ..backbones import find_class
from ..config import PromptConfig
from ..errors import ConfigError, truncate_list

LABELS = ("id2label", "label2id", "problem_type")
# What adapter_config.json has besides: of the backbone that the adapter was trained on.
BACKBONE = ("model_type", "model_class", "widths", "head", "fingerprint", "vpt_peft_version")
MAX_LISTED = 10


class VPTType(str, enum.Enum):
    """The type of our adapters, as a member of an enum, whose ``value`` transformers asks for. It is equal to, and has
    the hash of, the string in ``adapter_config.json``."""

    VPT = "VPT"


@dataclass
class VPTConfig(PeftConfig):
    """:class:`~vpt_peft.PromptConfig` as a config of PEFT, with the labels of the adapter.

    ``peft.get_peft_model(model, VPTConfig(num_tokens=50, num_labels=5))``

    Args:
        num_tokens, num_virtual_tokens, kind, deep, layers_to_transform, carry, shared, projection_dim, dropout, init,
            pooling, location, bias, modules_to_save, route: as in :class:`~vpt_peft.PromptConfig`.
        num_labels, id2label, label2id, problem_type: the labels, where they differ from the model's.
        vpt_task_type: the task, also accepted as ``task_type``, which is then None: PEFT has tasks of language only.
        model_type, model_class, widths, head, fingerprint, vpt_peft_version: from the file of a saved adapter, whose
            backbone they describe.

    Raises:
        ConfigError: an argument is unknown or not valid; CheckpointError: it is from a file, and not valid.
    """

    num_tokens: int = 10
    kind: str = "token"
    deep: bool = True
    layers_to_transform: list[int] | None = None
    carry: bool = True
    shared: bool = False
    projection_dim: int | None = None
    dropout: float = 0.0
    init: str = "uniform"
    pooling: str = "default"
    location: str = "prepend"
    bias: str = "none"
    modules_to_save: list[str] | None = None
    route: str = "auto"
    num_labels: int | None = None
    id2label: dict[Any, Any] | None = None
    label2id: dict[Any, Any] | None = None
    problem_type: str | None = None
    vpt_task_type: str | None = None
    model_type: Any = None
    model_class: str | None = None
    widths: Any = None
    head: Any = None
    fingerprint: Any = field(default=None, repr=False)
    vpt_peft_version: str | None = None
    num_virtual_tokens: InitVar[int | None] = None

    def __new__(cls, *args: Any, **values: Any) -> VPTConfig:
        unknown = sorted(values.keys() - {*cls.__dataclass_fields__})
        if unknown:  # PEFT would leave out what it does not know, with a warning
            raise ConfigError(
                f"VPTConfig has no field {truncate_list(unknown, MAX_LISTED)[:500]}. The adapter may come from a newer "
                "vpt-peft: update, or remove the field."
            )
        return super().__new__(cls)

    def __post_init__(self, num_virtual_tokens: int | None) -> None:
        self.vpt_task_type = self.vpt_task_type or self.task_type
        self.task_type = None
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = VPTType.VPT
        self.num_tokens = self.prompt_config(num_virtual_tokens=num_virtual_tokens).num_tokens
        if self.is_saved:
            io.parse_config(self.to_dict())
        self._set_auto_mapping()

    @property
    def is_saved(self) -> bool:
        """Whether it is that of a saved adapter, whose tensors are still to be loaded."""
        return self.model_type is not None

    def prompt_config(self, **more: Any) -> PromptConfig:
        """The same as a :class:`~vpt_peft.PromptConfig`.

        Raises:
            ConfigError: the values are not valid.
        """
        own = {own.name for own in fields(self)}
        values = {part.name: getattr(self, part.name) for part in fields(PromptConfig) if part.name in own}
        return PromptConfig(**{**values, "task_type": self.vpt_task_type, "peft_type": "VPT", **more})

    def labels(self) -> dict[str, Any]:
        """The labels that are given."""
        values = {name: getattr(self, name) for name in ("num_labels", *LABELS)}
        return {name: value for name, value in values.items() if value is not None}

    def describe(self, adapter: Adapter, fingerprint: io.Fingerprint) -> None:
        """Takes over all that is saved with an adapter.

        Raises:
            CheckpointError, ConfigError: it could not be loaded.
        """
        values = json.loads(io.pack_config(adapter, fingerprint))
        for name in values.keys() - {"task_type", "peft_type", "inference_mode"}:
            setattr(self, name, values[name])
        self.vpt_task_type = values["task_type"]
        self._set_auto_mapping()

    def to_dict(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``, as this library writes it."""
        config = self.prompt_config(inference_mode=self.inference_mode or self.is_saved)
        return {**config.to_dict(), **{name: getattr(self, name) for name in (*LABELS, *BACKBONE)}}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes ``adapter_config.json``."""
        kwargs.pop("auto_mapping_dict", None)  # PEFT's note of the class of the model, which here is a VPTModel
        super().save_pretrained(save_directory, **kwargs)

    def _set_auto_mapping(self) -> None:
        """Tells AutoPeftModel the class of the backbone."""
        name = self.model_class if find_class(self.model_class) else hub.BACKBONE_CLASSES.get(self.vpt_task_type or "")
        self.auto_mapping = {"base_model_class": name, "parent_library": "transformers"} if name else None
