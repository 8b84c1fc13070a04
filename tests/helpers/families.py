"""One tiny random model of each class of image backbones, and prompts concatenated by hand as a reference."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from vpt_peft import PromptConfig, VPTModel, get_vpt_model

IMAGE_SIZE, PATCH_SIZE, NUM_LABELS, NUM_IMAGES = 32, 8, 5, 3
LAYERS = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES = {**LAYERS, "intermediate_size": 40, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Adapt = Callable[[nn.Module, int, int, Any, Any], AbstractContextManager[Arguments]]


@dataclass(frozen=True)
class Family:
    """A class of models, and where it keeps what the reference needs.

    Attributes:
        model_class, config_class: names in ``transformers``, or full names with their module.
        config: arguments of the config of a tiny model.
        num_prefix_tokens: number of tokens before the patches.
        layers: path of the list of layers, or of stages.
        blocks: where layers are in stages: path of the list of layers in a stage.
        final_norm: path of the norm behind them; None: there is none.
        classifier: path of the classifier; None: the class has none.
        joins_class_token: the classifier reads ``[CLS]`` joined with the mean of the patches.
        normed: the classifier reads tokens behind the final norm.
        pooled_norm: path of the norm of the mean over tokens.
        patch_norm: path of the norm of embedded patches.
        since: the first version of transformers that has the class.
        package: a package that it needs besides.
        adapt: ``adapt(layer, num_prefix_tokens, num_prompts, args, kwargs)``: a context in which the layer takes
            prompts, and its arguments in it: for masks, position biases and rotary embeddings.
        build: ``build(config)`` makes the model, in place of ``model_class(config)``.
        inputs: further arguments of the forward call.
        mixes_biases: adapters with different biases can be mixed in a batch.
        published: arguments of the config of a model of published size.
        same_layers: another entry has the same layers, so that it is not compiled.
        feed: ``feed(images)`` makes the arguments of the forward call, where they are not images and ``inputs``.
        reference: where layers take no further tokens: ``reference(model, prompts, prefixes)``, a context in which the
            layers of a bare model are computed by hand, with prompts by layer or a prefix for each layer. It yields
            what :func:`concatenated` yields.
        key_value_only: a layer has no outputs for prompts.
        first_layers: layers of the width of the patch embedding; None: all of them.
        outputs: names of the outputs that belong to an image each; empty: all of them.
        needs_no_labels: transformers can make a classifier with ``num_labels=0``.
        takes_pixels: the model takes images and embeds their patches itself.
        rectified: path of a layer in front of a ReLU, which gets a large bias, so that not all outputs are 0.
        never_read: a part of the head that transformers has and never calls.
        reads_hidden_states: transformers sets up the hidden states that the head reads at the first call, which cannot
            be part of a graph.
    """

    model_class: str
    config_class: str
    config: Mapping[str, Any] = field(default_factory=lambda: SIZES, hash=False)
    num_prefix_tokens: int = 1
    layers: str = "layers"
    blocks: str | None = None
    final_norm: str | None = "layernorm"
    classifier: str | None = None
    joins_class_token: bool = False
    normed: bool = True
    pooled_norm: str | None = None
    patch_norm: str | None = None
    since: str = "5.12"
    package: str | None = None
    adapt: Adapt | None = None
    build: Callable[[Any], nn.Module] | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mixes_biases: bool = True
    published: Mapping[str, Any] = field(default_factory=dict, hash=False)
    same_layers: bool = False
    feed: Callable[[Tensor], dict[str, Any]] | None = None
    reference: Callable[..., AbstractContextManager[list[Tensor]]] | None = None
    key_value_only: bool = False
    first_layers: tuple[int, ...] | None = None
    outputs: tuple[str, ...] = ()
    needs_no_labels: bool = True
    takes_pixels: bool = True
    rectified: str | None = None
    never_read: str | None = None
    reads_hidden_states: bool = False

    @property
    def missing(self) -> str | None:
        """What is not installed that the class needs."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.model_class} needs {self.package}"
        is_new = Version(transformers.__version__) < Version(self.since)
        return f"{self.model_class} is new in {self.since}" if is_new else None

    def arguments(self, images: Tensor) -> dict[str, Any]:
        """Arguments of the forward call for images ``(num_images, 3, height, width)``."""
        return {"pixel_values": images, **self.inputs} if self.feed is None else self.feed(images)

    def bare(self, **config: Any) -> Any:
        """The tiny model, always the same one, in eval mode."""
        labels = {"num_labels": NUM_LABELS} if self.classifier else {}
        model_config = find_class(self.config_class)(**{**self.config, **labels, **config})
        torch.manual_seed(0)
        model = randomized((self.build or find_class(self.model_class))(model_config)).eval()
        if self.rectified:
            nn.init.constant_(model.get_submodule(self.rectified).bias, 5.0)
        return model

    def full_size(self) -> Any:
        """A model of published size, without weights."""
        with torch.device("meta"):
            return (self.build or find_class(self.model_class))(find_class(self.config_class)(**self.published))

    def find_layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of a model, in order."""
        stages = model.get_submodule(self.layers).children()
        if self.blocks is None:
            return list(stages)
        return [layer for stage in stages for layer in stage.get_submodule(self.blocks).children()]

    @property
    def ends(self) -> dict[str, Any]:
        """What a config needs whose prompts would flow on into layers without their own, if they cannot."""
        return {"carry": False} if self.key_value_only else {}

    @property
    def training_inputs(self) -> dict[str, Any]:
        """Further arguments that let all parts of the head take part: labels for auxiliary heads of segmentation."""
        labels = torch.zeros(NUM_IMAGES, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.long)
        return {**self.inputs, **({"labels": labels} if "Segmentation" in self.model_class else {})}

    def prompted(self, num_tokens: int = 3, **config: Any) -> VPTModel:
        """The tiny model with prompts far enough from zero to be seen."""
        vpt = get_vpt_model(self.bare(), PromptConfig(num_tokens=num_tokens, **config))
        return enlarge(vpt.eval())


def enlarge(vpt: VPTModel, adapter_name: str = "default", seed: int = 1) -> VPTModel:
    """Gives random prompts to an adapter, and other biases."""
    generator = torch.Generator().manual_seed(seed)
    adapter: Any = vpt.adapters[adapter_name]
    with torch.no_grad():
        for parameter in (*adapter.prompts.parameters(), *adapter.prefix.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for parameter in adapter.bias.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return vpt


def find_class(name: str) -> Any:
    """A class of transformers, by its name or its full name."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module) if module else transformers, name)


