"""Export: writes an adapter and its backbone into one file, and compares it with the model that it was made of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ... import hub
from ...adapter import Adapter, is_quantized
from ...auto import AutoVPTModel
from ...config import CLASSIFICATION_TASKS
from ...errors import AdapterError, safe_repr, truncate_list
from ...images.processors import load_processor, saved_processor
from ...model import VPTModel
from ...model.arguments import BASE, check_adapters_exist, check_names
from ...model.modes import evaluating
from ...version import __version__
from ..adapters import name_adapters
from .formats import Run, check_onnx_installed, quiet, write_compiled, write_onnx, write_program
from .graph import ExportedModel, Normalization, exportable_attention, flatten_output, label_outputs
from .inputs import Inputs, find_image_size

TOLERANCE, OF_HALF, OF_INT8 = 1e-4, 0.05, 0.1  # of float32, half precision and int8
NORMALIZATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def export(
    vpt: VPTModel,
    path: str | os.PathLike[str],
    *,
    adapter_names: Sequence[str] | None = None,
    probabilities: bool = False,
    image_processor: Any = None,
    batch_size: int | None = None,
    image_size: tuple[int, int] | Literal["any"] | None = None,
    int8: bool = False,
    compile: bool = False,
    tolerance: float | None = None,
) -> float:
    """Writes the model with its active adapter into one file, which runs without vpt-peft and transformers.

    Keys and values of prompts that do not depend on the image are constants in it. The file is run and compared with
    the model before it takes its place.

    The inputs are ``pixel_values`` and, with ``adapter_names``, ``tasks``; the outputs are the tensors of the model's
    output, such as ``logits``. The metadata contains the labels of the adapters and the name of the backbone.

    Args:
        vpt: the model. No other thread must use it meanwhile.
        path: ``"model.onnx"``: an ONNX model; ``"model.pt2"``: a program of ``torch.export``.
        adapter_names: the adapters of a mixed batch, at least two, ``"__base__"`` for the bare backbone. The file then
            has a second input ``tasks``, 64-bit integers ``(num_images,)``: for each image, the index in this list.
            ``logits`` beyond the labels of an image's own task are ``-inf``.
        probabilities: the output is ``probabilities`` instead of ``logits``: their softmax, or the sigmoid where labels
            do not exclude each other (``problem_type="multi_label_classification"``).
        image_processor: its rescaling and normalisation become part of the file. The input is then pixels from 0 to
            255, 8-bit integers ``(num_images, num_channels, height, width)``, already resized.
        batch_size: number of images in a batch; None: any.
        image_size: height and width of the images in pixels; None: those that the backbone was made for; ``"any"``:
            all multiples of the patch size, where the backbone can.
        int8: quantises linear layers to 8 bits by onnxruntime, for ``"model.onnx"``.
        compile: compiles the model by AOTInductor for the processor or GPU at hand, for ``"model.pt2"``.
        tolerance: the largest permitted difference, relative to the largest value of an output, or to 1. None: 1e-4;
            0.05 in half precision, and 0.1 for ``int8``.

    Returns:
        The largest absolute difference between the outputs of the file and of the model.

    Raises:
        AdapterError: the model cannot be exported in this way, or the file computes something else. Nothing was
            written.
        ImportError: packages that ONNX needs are missing.
    """
    path = Path(path)
    _check_path(path, int8, compile)
    names = _find_adapters(vpt, adapter_names)
    _check_model(vpt, path)
    adapters = [None if name == BASE else vpt._adapters[name] for name in names]
    activation = _find_activation(vpt, adapters) if probabilities else None
    size = find_image_size(vpt, adapters, image_size)
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise AdapterError(f"batch_size must be a positive number or None, got {safe_repr(batch_size)}.")
    inputs = Inputs(vpt, None if adapter_names is None else len(names), batch_size, size, image_processor)
    with evaluating(vpt):
        num_labels = _count_labels(vpt, adapters)
        call = partial(_call, vpt, names, inputs, num_labels, activation)
        outputs = list(call(*inputs.example()))  # raises what is wrong with the model and the adapters
        model = _make_model(vpt, adapters, inputs, num_labels, activation)
        with exportable_attention(vpt.backbone):
            program = _trace(model, inputs)
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            file, metadata = Path(folder) / path.name, _metadata(vpt, names, adapters)
            if path.suffix == ".onnx":
                run = write_onnx(program, file, metadata, outputs, int8)
            elif compile:
                run = write_compiled(program, file, metadata, outputs)
            else:
                run = write_program(program, file, metadata, outputs, check_guards=size is not None)
            if tolerance is None:
                tolerance = OF_INT8 if int8 else TOLERANCE if vpt.dtype == torch.float32 else OF_HALF
            difference = _compare(run, call, inputs, tolerance)
            for written in sorted(Path(folder).iterdir(), reverse=True):  # weights before the file that names them
                os.replace(written, path.parent / written.name)
    return difference


def export_adapter(
    adapter: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    further_adapters: Sequence[str | os.PathLike[str]] = (),
    normalize: bool = False,
    revision: str | None = None,
    dtype: str | torch.dtype | None = torch.float32,
    **options: Any,
) -> float:
    """Loads an adapter with its backbone, exports them by :func:`export`, and prints the largest difference.

    Args:
        adapter: folder or Hub repository of the adapter.
        path: file to write, ``"model.onnx"`` or ``"model.pt2"``.
        further_adapters: folders or repositories of adapters of the same backbone, or ``"__base__"`` for the bare
            backbone. The file is then one for mixed batches, see ``adapter_names`` of :func:`export`; its tasks are
            numbered in this order, ``adapter`` first, and named by the last part of their folder or repository.
        normalize: the normalisation of the image processor that was saved with the adapter, else of the backbone's,
            becomes part of the file.
        revision: of ``adapter``.
        dtype: precision of the backbone; ONNX needs float32.
        options: of :func:`export`.

    Returns:
        The largest absolute difference between the outputs of the file and of the model.

    Raises:
        VPTError, OSError, ImportError: as :meth:`AutoVPTModel.from_pretrained`, :meth:`VPTModel.load_adapter` and
            :func:`export`.
    """
    _check_path(Path(path), options.get("int8", False), options.get("compile", False))  # before anything is loaded
    sources = [adapter, *further_adapters]
    names = name_adapters(sources) if further_adapters else ["default"]
    processors: dict[str, Any] = {}
    with hub.pulled_adapter(adapter, revision=revision, with_processor=normalize) as folder:
        vpt = AutoVPTModel.from_pretrained(folder, names[0], dtype=dtype)
        if normalize:
            processors[names[0]] = load_processor(vpt, saved_processor(folder))
    for name, source in zip(names[1:], further_adapters, strict=True):
        if name == BASE:
            continue
        with hub.pulled_adapter(source, with_processor=normalize) as folder:
            vpt.load_adapter(folder, name)
            if normalize:
                vpt.set_adapter(name)
                processors[name] = load_processor(vpt, saved_processor(folder))
    vpt.set_adapter(names[0])
    if normalize:
        options["image_processor"] = _common_processor(processors)
    if further_adapters:
        options["adapter_names"] = names
    difference = export(vpt, path, **options)
    tasks = ", ".join(f"{number} = {name}" for number, name in enumerate(names))
    print(f"Wrote {path}{f' for the tasks {tasks}' if further_adapters else ''}.")
    print(f"The largest difference between its outputs and the model's is {difference:.1e}.")
    return difference


def _common_processor(processors: Mapping[str, Any]) -> Any:
    """The image processor of all adapters, given by their names.

    Raises:
        AdapterError: they normalise differently.
    """
    (first, chosen), *others = processors.items()
    for name, processor in others:
        differing = [key for key in NORMALIZATION if getattr(processor, key, None) != getattr(chosen, key, None)]
        if differing:
            raise AdapterError(
                f"Adapters in one file must normalise images in the same way, but the image processors of '{first}' "
                f"and '{name}' differ in {', '.join(differing)}. Export them without normalize=True, or apart."
            )
    return chosen


def _find_adapters(vpt: VPTModel, adapter_names: Sequence[str] | None) -> list[str]:
    """The names of the adapters to export."""
    vpt._check_loaded()
    if adapter_names is None:
        return [vpt.active_adapter]
    names = check_names(adapter_names, "adapter_names")
    check_adapters_exist(vpt._adapters, [name for name in names if name != BASE])
    if len(set(names)) != len(names) or len(names) < 2:
        raise AdapterError(
            f"adapter_names must be at least two different adapters, got {truncate_list(names, 20) or 'none'}. For a "
            "single one, make it active with set_adapter() and leave adapter_names out."
        )
    return names


def _check_path(path: Path, int8: bool, compile: bool) -> None:
    """Raises AdapterError for a file of no known format or of one without these options, ImportError for ONNX's."""
    if path.suffix not in (".onnx", ".pt2"):
        raise AdapterError(f"Expected a file name that ends in .onnx or .pt2, got {safe_repr(path.name)}.")
    if compile and path.suffix != ".pt2":
        raise AdapterError(f"compile=True needs a file name that ends in .pt2, got {safe_repr(path.name)}.")
    if int8 and path.suffix != ".onnx":
        raise AdapterError(f"int8=True needs a file name that ends in .onnx, got {safe_repr(path.name)}.")
    if path.suffix == ".onnx":
        check_onnx_installed()


