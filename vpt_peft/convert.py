"""Checkpoints of the authors' code (Jia et al., ECCV 2022, github.com/KMnP/vpt) as adapter folders.

Two kinds are read: ``prompt_ep*.pth``, the arrays ``shallow_prompt`` and ``deep_prompt`` of a ViT without its head; and
the state dict of a whole model, ViT or Swin. As a command::

    python -m vpt_peft.convert CHECKPOINT --model NAME_OR_FOLDER --output FOLDER
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from .authors import by_short_name, check_backbone, take_head, take_prompts
from .backbones import Backbone, find_backbone
from .config import CHOICES, PromptConfig
from .errors import ConfigError
from .model import get_adapter_state_dict, get_vpt_model, set_adapter_state_dict
from .pth import read_tensors


@dataclass(frozen=True)
class Conversion:
    """What was found and written.

    Attributes:
        config: the adapter's config, as inferred.
        shapes: ``{name: shape}`` of its tensors.
        head: where its head came from: ``"checkpoint"``, ``"model"``, or ``"none"`` where the model has none.
        left_out: the checkpoint's tensors that were not taken, such as the backbone's, by name.
    """

    config: PromptConfig
    shapes: dict[str, tuple[int, ...]]
    head: str
    left_out: list[str]


def convert(
    checkpoint: str | os.PathLike[str],
    model: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    pooling: str | None = None,
    carry: bool = True,
    shared: bool = False,
    keep_head: bool = False,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
) -> Conversion:
    """Writes a checkpoint of the authors' code as an adapter folder.

    Length, depth, layers and projection are inferred. A checkpoint tells neither the arguments below nor where prompts
    stand: they must be tokens beside the image's (``LOCATION: "prepend"``), from which "add" cannot be told apart.

    Args:
        checkpoint: a ``.pth`` or ``.safetensors`` file.
        model: the bare backbone that the prompts were trained on, which is left as it was; or its name or folder.
        folder: where to write; an adapter that is there is replaced.
        pooling: what the head reads; None: as by default in the authors' code, "default" for ViT and "global" for
            Swin. Their ``VIT_POOL_TYPE`` img_pool is "image", prompt_pool is "prompt", and imgprompt_pool is "global".
        carry: False for what was trained with ``FORWARD_DEEP_NOEXPAND``.
        shared: True for what was trained with ``DEEP_SHARED``; the further prompts in such a checkpoint are unused.
        keep_head: take the model's own head, not the checkpoint's.
        num_labels: number of labels; a head that is kept starts anew if it has another one.
        id2label: the labels' names; None: the model's if it has as many, else LABEL_0 and so on.

    Raises:
        CheckpointError: the file holds anything but tensors and arrays, unknown names, or what does not fit the model.
        VPTError: the model is not supported, or an argument does not fit it. Nothing was written.
    """
    found = by_short_name(read_tensors(Path(checkpoint)))
    backbone = find_backbone(
        model if isinstance(model, nn.Module) else AutoModelForImageClassification.from_pretrained(model)
    )
    check_backbone(found, backbone)
    prompts, projection = take_prompts(found, backbone)
    head = {} if keep_head or not backbone.head.paths else take_head(found, backbone)
    config = PromptConfig(
        num_tokens=prompts[0].shape[0],
        deep=len(prompts) > 1,
        layers_to_transform=None if len(prompts) in (1, len(backbone.layers)) else tuple(range(len(prompts))),
        carry=carry,
        shared=shared,
        projection_dim=prompts[0].shape[1] if projection else None,
        pooling=_default_pooling(backbone) if pooling is None else pooling,
    )
    if shared and not config.deep:
        raise ConfigError(
            "shared=True needs a checkpoint of VPT-Deep, got prompts of the first layer only. Leave it out."
        )
    tensors = {f"prompts.{layer}": prompt for layer, prompt in enumerate(prompts[:1] if shared else prompts)}
    labels = _labels(head, backbone, num_labels, id2label)
    vpt = get_vpt_model(backbone.model, config, adapter_name="labelled_as_the_model")
    try:
        vpt.add_adapter("default", config, **labels)
        own = {name: tensor for name, tensor in get_adapter_state_dict(vpt).items() if name.startswith("head.")}
        set_adapter_state_dict(vpt, {**(head or own), **projection, **tensors})
        shapes = {name: tuple(tensor.shape) for name, tensor in get_adapter_state_dict(vpt).items()}
        vpt.save_pretrained(folder, selected_adapters=["default"])
    finally:
        vpt.unload()
    return Conversion(config, shapes, "checkpoint" if head else "model" if own else "none", sorted(found))


def _default_pooling(backbone: Backbone) -> str:
    """The authors' ViT reads ``[CLS]``; their Swin averages over prompts and image tokens."""
    is_swin, is_classifier = bool(backbone.architecture.blocks), backbone.head.task_type == "IMAGE_CLASSIFICATION"
    return "global" if is_swin and is_classifier else "default"


def _labels(
    head: Mapping[str, Tensor], backbone: Backbone, num_labels: int | None, id2label: Mapping[int, str] | None
) -> dict[str, Any]:
    """What differs from the model's labels, for ``add_adapter``."""
    models = int(backbone.model.config.num_labels)
    counts = [tensor.shape[0] for tensor in head.values()]
    counts += [count for count in (num_labels, len(id2label) if id2label is not None else None) if count is not None]
    number = counts[0] if counts else models
    if set(counts) - {number}:
        raise ConfigError(f"The head, num_labels and id2label must agree on the number of labels, got {counts}.")
    if id2label is None and number == models:
        return {}
    names = {label: f"LABEL_{label}" for label in range(number)} if id2label is None else dict(id2label)
    if number < 1 or set(names) != set(range(number)):
        raise ConfigError(f"id2label must name the labels 0 to n-1, at least one, got {sorted(names, key=str)}.")
    return {"id2label": names, "label2id": {name: label for label, name in names.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. It exits with status 2 and a message where :func:`convert` raises."""
    parser = argparse.ArgumentParser(
        "python -m vpt_peft.convert", description="Turns a checkpoint of the authors' code into an adapter folder."
    )
    parser.add_argument("checkpoint", help="prompt_ep*.pth, or a state dict of the model, .pth or .safetensors")
    parser.add_argument("--model", required=True, help="name or folder of the backbone, an image classifier")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write the adapter")
    parser.add_argument("--num-labels", type=int, help="number of labels; with --keep-head, of a new head")
    parser.add_argument(
        "--pooling", choices=CHOICES["pooling"], help="what the head reads, if not the authors' default"
    )
    parser.add_argument("--keep-head", action="store_true", help="take the model's own head, not the checkpoint's")
    parser.add_argument("--shared", action="store_true", help="trained with DEEP_SHARED")
    parser.add_argument("--no-carry", action="store_true", help="trained with FORWARD_DEEP_NOEXPAND")
    args = parser.parse_args(arguments)
    options = {name: getattr(args, name) for name in ("num_labels", "pooling", "keep_head", "shared")}
    try:
        done = convert(args.checkpoint, args.model, args.output, carry=not args.no_carry, **options)
    except (ValueError, OSError) as error:  # ours are ValueErrors; transformers raises both
        parser.error(str(error))
    print(f"Read {args.checkpoint}:")
    for name, shape in done.shapes.items():
        print(f"  {name} {shape}")
    print(f"  head: {done.head}")
    print(f"  left out: {len(done.left_out)} tensors" + (f", such as {done.left_out[0]}" if done.left_out else ""))
    print(f"Wrote {args.output}: {done.config}")


if __name__ == "__main__":
    main()