def randomized(model: Any) -> Any:
    """A model with all of its parameters random, biases, norms, layer scales and tokens included."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim in (2, 4, 5):
                noise = noise * max(parameter[0].numel(), 1) ** -0.5
            elif parameter.ndim == 1:
                is_scale = name.endswith("weight") or "lambda" in name or "gamma" in name
                noise = 0.3 * noise + is_scale
            parameter.copy_(noise)
        for module in model.modules():
            if isinstance(module, nn.ConvTranspose2d):  # its first dimension is that of the inputs
                inputs_of_an_output = module.in_channels / math.prod(module.stride)
                module.weight.mul_((module.out_channels / inputs_of_an_output) ** 0.5)
    return model


def some_images(seed: int = 3, size: int = IMAGE_SIZE) -> Tensor:
    """``(NUM_IMAGES, 3, size, size)``."""
    return torch.randn(NUM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def concatenated(family: Family, model: Any, prompts: Mapping[int, Tensor]) -> Iterator[list[Tensor]]:
    """A context in which prompts stand behind the prefix tokens in the layers of a bare model, and are taken out again
    behind each layer. It uses nothing of vpt_peft.

    Args:
        prompts: fresh prompts by layer, ``(num_prompts, width)``; other layers get what the last ones have become.

    Yields:
        After the forward pass, what the prompts of the last layer have become, ``(num_images, num_prompts, width)``.
    """
    if family.reference is not None:
        with family.reference(model, prompts, ()) as became:
            yield became
        return
    layers = family.find_layers(model)
    prefix = family.num_prefix_tokens
    carried: list[Tensor] = []

    def wrap(index: int, layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            tokens, *rest = args or (kwargs.pop("hidden_states"),)
            fresh = prompts.get(index)
            if fresh is None and not carried:
                return forward(tokens, *rest, **kwargs)
            inserted = carried[0] if fresh is None else fresh.expand(len(tokens), -1, -1)
            number = inserted.shape[1]
            joined = torch.cat([tokens[:, :prefix], inserted, tokens[:, prefix:]], dim=1)
            arguments = (tuple(rest), kwargs)
            adapt = family.adapt(layer, prefix, number, *arguments) if family.adapt else nullcontext(arguments)
            with adapt as (adapted, named):
                output = forward(joined, *adapted, **named)
            hidden = output[0] if isinstance(output, tuple) else output
            carried[:] = [hidden[:, prefix : prefix + number]]
            hidden = torch.cat([hidden[:, :prefix], hidden[:, prefix + number :]], dim=1)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return run

    for index, layer in enumerate(layers):
        layer.forward = wrap(index, layer)
    try:
        yield carried
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def attended_apart(family: Family, model: Any, prefixes: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """A context in which the attention of each layer of a bare model adds the attention to a prefix, keys and values
    ``(num_prompts, num_heads · head_dim)``. It uses nothing of vpt_peft."""
    if family.reference is not None:
        with family.reference(model, {}, prefixes):
            yield
        return
    plain, remaining = nn.functional.scaled_dot_product_attention, iter(prefixes)

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = plain(query, key, value, *args, **kwargs)
        prefix = next(remaining, None)
        if prefix is None:  # the attention of a pooling head
            return output
        heads = [part.unflatten(-1, (-1, query.shape[-1])).transpose(0, 1) for part in prefix]
        shared = [part.repeat_interleave(query.shape[1] // part.shape[0], dim=0) for part in heads]
        return output + plain(query, *(part.expand(len(query), -1, -1, -1) for part in shared))

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain


def run(model: Any, pixel_values: Tensor, family: Family, **kwargs: Any) -> Any:
    """The output of a model, without gradients."""
    with torch.no_grad():
        output = model(**family.arguments(pixel_values), **kwargs)
    return {name: output[name] for name in family.outputs} if family.outputs else output


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    found: list[Tensor] = []
    for value in output.values() if hasattr(output, "values") else output:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | dict):
            found += tensors(value)
    return found


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference between two outputs, relative to the largest value, or absolute if that is below 1."""
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    assert all(own.shape == other.shape for own, other in pairs)
    return max(float((own - other).abs().max() / other.abs().max().clamp(min=1)) for own, other in pairs)


