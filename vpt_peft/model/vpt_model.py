"""VPTModel: a frozen backbone, a set of adapters, and the injector that brings them together."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import EllipsisType
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn

from .. import hub, io
from ..adapter import Adapter, ProjectionCache
from ..backbones import Backbone
from ..config import PromptConfig
from ..errors import AdapterError, RouteError
from ..injection import (
    AdapterBatch,
    FeatureEntry,
    ForwardContext,
    Injector,
    activate,
    disable,
    enter_image,
    is_disabled,
)
from .arguments import (
    BASE,
    HUB_OPTIONS,
    ReadOnlyConfigs,
    check_adapter_name,
    check_adapters_exist,
    check_names,
    check_options,
    find_pixel_values,
    pop_peft_options,
    single_name,
    storage_dtype,
)
from .backbone_checks import (
    check_untrained,
    find_bare_backbone,
    warn_of_float16_on_cpu,
    warn_of_initialised_parts,
    with_head,
)
from .cached_features import enter_features
from .forward import add_loss, check_own_loss, count_labels, mask_padded_logits, mix_adapters, watch_gradients
from .initialisation import check_init, collect_tokens, write_prompts
from .modes import evaluating
from .pretrained import PreTrainedAdapterModel
from .saving import adapter_folder, check_endpoint, check_repository, save_adapters
from .status import ModelStatus, get_status


class VPTModel(PreTrainedAdapterModel):
    """A frozen vision transformer with prompts, made by :func:`get_vpt_model` or :meth:`from_pretrained`.

    It is called like its backbone and answers with the prompts and head of the active adapter. The backbone itself,
    called directly, is unchanged.

    Args:
        model: a supported vision transformer of ``transformers``; it is frozen until :meth:`unload`.
        config: configuration of the first adapter.
        adapter_name: name of the first adapter.
        labels: as in :meth:`add_adapter`.

    Raises:
        UnsupportedModelError, AdapterError, ConfigError, RouteError: and the model is unchanged.
    """

    def __init__(self, model: nn.Module, config: PromptConfig, adapter_name: str = "default", **labels: Any) -> None:
        check_adapter_name(adapter_name)
        pop_peft_options("get_vpt_model", labels)
        config = hub.add_provenance(config, backbone := find_bare_backbone(model))
        backbone = with_head(backbone, config.task_type, labels)
        adapter = Adapter(config, backbone, labels)
        warn_of_float16_on_cpu(backbone, stacklevel=3)  # before anything is changed: warnings may be errors
        warn_of_initialised_parts(backbone, adapter)
        self._build(backbone, io.take_fingerprint(backbone), adapter_name, adapter, training=model.training)

    def _build(
        self, backbone: Backbone, fingerprint: io.Fingerprint, adapter_name: str, adapter: Adapter, training: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self._fingerprint = fingerprint
        self._injector: Injector | None = Injector(backbone)
        self._modules["base_model"] = backbone.model
        self._active_adapter = adapter_name
        # In a list, so that torch.compile guards on the adapter's shapes and not on its name.
        self._active_list: list[Adapter] = []
        self._serving: list[object] = []  # one item for each open serving()
        self._caches: dict[str, ProjectionCache] = {}  # by adapter, while serving
        self._feature_entries: dict[int, FeatureEntry] = {}  # of cached features, by key
        self.training = training
        self.adapters = nn.ModuleDict()
        try:
            self._insert(adapter_name, adapter)
            self.set_adapter(adapter_name)
            self.train(training)
        except BaseException:
            self._injector.remove()
            raise

    def __getstate__(self) -> dict[str, Any]:
        injector = self._injector  # copies and pickles of the backbone are bare, see ForwardOverride
        return {**self.__dict__, "_injector": injector and injector.settings, "_serving": [], "_caches": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = state["_injector"]
        super().__setstate__({**state, "_injector": None})  # type: ignore[no-untyped-call]
        if settings is not None:
            self._injector = Injector(self.backbone, settings)
            for adapter in self._adapters.values():
                self._injector.add_overrides(adapter.overridden_paths)

    def __setattr__(self, name: str, value: Any) -> None:
        is_new = name not in self.__dict__ and not hasattr(type(self), name) and name not in ("base_model", "adapters")
        if (
            is_new
            and not name.startswith("_")
            and (isinstance(value, nn.Module | nn.Parameter) or hasattr(self._modules.get("base_model"), name))
        ):
            raise AdapterError(
                f"'{name}' cannot be set on a VPTModel, which would ignore it and not save it. Change the backbone "
                "before get_vpt_model() or after unload(); an adapter's own head is in vpt.adapters[name].head."
            )
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # as in PEFT
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        check_backbone: bool = True,
        **source: Any,
    ) -> VPTModel:
        """Loads a saved adapter, with its head and labels, onto a backbone, in eval mode.

        Args:
            model: the backbone that the adapter was trained on, freshly loaded.
            model_id: folder or Hub repository of the adapter, or of one with a single adapter in a subfolder.
            is_trainable: False: the adapter is frozen, for inference.
            dtype: precision of the adapter's tensors; None: float32. ``torch_dtype`` is its older name.
            check_backbone: False: loads onto another backbone than the one the adapter was trained on, as far as
                shapes permit.
            source: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, for the Hub. Options of
                PEFT's method that make no difference here are accepted too.

        Raises:
            CheckpointError: the folder is incomplete or damaged, or the adapter was made for another backbone.
            UnsupportedModelError, AdapterError, ConfigError: and the model is unchanged.
        """
        check_adapter_name(adapter_name)
        dtype = storage_dtype(dtype, torch_dtype)
        source = check_options("VPTModel.from_pretrained", source, HUB_OPTIONS)
        backbone = find_bare_backbone(model)
        with hub.pulled(model_id, **source) as folder, io.open_folder(folder) as saved:
            backbone = with_head(backbone, saved.config.task_type, saved.labels)
            fingerprint = io.take_fingerprint(backbone)
            adapter = io.load_adapter(saved, backbone, fingerprint if check_backbone else None, is_trainable, dtype)
        warn_of_float16_on_cpu(backbone, stacklevel=2)
        hub.warn_if_revision_differs(adapter.config, model)
        vpt = cls.__new__(cls)
        vpt._build(backbone, fingerprint, adapter_name, adapter, training=False)
        return vpt

    # -- forward pass -----------------------------------------------------------------------------------------------

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
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        cached_features: Tensor | None = None,
        cache_key: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the backbone with the active adapter, or each image with its own. The output is the backbone's own.

        Args:
            pixel_values: ``(num_images, num_channels, height, width)``, from the backbone's image processor; for
                SigLIP 2, patches, with ``pixel_attention_mask`` and ``spatial_shapes``; for models of videos, videos
                ``(num_videos, num_frames, num_channels, height, width)``.
            pixel_values_videos: the name of the videos in V-JEPA 2, in place of ``pixel_values``.
            labels: class numbers ``(num_images,)``, or ``(num_images, height, width)`` for segmentation, or what the
                task's loss takes, as a list of boxes and classes for detection; the output then contains the loss.
            adapter_names: the adapter of each image, ``"__base__"`` for the bare backbone, in one forward pass.
                ``logits`` are padded with ``-inf``; ``num_labels`` is the number of labels of each row. The active
                adapter and :meth:`disable_adapter` then have no effect.
            input_ids, attention_mask: texts of a dual encoder (CLIP, SigLIP), in any number; with ``return_loss=True``,
                the output contains its loss for pairs of images and texts.
            cached_features, cache_key: in place of ``pixel_values``, a batch of
                :func:`~vpt_peft.training.cache_features`: only the layers behind the features run.

        Raises:
            AdapterError: an argument does not match the adapters; RouteError: prompts did not reach a layer.
        """
        self._check_loaded()
        if pixel_values is None and input_ids is not None:
            raise AdapterError(
                "pixel_values must be given with input_ids, got None. For texts alone, use vpt.get_text_features(...)."
            )
        optional = {
            "bool_masked_pos": bool_masked_pos, "interpolate_pos_encoding": interpolate_pos_encoding,
            "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
            "pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes, "input_ids": input_ids,
            "attention_mask": attention_mask,
        }  # fmt: skip
        kwargs |= {name: value for name, value in optional.items() if value is not None}
        cached = None
        if cached_features is not None or cache_key is not None:
            given = {
                **kwargs, "pixel_values": pixel_values, "pixel_values_videos": pixel_values_videos,
                "adapter_names": adapter_names, "disable_adapter()": is_disabled(self),
            }  # fmt: skip
            entries = self._feature_entries
            cached = enter_features(cached_features, cache_key, entries, self._active, self.backbone, given)
            pixel_values = torch.zeros(1, *cached.entry.input_shape, device=self.device, dtype=self.dtype)
        else:
            pixel_values = find_pixel_values(self.backbone, pixel_values, pixel_values_videos)
        if labels is not None and adapter_names is not None:
            raise AdapterError(
                "labels cannot be given with adapter_names: tasks differ in labels. Train one at a time."
            )

        head = self.backbone.head
        disabled = adapter_names is None and is_disabled(self)
        if labels is not None and head.own_loss:
            if not disabled:
                check_own_loss(self.backbone, self._active)
            kwargs["labels"] = labels
        num_images = (pixel_values if cached is None else cached.features).shape[0]
        context = None if disabled else self._make_context(num_images, adapter_names)
        if context is not None:
            context.cached = cached
        num_labels = None  # counted now: another thread may delete an adapter during the forward pass
        if adapter_names is not None:
            num_labels = count_labels(self._adapters, adapter_names, self.backbone)
        model = self.backbone.original if disabled else self.base_model
        with activate(context):
            output = model(**{self.main_input_name: pixel_values}, return_dict=True, **kwargs)
        if context is not None:
            self._check_layers_reached(context)
            watch_gradients(output, context)
        if labels is not None and not head.own_loss:
            config = copy.copy(self.base_model.config) if disabled else self.config  # the loss writes into it
            output = add_loss(output, labels, self.loss_function, config, kwargs)
        if num_labels is not None and head.label_layers:
            mask_padded_logits(output, num_labels)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def get_image_features(
        self, pixel_values: Tensor | None = None, *, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """The features of images in a dual encoder (CLIP, SigLIP), with prompts: as the backbone's own method.

        Args:
            pixel_values, adapter_names: as in :meth:`forward`.
            kwargs: of the backbone's method.

        Returns:
            The output of the vision model, with the features ``(num_images, dim)`` as ``pooler_output``.

        Raises:
            AdapterError: the backbone is no dual encoder, or an argument does not match the adapters.
        """
        get_features = self._dual_encoder("get_image_features")
        pixel_values = find_pixel_values(self.backbone, pixel_values)
        context = None
        if adapter_names is not None or not is_disabled(self):
            context = self._make_context(pixel_values.shape[0], adapter_names)
            pixel_values = enter_image(context, pixel_values)
        with activate(context):
            output = get_features(pixel_values=pixel_values, **{**kwargs, "return_dict": True})
        if context is not None:
            self._check_layers_reached(context)
            watch_gradients(output, context)
        return output if kwargs.get("return_dict", True) else output.to_tuple()

    def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
        """The features of texts in a dual encoder (CLIP, SigLIP): the backbone's own method.

        Prompts do not change them; copies of modules of the text model (``modules_to_save``) do.

        Raises:
            AdapterError: the backbone is no dual encoder.
        """
        get_features = self._dual_encoder("get_text_features")
        context = None if is_disabled(self) else ForwardContext(self.backbone, 0, [AdapterBatch(self._active)], False)
        with activate(context):
            return get_features(*args, **kwargs)

    @property
    def _is_dual_encoder(self) -> bool:
        return self.backbone.head.task_type == "ZERO_SHOT_IMAGE_CLASSIFICATION"

    def _dual_encoder(self, method: str) -> Any:
        """A method of a dual encoder."""
        self._check_loaded()
        if not self._is_dual_encoder:
            raise AdapterError(
                f"{method}() needs a model of images and texts, such as CLIPModel, got "
                f"{type(self.base_model).__name__}. Call the model itself."
            )
        return getattr(self.base_model, method)

    def _make_context(self, num_images: int, adapter_names: Sequence[str] | None) -> ForwardContext:
        assert self._injector is not None
        if not torch.compiler.is_compiling():
            self._injector.check_modules()
        if adapter_names is not None:
            if self.backbone.has_added_head and BASE in adapter_names:
                raise AdapterError(
                    f"{type(self.backbone.original).__name__} has no head of its own for images of '{BASE}'. "
                    "Call the bare backbone for those, inside disable_adapter()."
                )
            batches = mix_adapters(self._adapters, adapter_names, num_images)
        else:
            batches = [AdapterBatch(self._active)]
            if self._serving and not self.training and not self._active.owns_backbone_parts:
                batches[0].cache = self._caches.setdefault(self._active_adapter, ProjectionCache())
        return ForwardContext(self.backbone, num_images, batches, self.training)

    def _check_layers_reached(self, context: ForwardContext) -> None:
        expected = sum(any(context.plans(layer.index)) for layer in self.backbone.layers)
        if context.layers_reached != expected:
            raise RouteError(
                f"Prompts must reach {expected} layers, but reached {context.layers_reached}: the backbone skipped "
                "some, or its layers were replaced after the adapter was attached. Unload and attach it again."
            )
        if not context.image_reached and any(batch.adapter and batch.adapter.is_in_image for batch in context.batches):
            raise RouteError(
                "Prompts must reach the image, but did not: the forward of the model or of its patch embedding was "
                "replaced after the adapter was attached. Unload and attach it again."
            )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model answers as the bare backbone with its own head, in this thread and this task of
        an event loop."""
        with disable(self):
            yield

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A context in which keys and values of prompts are kept between calls, and computed again if they change.

        It speeds up calls without gradients, in eval mode and outside ``torch.compile`` and autocast. All results are
        the same as without it, unless weights of the frozen backbone are overwritten past torch's version counter.
        """
        entry = object()
        self._serving.append(entry)
        try:
            yield
        finally:
            self._serving.remove(entry)
            if not self._serving:
                self._caches.clear()

    @property
    def routes(self) -> dict[int, str]:
        """How the prompts of the active adapter are computed: ``{layer: "tokens", "key_value", "prefix" or "add"}``.

        Empty for ``location="border"`` and ``"channel"``, whose prompts are in the image and not in layers.
        """
        return {layer: plan.route for layer, plan in enumerate(self._active.plan) if plan is not None}

    # -- adapters ---------------------------------------------------------------------------------------------------

    @property
    def _adapters(self) -> dict[str, Adapter]:
        return self.adapters._modules  # type: ignore[return-value]

    @property
    def _active(self) -> Adapter:  # type: ignore[override]
        return self._active_list[0]

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:  # type: ignore[override]  # as in PEFT
        """The name of the active adapter in a list, as in PEFT."""
        return [self._active_adapter]

    @property
    def peft_config(self) -> dict[str, PromptConfig]:  # type: ignore[override]
        """The config of each adapter. Changing the dictionary raises AdapterError."""
        return ReadOnlyConfigs({name: adapter.config for name, adapter in self._adapters.items()})

    @property
    def active_config(self) -> PromptConfig:
        """The config of the active adapter."""
        return self._active.config

    def add_adapter(  # type: ignore[override]  # as in PEFT
        self,
        adapter_name: str,
        config: PromptConfig | None = None,
        *,
        peft_config: PromptConfig | None = None,
        **labels: Any,
    ) -> None:
        """Adds an adapter with new prompts. The active adapter remains active.

        Args:
            config: its configuration. ``peft_config`` is PEFT's name for it.
            labels: ``num_labels``, ``id2label``, ``label2id`` or ``problem_type`` where they differ from the model's.
                Ids may be strings, and names numbers; one of ``id2label`` and ``label2id`` is enough. With another
                number of labels, the head is initialised, and ``problem_type`` is not inherited.

        Raises:
            AdapterError: the name is taken, or not valid; ConfigError: the config or the labels are not valid.
        """
        self._check_loaded()
        check_adapter_name(adapter_name)
        if adapter_name in self.adapters:
            raise AdapterError(f"An adapter '{adapter_name}' exists already. Delete it first, or choose another name.")
        pop_peft_options("add_adapter", labels)
        config = hub.add_provenance(peft_config if config is None else config, self.backbone)
        self._insert(adapter_name, Adapter(config, self.backbone, labels))

    def load_adapter(  # type: ignore[override]  # as in PEFT
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        check_backbone: bool = True,
        **source: Any,
    ) -> None:
        """Adds a saved adapter. If one of that name and an equal config exists, its tensors are replaced.

        Args:
            model_id: folder or Hub repository of the adapter.
            is_trainable: False: the adapter stays frozen, also when it becomes active.
            dtype: precision of its tensors; None: float32. ``torch_dtype`` is its older name.
            check_backbone: False: loads an adapter that was trained on another backbone, as far as shapes permit.
            source: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, for the Hub.

        Raises:
            CheckpointError: the folder is incomplete or damaged, the adapter was made for another backbone, or one of
                that name and another config exists. Nothing has changed.
        """
        self._check_loaded()
        check_adapter_name(adapter_name)
        dtype = storage_dtype(dtype, torch_dtype)
        source = check_options("load_adapter", source, HUB_OPTIONS)
        fingerprint = self._fingerprint if check_backbone else None
        with hub.pulled(model_id, **source) as folder, io.open_folder(folder) as saved:
            if adapter_name in self.adapters:
                io.reload_adapter(self._adapters[adapter_name], saved, self.backbone, fingerprint)
                return
            adapter = io.load_adapter(saved, self.backbone, fingerprint, is_trainable, dtype)
        hub.warn_if_revision_differs(adapter.config, self.base_model)
        self._insert(adapter_name, adapter)

    def _insert(self, adapter_name: str, adapter: Adapter) -> None:
        assert self._injector is not None
        self._injector.add_overrides(adapter.overridden_paths)
        adapter.requires_grad_(False)
        self.adapters._modules[adapter_name] = adapter.train(self.training)  # item assignment refuses some names

    def set_adapter(  # as in PEFT
        self, adapter_name: str | Sequence[str], inference_mode: bool = False
    ) -> None:
        """Makes an adapter the active one. Only that trains, unless it was loaded with ``is_trainable=False``.

        Args:
            adapter_name: a name, or a list of one.
            inference_mode: True: it does not train either.
        """
        self._check_loaded()
        name = single_name(adapter_name)
        check_adapters_exist(self.adapters, [name])  # type: ignore[arg-type]
        for previous in self._active_list:
            previous.requires_grad_(False)
        adapter = self._adapters[name]
        adapter.requires_grad_(not (inference_mode or adapter.config.inference_mode))
        self._active_adapter = name
        self._active_list = [adapter]

    def delete_adapter(self, adapter_name: str) -> None:  # type: ignore[override]  # as in PEFT
        """Deletes an adapter. If it was the active one, the first of the others becomes active, with a warning."""
        self._check_loaded()
        check_adapters_exist(self.adapters, [adapter_name])  # type: ignore[arg-type]
        others = [name for name in self.adapters if name != adapter_name]
        if not others:
            raise AdapterError(f"'{adapter_name}' is the only adapter. Use unload() to get the bare backbone back.")
        del self.adapters[adapter_name]
        self._caches.pop(adapter_name, None)
        if adapter_name == self._active_adapter:
            self.set_adapter(others[0])
            warnings.warn(
                f"The active adapter '{adapter_name}' was deleted; '{others[0]}' is active now.", stacklevel=2
            )

    def init_prompts(
        self, dataloader: Iterable[Any], method: str = "sample", num_images: int = 512, **kwargs: Any
    ) -> None:
        """Lets the prompts of the active adapter start as tokens of training images, before they are trained; the keys
        of a prefix, as the keys of such tokens.

        The prompts of a layer become vectors made of the image tokens (without ``[CLS]``) that the bare backbone has at
        the input of that layer, independently for each layer (Wang et al., Revisiting the Power of Prompt for Visual
        Tuning, ICML 2024). ``torch.manual_seed`` determines the result. Nothing else of the model changes. Tokens are
        usually much larger than random prompts, so that they may need a larger learning rate.

        Args:
            dataloader: yields batches with images ``(num_images, num_channels, height, width)``: dicts with
                ``pixel_values``, tuples or lists with the images first, or tensors; the rest of a batch is ignored.
                For models of videos, videos as in :meth:`forward`.
                Shuffle it, unless it has no more than ``num_images`` images.
            method: ``"sample"``: random image tokens; ``"kmeans"``: the centres of k-means over 32 random image tokens
                per prompt, which needs scikit-learn; ``"mean"``: each prompt is the mean over the image tokens of one
                random image.
            num_images: number of images to read. Only the tokens that ``method`` needs are kept in memory.
            kwargs: of the forward call, such as ``interpolate_pos_encoding=True`` for images of another size.

        With ``shared=True``, tokens are drawn from those of all layers with these prompts. Several processes must call
        it together, each with as many batches, and all get the prompts of process 0.

        Raises:
            ConfigError: an argument is not valid, or the adapter has no prompts or projected ones (``projection_dim``).
            AdapterError: a batch contains no images, there are fewer image tokens (``"mean"``: images) than prompts, or
                tokens are not finite.
            ImportError: scikit-learn is missing. In all cases, nothing has changed.
        """
        self._check_loaded()
        adapter = self._active
        check_init(adapter, self.backbone, method, num_images)

        def run(images: Tensor) -> None:
            call = self.get_image_features if self._is_dual_encoder else self
            call(images.to(self.device, self.dtype), **kwargs)

        with evaluating(self), self.disable_adapter():
            tokens = collect_tokens(run, self.backbone, adapter, dataloader, method, num_images)
        write_prompts(adapter, self.backbone, tokens)

    def unload(self) -> Any:
        """Removes all adapters, hooks and overrides, and returns the original backbone."""
        self._check_loaded()
        assert self._injector is not None
        self._injector.remove()
        self._injector = None
        return self.backbone.original

    def requires_grad_(self, requires_grad: bool = True) -> VPTModel:
        """Makes the active adapter trainable, or freezes it. The backbone stays frozen."""
        self._active.requires_grad_(requires_grad)
        return self

    def _check_loaded(self) -> None:
        if self._injector is None:
            raise AdapterError("This VPTModel was unloaded and has no backbone any more. Make a new one.")

    # -- inspection -------------------------------------------------------------------------------------------------

    def get_base_model(self) -> Any:
        """The bare backbone with its own head."""
        return self.backbone.original

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """The tensors of an adapter, by default the active one; see :func:`~vpt_peft.get_adapter_state_dict`."""
        return get_adapter_state_dict(self, self._active_adapter if adapter_name is None else adapter_name)

    def get_model_status(self) -> ModelStatus:
        """Adapters, and which of them is active and trains, as PEFT's ``get_model_status``."""
        trainable, total = self.get_nb_trainable_parameters()
        model_type = type(self.backbone.original).__name__
        return get_status(self._adapters, self._active_adapter, not is_disabled(self), model_type, trainable, total)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of parameters that train, and of all."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Prints the numbers of :meth:`get_nb_trainable_parameters`, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # -- saving -----------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]  # as in PEFT
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

        All that loading checks is checked before the first file is written. Then each adapter is replaced atomically,
        but not the set of them: after a crash, each folder holds its old adapter or its new one.

        Args:
            selected_adapters: None: all.
            image_processor: saved beside the adapters, so that ``AutoImageProcessor`` finds it there; for models of
                videos, a video processor, for ``AutoVideoProcessor``.
            is_main_process: False: writes nothing, and only takes part in gathering sharded tensors.
            state_dict: the model's state dict, gathered from several processes, or None. If it is given, as by
                ``Trainer``, a checkpoint of the active adapter is saved: its weights are also in
                ``model.safetensors``, with the keys of the model's state dict.
            save_function: accepted for compatibility and not used: files are always replaced atomically.
            card_details: see :meth:`create_or_update_model_card`.

        Raises:
            CheckpointError: an adapter could not be loaded again, as with tensors that are not finite; a folder
                contains a full model, or is a file; or ``state_dict`` lacks tensors. Nothing was saved.
            ConfigError: labels or details of the card are not valid. Nothing was saved.
        """
        self._check_loaded()
        card_details = check_options("save_pretrained", card_details, hub.CARD_DETAILS)
        is_checkpoint = state_dict is not ...
        names = [self._active_adapter] if is_checkpoint else list(self.adapters)
        names = names if selected_adapters is None else check_names(selected_adapters)
        check_adapters_exist(self.adapters, names)  # type: ignore[arg-type]
        if not names:
            raise AdapterError(f"selected_adapters must name some of {', '.join(self.adapters)}, got none.")
        check_untrained(self.backbone, self._fingerprint)
        save_adapters(
            {name: self._adapters[name] for name in names},
            save_directory,
            self._fingerprint,
            checkpointed=(self._active_adapter if self._active_adapter in names else names[0])
            if is_checkpoint
            else None,
            model_state=None if state_dict is ... else state_dict,
            image_processor=image_processor,
            is_main_process=is_main_process,
            card_details=card_details,
        )

    def create_or_update_model_card(
        self, output_dir: str | os.PathLike[str], adapter_name: str = "default", **details: Any
    ) -> None:
        """Writes the model card of an adapter, or updates the generated part and the metadata of an existing one.

        Args:
            output_dir: as for :meth:`save_pretrained`; created if it does not exist.
            details: ``model_id``, ``training_data``, ``metrics`` (``{name: number or text}``), ``hyperparameters``
                (``{name: value}``) and ``license``.
        """
        details = check_options("create_or_update_model_card", details, hub.CARD_DETAILS)
        check_adapters_exist(self.adapters, [adapter_name])  # type: ignore[arg-type]
        subfolder = None if adapter_name == "default" else adapter_name
        hub.write_card(
            self._adapters[adapter_name], adapter_folder(output_dir, adapter_name), subfolder=subfolder, **details
        )

    def push_to_hub(  # type: ignore[override]  # as in PEFT
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
        handler: bool = False,
        **card_details: Any,
    ) -> CommitInfo:
        """Saves adapters and uploads them; unchanged files are not uploaded again.

        Args:
            repo_id: the repository, such as "me/birds-vpt"; created if it does not exist.
            private, revision, create_pr, token, commit_message: as in ``huggingface_hub``.
            handler: also pushes a ``handler.py`` and its ``requirements.txt``, by which an Inference Endpoint of
                Hugging Face runs the adapter; for image classification.

        Raises:
            AdapterError: an endpoint cannot run the adapter.
            CheckpointError: the repository contains a full model, which could not be loaded any more. Nothing was
                uploaded.
            huggingface_hub.errors.HfHubHTTPError: from the Hub client.
        """
        self._check_loaded()
        card_details = check_options("push_to_hub", card_details, hub.CARD_DETAILS)
        names = list(self.adapters) if selected_adapters is None else check_names(selected_adapters)
        check_adapters_exist(self.adapters, names)  # type: ignore[arg-type]
        if handler:
            check_endpoint({name: self._adapters[name] for name in names})
        with TemporaryDirectory() as folder, hub.suggest_login():
            repo_id = hub.full_repo_id(repo_id, private, token)
            commit = check_repository(names, repo_id, revision, token)
            if commit:
                hub.fetch_cards(repo_id, folder, commit, token)
            card_details = {**card_details, "model_id": card_details.get("model_id") or repo_id}
            self.save_pretrained(folder, selected_adapters, image_processor, **card_details)
            if handler:
                hub.write_endpoint_files(Path(folder))
            for name in names:
                hub.warn_if_local(self._adapters[name].config.base_model_name_or_path)
            return hub.push(
                Path(folder), repo_id, private=private, revision=revision, create_pr=create_pr, token=token,
                commit_message=commit_message,
            )  # fmt: skip


def get_vpt_model(model: nn.Module, config: PromptConfig, adapter_name: str = "default", **labels: Any) -> VPTModel:
    """Freezes a vision transformer and adds prompts and a head that are trained.

    A model without a head gets a linear classifier with ``PromptConfig(task_type="IMAGE_CLASSIFICATION")``, for videos
    ``"VIDEO_CLASSIFICATION"``, and labels; with ``"SEMANTIC_SEGMENTATION"`` a linear layer on the patch tokens.

    Args:
        model: a supported model of ``transformers``, such as ``ViTForImageClassification``.
        config: what to train; ``PromptConfig()`` is VPT-Deep with 10 prompts per layer.
        adapter_name: name of the adapter.
        labels: ``num_labels``, ``id2label``, ``label2id`` or ``problem_type`` where they differ from the model's.

    Raises:
        VPTError: the model or the config is not supported; the model is unchanged.
    """
    return VPTModel(model, config, adapter_name, **labels)


def get_adapter_state_dict(model: VPTModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter, detached but not copied, with the keys of its file."""
    check_adapters_exist(model.adapters, [adapter_name])  # type: ignore[arg-type]
    return io.gather_state_dict(model._adapters[adapter_name])


def set_adapter_state_dict(model: VPTModel, state_dict: dict[str, Tensor], adapter_name: str = "default") -> None:
    """Copies tensors into an adapter, all or none.

    Raises:
        CheckpointError: lists every missing, unexpected and mismatched tensor; nothing has changed.
    """
    check_adapters_exist(model.adapters, [adapter_name])  # type: ignore[arg-type]
    io.load_state_dict(model._adapters[adapter_name], state_dict)
