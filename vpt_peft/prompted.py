"""PromptedModel: a frozen backbone that answers with the prompts and head of whichever adapter is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .adapter import Adapter
from .backbones import Backbone
from .batch import begin_pass, count_labels, tell_labels
from .errors import AdapterError, RouteError
from .passes import Pass, current
from .pretrained import AdaptedModel
from .routes import Attachment, ProjectionCache


class PromptedModel(AdaptedModel):
    """A frozen backbone with adapters, as it runs: the forward pass, and the modes that it can be in.

    Which adapters there are, and where they come from, is :class:`~vpt_peft.VPTModel`'s business.
    """

    def _attach(self, backbone: Backbone, training: bool) -> None:
        self._backbone = backbone
        self._attachment: Attachment | None = Attachment(backbone)
        self._num_disabled = 0
        self._caches: dict[str, ProjectionCache] | None = None
        self._active_adapter = ""
        self._answering: list[Adapter] = []
        self._modules["base_model"] = backbone.model
        self.adapters = nn.ModuleDict()
        self.training = training

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the backbone with the active adapter, or each image with its own. Output is the backbone's own.

        Args:
            pixel_values: ``(num_images, num_channels, height, width)``, as the backbone's image processor makes them.
            labels: ``(num_images,)`` class numbers, ``(num_images, height, width)`` for segmentation, or what the
                task's loss takes; the output then holds the loss.
            adapter_names: the adapter of each image, ``"__base__"`` for the bare backbone; in one pass. ``logits``
                are padded with ``-inf`` behind a task's labels; ``num_labels`` says how many labels each row has.
                Which adapter is active, and :meth:`disable_adapter`, do not matter then.

        Raises:
            AdapterError: an argument does not fit the adapters; RouteError: prompts did not reach a layer.
        """
        self._check_attached()
        optional = {
            "bool_masked_pos": bool_masked_pos, "interpolate_pos_encoding": interpolate_pos_encoding,
            "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
        }  # fmt: skip
        kwargs |= {name: value for name, value in optional.items() if value is not None}
        if pixel_values is None:
            raise AdapterError("pixel_values must be given, got None. Use the backbone's image processor to make them.")
        if self._num_disabled and adapter_names is None:
            kwargs |= {"labels": labels} if labels is not None else {}
            return self.base_model(pixel_values, return_dict=return_dict, **kwargs)
        if labels is not None and adapter_names is not None:
            raise AdapterError(
                "labels cannot be given with adapter_names: tasks differ in labels. Train one at a time."
            )

        head = self._backbone.head
        if labels is not None and head.own_loss:
            kwargs["labels"] = self._checked_labels(labels)
        running = self._begin_pass(pixel_values.shape[0], adapter_names)
        num_labels = None  # counted now: another thread may delete an adapter before its images are answered
        if adapter_names is not None:
            num_labels = count_labels(self._adapters, adapter_names, self.base_model.config.num_labels)
        with current.entered(running):
            output = self.base_model(pixel_values, return_dict=True, **kwargs)
        self._check_reached(running)
        if labels is not None and not head.own_loss:
            output = self._with_loss(output, labels, kwargs)
        if num_labels is not None and head.label_layers:
            tell_labels(output, num_labels)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _begin_pass(self, num_images: int, adapter_names: Sequence[str] | None) -> Pass:
        if adapter_names is not None:
            return begin_pass(self._adapters, adapter_names, num_images, self.training)
        group = self._active.group()
        if self._caches is not None and not self.training and not self._active.owns_backbone_parts:
            group.keep = self._caches.setdefault(self._active_adapter, ProjectionCache()).keep
        return Pass(num_images, [group], self.training)

    def _check_reached(self, running: Pass) -> None:
        expected = sum(running.meets(layer.index) for layer in self._backbone.layers)
        if running.num_reached != expected:
            raise RouteError(
                f"Prompts must reach {expected} layers, but reached {running.num_reached}: the backbone skipped some, "
                "or its layers were replaced after the adapter was attached. Unload and attach it again."
            )

    def _checked_labels(self, labels: Tensor) -> Tensor:
        """Labels for a loss that the backbone computes itself, with a look at its own number of labels."""
        counts = (self.base_model.config.num_labels, self._active.num_labels)
        if self._backbone.head.label_layers and 1 in counts:
            raise AdapterError(
                f"The loss of {type(self.base_model).__name__} needs two labels or more, got {counts[0]} in the "
                f"backbone's config and {counts[1]} in the adapter's. Load the backbone with more, or leave labels out."
            )
        return labels

    def _with_loss(self, output: Any, labels: Tensor, kwargs: dict[str, Any]) -> Any:
        """The backbone's own loss function, told of the adapter's labels instead of the backbone's."""
        if "logits" not in output:
            raise AdapterError(
                f"labels need a model with a classifier, got {type(self.base_model).__name__}. Leave labels out."
            )
        counted = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
        loss = self.loss_function(labels, output.logits, self.config, **counted)
        return type(output)(**{**output, "loss": loss})

    def _check_attached(self) -> None:
        if self._attachment is None:
            raise AdapterError("This VPTModel was unloaded and has no backbone any more. Make a new one.")

    @property
    def _adapters(self) -> dict[str, Adapter]:
        return self.adapters._modules  # type: ignore[return-value]

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While it is open, prompts' keys and values are computed once for many calls, not once a call.

        Only calls without gradients, in eval mode and outside ``torch.compile`` and autocast gain by it; all others
        are answered as ever. Changed prompts or weights are noticed, unless written through ``tensor.data``.
        """
        before, self._caches = self._caches, {}
        try:
            yield
        finally:
            self._caches = before

    @property
    def routes(self) -> dict[int, str]:
        """``{layer: "tokens" or "key_value"}``: how the active adapter's prompts reach the layers that they do."""
        return {layer: step.route for layer, step in enumerate(self._active.steps) if step is not None}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While it is open, the model answers as the bare backbone with its own head."""
        self._num_disabled += 1
        try:
            yield
        finally:
            self._num_disabled -= 1