@contextmanager
def _rotated(layer: nn.Module, prefix: int, number: int, args: Any, kwargs: Any) -> Iterator[Arguments]:
    """For rotary embeddings of all tokens (MLCD): prompts are not rotated."""
    (cos, sin), *rest = args
    width = cos.shape[-1]
    cos = torch.cat([cos[:prefix], cos.new_ones(number, width), cos[prefix:]])
    sin = torch.cat([sin[:prefix], sin.new_zeros(number, width), sin[prefix:]])
    yield ([cos, sin], *rest), kwargs


@contextmanager
def _biased(layer: Any, prefix: int, number: int, args: Any, kwargs: Any) -> Iterator[Arguments]:
    """For position biases (Data2Vec), shared by all layers or of each: prompts have none."""

    def pad(bias: Tensor) -> Tensor:
        for dim in (-1, -2):
            before, after = bias.split([prefix, bias.shape[dim] - prefix], dim)
            shape = list(bias.shape)
            shape[dim] = number
            bias = torch.cat([before, bias.new_zeros(shape), after], dim)
        return bias

    shared, attention = kwargs["relative_position_bias"], layer.attention.attention
    own = attention.relative_position_bias if attention.has_relative_position_bias else None
    handle = own.register_forward_hook(lambda module, inputs, bias: pad(bias)) if own is not None else None
    try:
        yield args, {**kwargs, "relative_position_bias": None if shared is None else pad(shared)}
    finally:
        if handle is not None:
            handle.remove()


def _classifier(prefix: str, name: str, **fields: Any) -> Family:
    """A classifier with its encoder at ``prefix``, whose class is named ``{name}ForImageClassification``."""
    layers = fields.pop("layers", "layers")
    return Family(
        f"{name}ForImageClassification", fields.pop("config_class", f"{name}Config"), layers=f"{prefix}.{layers}",
        final_norm=f"{prefix}.layernorm", **{"classifier": "classifier", **fields},
    )  # fmt: skip