def _check_model(vpt: VPTModel, path: Path) -> None:
    """Raises AdapterError for a model that cannot be exported, or not in this format."""
    model, backbone = type(vpt.get_base_model()).__name__, vpt.backbone
    if vpt._is_dual_encoder:
        raise AdapterError(
            f"Expected a model of images, got {model}, a model of images and texts. Export an adapter of its vision "
            "model, such as CLIPVisionModelWithProjection or SiglipVisionModel."
        )
    if backbone.architecture.input_dims == 3:
        raise AdapterError(
            f"Expected a model of images (num_images, num_channels, height, width), got {model}, which takes patches "
            "with masks and shapes. It cannot be exported; use a model such as SigLIP."
        )
    quantized = next((name for name, module in backbone.model.named_modules() if is_quantized(module)), None)
    if quantized is not None:
        raise AdapterError(
            f"Expected a backbone with floating-point weights, got a quantised one ({quantized}). Load the adapter "
            "onto the original backbone; int8=True quantises an exported ONNX model."
        )
    if path.suffix == ".onnx" and vpt.dtype != torch.float32:
        raise AdapterError(
            f"ONNX models are exported in float32, got a backbone in {vpt.dtype}. Load it with dtype=torch.float32."
        )


def _find_activation(vpt: VPTModel, adapters: Sequence[Adapter | None]) -> Callable[[Tensor], Tensor]:
    """What turns logits into probabilities."""
    if vpt.backbone.head.task_type not in CLASSIFICATION_TASKS or not vpt.backbone.head.label_layers:
        raise AdapterError(
            f"probabilities=True needs a classifier, got {type(vpt.get_base_model()).__name__}. Leave it out."
        )
    configs = [vpt.get_base_model().config if adapter is None else adapter.model_config for adapter in adapters]
    kinds = {config.problem_type for config in configs}
    multi = {kind == "multi_label_classification" for kind in kinds}
    if "regression" in kinds or len(multi) > 1:
        raise AdapterError(
            "probabilities=True needs adapters whose labels all exclude each other, or all do not, got problem_type "
            f"{', '.join(sorted(map(str, kinds)))}. Leave it out."
        )
    return torch.sigmoid if multi == {True} else partial(torch.softmax, dim=-1)


