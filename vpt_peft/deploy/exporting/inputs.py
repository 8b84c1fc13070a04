"""Random inputs of an exported model: to trace it, and to compare it with the model that it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from ...errors import AdapterError, safe_repr
from ...images.positions import interpolation
from ...model import VPTModel

EXAMPLES = 2  # images to trace; with one, torch.export would take the number for fixed
MOST_IMAGES = 8


@dataclass
class Inputs:
    """The inputs of an exported model.

    Attributes:
        vpt: the model.
        num_tasks: number of adapters that the input ``tasks`` chooses from; None: it has no such input.
        batch_size: number of images; None: any.
        image_size: height and width in pixels; None: any.
        image_processor: the input is pixels, which it normalises; None: they are normalised already.
    """

    vpt: VPTModel
    num_tasks: int | None
    batch_size: int | None
    image_size: tuple[int, int] | None
    image_processor: Any

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace the model with: of another size than the backbone's where they may have any."""
        patch, (height, width) = self.vpt.backbone.patch_size, self.vpt.backbone.image_size
        size = self.image_size or (height + patch, width + 2 * patch)
        return self._draw(self.batch_size or EXAMPLES, size, 0)

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """The dimensions that may change, for ``torch.export``."""
        batch = {} if self.batch_size else {0: Dim("batch")}
        images = dict(batch)
        if self.image_size is None:
            patch = self.vpt.backbone.patch_size
            images |= {2: patch * Dim("rows"), 3: patch * Dim("columns")}
        return (images,) if self.num_tasks is None else (images, batch)

    def comparisons(self) -> Iterator[tuple[Tensor, ...]]:
        """Inputs to compare the file with the model on: one image and several, of all tasks, and of several sizes."""
        patch, (height, width) = self.vpt.backbone.patch_size, self.vpt.backbone.image_size
        sizes = [(height, width), (height + 2 * patch, width + patch), (patch, width)]
        sizes = [self.image_size] if self.image_size else sizes
        for size in sizes:
            if self.batch_size is None:
                yield self._draw(1, size, 0)
            number = self.batch_size or min(max(3, self.num_tasks or 0), MOST_IMAGES)
            for first in range(0, self.num_tasks or 1, number):
                yield self._draw(number, size, first)

    def _draw(self, number: int, size: tuple[int, int], first_task: int) -> tuple[Tensor, ...]:
        """``number`` images, and if there are tasks, those from ``first_task`` on."""
        generator = torch.Generator().manual_seed(number + first_task)
        shape = (number, *self.vpt.backbone.input_shape[:-2], *size)
        if self.image_processor is None:
            images = torch.randn(shape, generator=generator).to(self.vpt.dtype)
        else:
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        if self.num_tasks is None:
            return (images.to(self.vpt.device),)
        tasks = list(islice(cycle(range(self.num_tasks)), first_task, first_task + number))
        return images.to(self.vpt.device), torch.tensor(tasks, device=self.vpt.device)

    def normalize(self, images: Tensor) -> Tensor:
        """What the model takes, computed by the image processor itself."""
        if self.image_processor is None:
            return images
        unchanged = {f"do_{step}": False for step in ("resize", "center_crop", "pad")}
        arrays = list(images.cpu().numpy())
        processed = self.image_processor(arrays, return_tensors="pt", input_data_format="channels_first", **unchanged)
        return processed["pixel_values"].to(self.vpt.device, self.vpt.dtype)

    def options(self) -> dict[str, Any]:
        """Further arguments of the backbone's forward: some must be told to interpolate position embeddings."""
        return interpolation(self.vpt, self.image_size)


def find_image_size(vpt: VPTModel, adapters: Sequence[Any], image_size: object) -> tuple[int, int] | None:
    """The height and width of the images that a model is exported for; None: any.

    Raises:
        AdapterError: it is no size, or the backbone or an adapter takes no images of other sizes.
    """
    fixed = {adapter.image_size for adapter in adapters if adapter is not None and adapter.image_size is not None}
    own = next(iter(fixed), vpt.backbone.image_size)
    if image_size is None:
        return own
    if image_size == "any":
        architecture, reason = vpt.backbone.architecture, None
        if fixed:
            reason = "prompts at this location fit one size"
        elif architecture.video_shape:
            reason = "models of videos take one size"
        elif architecture.overwrites_settings:
            reason = f"the windows of {type(vpt.get_base_model()).__name__} depend on the size"
        if reason:
            raise AdapterError(f'image_size="any" cannot be exported: {reason}. Leave image_size out.')
        return None
    if isinstance(image_size, tuple | list) and len(image_size) == 2 and all(type(n) is int for n in image_size):
        return image_size[0], image_size[1]
    raise AdapterError(f'image_size must be (height, width) in pixels or "any", got {safe_repr(image_size)}.')