DINOV2 = {**LAYERS, "mlp_ratio": 2, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
REGISTERS = {**DINOV2, "num_register_tokens": 2}
PIXIO = {**DINOV2, "n_cls_tokens": 3}
DATA2VEC = {**SIZES, "use_shared_relative_position_bias": True, "use_relative_position_bias": True}
DINOV3 = {**SIZES, "hidden_size": 32, "num_register_tokens": 2}
SAPIENS2 = {**DINOV3, "num_key_value_heads_per_layer": [4, 2, 4]}
SEGMENTER = {
    "num_labels": NUM_LABELS,
    "head_config": {
        "upsample_out_channels": [8],
        "upsample_kernel_sizes": [4],
        "conv_out_channels": [6],
        "conv_kernel_sizes": [1],
    },
}

FAMILIES: dict[str, Family] = {
    "vit": _classifier("vit", "ViT"),
    "vit_model": Family("ViTModel", "ViTConfig", same_layers=True),
    "vit_masked": Family("ViTForMaskedImageModeling", "ViTConfig", {**SIZES, "encoder_stride": 8},
                         layers="vit.layers", same_layers=True),
    "vit_of_mae": _classifier("vit", "ViT", config_class="ViTMAEConfig", same_layers=True),
    "deit": _classifier("deit", "DeiT", num_prefix_tokens=2),
    "deit_with_teacher": Family(
        "DeiTForImageClassificationWithTeacher", "DeiTConfig", {**SIZES, "num_labels": NUM_LABELS},
        num_prefix_tokens=2, layers="deit.layers", same_layers=True,
    ),
    "deit_model": Family("DeiTModel", "DeiTConfig", num_prefix_tokens=2, same_layers=True),
    "deit_masked": Family("DeiTForMaskedImageModeling", "DeiTConfig", {**SIZES, "encoder_stride": 8},
                          num_prefix_tokens=2, layers="deit.layers", same_layers=True),
    "dinov2": _classifier("dinov2", "Dinov2", config=DINOV2, layers="encoder.layer", joins_class_token=True),
    "dinov2_swiglu": _classifier("dinov2", "Dinov2", config={**DINOV2, "use_swiglu_ffn": True},
                                 layers="encoder.layer", joins_class_token=True),
    "dinov2_model": Family("Dinov2Model", "Dinov2Config", DINOV2, layers="encoder.layer", same_layers=True),
    "dinov2_backbone": Family("Dinov2Backbone", "Dinov2Config", {**DINOV2, "out_indices": [2, 3]},
                              layers="encoder.layer"),
    "dinov2_registers": _classifier("dinov2_with_registers", "Dinov2WithRegisters", config=REGISTERS,
                                    num_prefix_tokens=3, layers="encoder.layer", joins_class_token=True,
                                    same_layers=True),
    "dinov2_registers_model": Family("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", REGISTERS,
                                     num_prefix_tokens=3, layers="encoder.layer", same_layers=True),
    "dinov2_registers_backbone": Family(
        "Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig",
        {**REGISTERS, "out_features": ["stage1", "stage2"], "apply_layernorm": False},
        num_prefix_tokens=3, layers="encoder.layer", same_layers=True,
    ),
    "dinov3": Family("DINOv3ViTModel", "DINOv3ViTConfig", {**DINOV3, "use_gated_mlp": True},
                     num_prefix_tokens=3, layers="model.layer"),
    "dinov3_backbone": Family("DINOv3ViTBackbone", "DINOv3ViTConfig",
                              {**DINOV3, "out_features": ["stage1", "stage3"], "apply_layernorm": False},
                              num_prefix_tokens=3, layers="model.layer"),
    "msn": _classifier("vit", "ViTMSN"),
    "msn_model": Family("ViTMSNModel", "ViTMSNConfig", same_layers=True),
    "ijepa": _classifier("ijepa", "IJepa", num_prefix_tokens=0),
    "ijepa_model": Family("IJepaModel", "IJepaConfig", num_prefix_tokens=0, same_layers=True),
    "pixio": Family("PixioModel", "PixioConfig", PIXIO, num_prefix_tokens=3),
    "pixio_backbone": Family("PixioBackbone", "PixioConfig", {**PIXIO, "out_features": ["stage1", "stage3"]},
                             num_prefix_tokens=3, layers="pixio.layers", same_layers=True),
    "pixio_backbone_without_norm": Family(
        "PixioBackbone", "PixioConfig", {**PIXIO, "out_features": ["stage2"], "apply_layernorm": False},
        num_prefix_tokens=3, layers="pixio.layers", same_layers=True,
    ),
    "aimv2": Family("Aimv2VisionModel", "Aimv2VisionConfig", num_prefix_tokens=0, layers="encoder.layers",
                    patch_norm="embeddings.rms_norm"),
    "aimv2_native": Family(
        "Aimv2VisionModel", "Aimv2VisionConfig",
        {**SIZES, "use_head": False, "is_native": True, "qkv_bias": True, "mlp_bias": True},
        num_prefix_tokens=0, layers="encoder.layers", patch_norm="embeddings.rms_norm", same_layers=True,
    ),
    "mlcd": Family("MLCDVisionModel", "MLCDVisionConfig", {**SIZES, "hidden_size": 32}, layers="encoder.layers",
                   patch_norm="pre_layrnorm", adapt=_rotated, mixes_biases=False),
    "internvl": Family(
        "InternVLVisionModel", "InternVLVisionConfig",
        {**SIZES, "use_qk_norm": True, "attention_bias": True, "norm_type": "rms_norm", "use_mean_pooling": False},
        layers="encoder.layer",
    ),
    "internvl_without_qk_norm": Family("InternVLVisionModel", "InternVLVisionConfig", layers="encoder.layer",
                                       same_layers=True),
    "sapiens2": Family("Sapiens2Model", "Sapiens2Config", SAPIENS2, num_prefix_tokens=3, layers="model.layer"),
    "sapiens2_backbone": Family("Sapiens2Backbone", "Sapiens2Config", {**SAPIENS2, "out_features": ["stage2"]},
                                num_prefix_tokens=3, layers="model.layer", same_layers=True),
    "sapiens2_segmenter": Family(
        "Sapiens2ForSemanticSegmentation", "Sapiens2Config", {**SAPIENS2, **SEGMENTER},
        num_prefix_tokens=3, layers="model.model.layer", published=SEGMENTER, same_layers=True,
    ),
    "blip2": Family("Blip2VisionModel", "Blip2VisionConfig", layers="encoder.layers"),
    "blip2_without_bias": Family("Blip2VisionModel", "Blip2VisionConfig", {**SIZES, "qkv_bias": False},
                                 layers="encoder.layers", same_layers=True),
    "data2vec": _classifier("data2vec_vision", "Data2VecVision", config=DATA2VEC, layers="encoder.layer",
                            pooled_norm="data2vec_vision.pooler.layernorm", adapt=_biased),
    "data2vec_class_token": _classifier(
        "data2vec_vision", "Data2VecVision", layers="encoder.layer", adapt=_biased,
        config={**SIZES, "use_mean_pooling": False, "use_relative_position_bias": True, "layer_scale_init_value": 0.0},
        same_layers=True,
    ),
    "data2vec_model": Family("Data2VecVisionModel", "Data2VecVisionConfig", DATA2VEC, layers="encoder.layer",
                             adapt=_biased, same_layers=True),
    "data2vec_segmenter": Family(
        "Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig",
        {**DATA2VEC, "num_labels": NUM_LABELS, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2],
         "auxiliary_channels": 6, "use_mean_pooling": False},
        layers="data2vec_vision.encoder.layer", adapt=_biased, same_layers=True,
    ),
}  # fmt: skip


def all_families() -> dict[str, Family]:
    """All families by name."""
    from .clip_families import CLIP_FAMILIES  # here, since they use this module
    from .dense_families import DENSE_FAMILIES
    from .stage_families import STAGE_FAMILIES
    from .timm_families import TIMM_FAMILIES
    from .video_families import VIDEO_FAMILIES

    return {**FAMILIES, **CLIP_FAMILIES, **STAGE_FAMILIES, **TIMM_FAMILIES, **DENSE_FAMILIES, **VIDEO_FAMILIES}


def each_family(select: Callable[[Family], Any] = lambda family: True) -> Any:
    """Parametrizes a test with ``family``: those of the table that are selected."""
    parameters = [
        pytest.param(family, id=name, marks=pytest.mark.skipif(bool(family.missing), reason=str(family.missing)))
        for name, family in all_families().items()
        if select(family)
    ]
    return pytest.mark.parametrize("family", parameters)