def _count_labels(vpt: VPTModel, adapters: Sequence[Adapter | None]) -> list[int] | None:
    """Number of labels of each adapter; None for a model without labels."""
    if not vpt.backbone.head.label_layers:
        return None
    own = vpt.backbone.model.config.num_labels
    return [own if adapter is None else adapter.num_labels for adapter in adapters]


def _make_model(
    vpt: VPTModel,
    adapters: Sequence[Adapter | None],
    inputs: Inputs,
    num_labels: Sequence[int] | None,
    activation: Callable[[Tensor], Tensor] | None,
) -> ExportedModel:
    """The module to trace, with its constants."""
    normalization: nn.Module = nn.Identity()
    if inputs.image_processor is not None:
        normalization = Normalization(inputs.image_processor, vpt.backbone.num_channels).to(vpt.device)
    model = ExportedModel(
        vpt.backbone, adapters, normalization, inputs.options(), num_labels, activation, vpt._check_layers_reached
    )
    return model.eval()


def _trace(model: ExportedModel, inputs: Inputs) -> ExportedProgram:
    """The graph of a model."""
    example = inputs.example()
    model(*example)  # computes the constants
    try:
        with quiet():
            return torch.export.export(model, example, dynamic_shapes=inputs.dynamic_shapes())
    except Exception as error:  # torch.export raises errors of many kinds
        advice = "It may be exported with fixed shapes: batch_size=1, --batch-size 1 on the command line."
        if inputs.image_size is None:
            advice = 'Leave image_size="any" (--image-size any) out: it may be exported for one size of images only.'
        raise AdapterError(
            f"torch.export cannot trace {type(model.model).__name__}. {advice} It said: {str(error)[:1000]}"
        ) from error


