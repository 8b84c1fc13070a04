"""What Inference Endpoints of Hugging Face call: the class that the ``handler.py`` of an adapter imports."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from ..errors import AdapterError, safe_repr
from ..pipelines import pipeline


class EndpointHandler:
    """An adapter for image classification, as an Inference Endpoint: ``EndpointHandler(folder)({"inputs": image})``.

    Args:
        path: the folder with the files of the adapter's repository. Its config names the backbone; a private one needs
            the token in the endpoint's environment (``HF_TOKEN``).
    """

    def __init__(self, path: str | os.PathLike[str] = "") -> None:
        self.pipeline = pipeline(path or ".", "image-classification")

    def __call__(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The labels of an image with their scores, best first.

        Args:
            data: ``inputs``, an image file in base64, or the PIL image that an endpoint makes of a body of type
                ``image/*``; and ``parameters``, such as ``{"top_k": 3}``.

        Returns:
            ``[{"label": "rose", "score": 0.98}, ...]``

        Raises:
            AdapterError: there is no image. Paths and URLs are not opened. ImageError: it cannot be read.
        """
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, Mapping) or not parameters.keys() <= {"top_k", "function_to_apply"}:
            raise AdapterError(f"parameters may contain top_k and function_to_apply, got {safe_repr(parameters)}.")
        labels: list[dict[str, Any]] = self.pipeline(_open_image(data.get("inputs")), **parameters)
        return labels


def _open_image(inputs: Any) -> Any:
    """The PIL image in a request."""
    from PIL import Image  # here, since only endpoints need it

    from ..images.files import FORMATS, image_errors, to_rgb

    if isinstance(inputs, str):
        try:
            inputs = base64.b64decode(inputs, validate=True)
        except ValueError as error:
            raise AdapterError("inputs must be an image file in base64, got another text.") from error
    with image_errors("The image"):
        if isinstance(inputs, bytes):
            inputs = Image.open(BytesIO(inputs), formats=FORMATS)
        if not isinstance(inputs, Image.Image):
            raise AdapterError(f"inputs must be an image, or an image file in base64, got {type(inputs).__name__}.")
        return to_rgb(inputs)