def _metadata(vpt: VPTModel, names: Sequence[str], adapters: Sequence[Adapter | None]) -> dict[str, str]:
    """What a file says about itself."""
    tasks = []
    for name, adapter in zip(names, adapters, strict=True):
        config = vpt.get_base_model().config if adapter is None else adapter.model_config
        tasks.append({"name": name, "id2label": config.id2label, "problem_type": config.problem_type})
    return {
        "vpt_peft_version": __version__,
        "base_model": vpt.name_or_path,
        "task_type": str(vpt.backbone.head.task_type),
        "tasks": json.dumps(tasks),
    }


def _call(
    vpt: VPTModel,
    names: Sequence[str],
    inputs: Inputs,
    num_labels: Sequence[int] | None,
    activation: Callable[[Tensor], Tensor] | None,
    images: Tensor,
    tasks: Tensor | None = None,
) -> dict[str, Tensor]:
    """The output of the model itself, by name, with logits for as many labels as any of the adapters has."""
    chosen = {} if tasks is None else {"adapter_names": [names[task] for task in tasks.tolist()]}
    output = flatten_output(vpt(inputs.normalize(images), return_dict=True, **inputs.options(), **chosen))
    for name in label_outputs(output) if num_labels else ():
        logits = output[name]
        padding = (*(0, 0) * (logits.ndim - 2), 0, max(num_labels or ()) - logits.shape[1])
        output[name] = nn.functional.pad(logits, padding, value=-torch.inf)
    return output if activation is None else {"probabilities": activation(output["logits"])}


def _compare(run: Run, call: Callable[..., dict[str, Tensor]], inputs: Inputs, tolerance: float) -> float:
    """The largest absolute difference between a file and the model.

    Raises:
        AdapterError: it is larger than permitted.
    """
    largest = 0.0
    for batch in inputs.comparisons():
        expected = call(*batch)
        for (name, theirs), ours in zip(expected.items(), run(*batch), strict=True):
            theirs, ours = theirs.double().cpu(), ours.double().cpu()
            same = ours.shape == theirs.shape
            difference = torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max().item() if same else torch.inf
            limit = tolerance * max(1.0, theirs[theirs.isfinite()].abs().max().item())
            if not difference <= limit:  # nor a number
                raise AdapterError(
                    f"The exported file computes something else: {name} of {len(theirs)} images differs by "
                    f"{difference:.1e}, expected at most {limit:.1e}. Nothing was written. Allow more by "
                    "tolerance=..., if this is enough for you."
                )
            largest = max(largest, difference)
    return largest
