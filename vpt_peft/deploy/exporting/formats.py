"""The files that a traced model is written to: ONNX, torch.export's program, and a package of AOTInductor.

Each function writes the file and returns what runs it: ``run(pixel_values, tasks)`` gives the outputs in order.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

Run = Callable[..., Sequence[Tensor]]
Metadata = Mapping[str, str]
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20  # onnxruntime 1.17 and later
NO_LIMIT = 2**62


def check_onnx_installed() -> None:
    """Raises ImportError unless all packages that write and run ONNX are installed."""
    for name in ONNX_PACKAGES:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"Exporting to ONNX needs {', '.join(ONNX_PACKAGES)}, but {name} cannot be imported: {error}. "
                "Install them by pip install 'vpt-peft[export]'."
            ) from error


def write_onnx(program: ExportedProgram, path: Path, metadata: Metadata, names: Sequence[str], int8: bool) -> Run:
    """Writes ``model.onnx``, and its weights into ``model.onnx.data`` if they take more than 2 GB.

    Args:
        names: of the outputs.
        int8: weights of linear layers as integers of 8 bits, and their inputs rounded to 8 bits while running.
    """
    onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
    with quiet():
        exported: Any = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, output_names=list(names), verbose=False
        )
        # Also large constants: prompts of all tasks, and transposed weights, which only then can be quantised.
        optimizer = import_module("onnxscript.optimizer")
        optimizer.optimize_ir(exported.model, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT)
        for node in exported.model.graph:
            node.metadata_props.clear()  # traces of the code that was exported, with the names of its files
        exported.model.metadata_props.update(metadata)
        exported.save(path)
        if int8:
            whole = path.with_name(f"float-{path.name}")
            path.rename(whole)
            quantization = import_module("onnxruntime.quantization")
            weights = quantization.QuantType.QInt8
            quantization.quantize_dynamic(whole, path, ["MatMul", "Gemm"], per_channel=True, weight_type=weights)
            whole.unlink()
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = [one.name for one in session.get_inputs()]

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        fed = {name: tensor.cpu().numpy() for name, tensor in zip(taken, tensors, strict=True)}
        return [torch.from_numpy(output) for output in session.run(list(names), fed)]

    return run


def write_program(
    program: ExportedProgram, path: Path, metadata: Metadata, names: Sequence[str], check_guards: bool
) -> Run:
    """Writes ``model.pt2`` for ``torch.export.load``, with the metadata as its extra file ``metadata.json``.

    Args:
        check_guards: False: the program runs without the guards of its trace, which exclude the backbone's own size of
            images, where position embeddings would need no interpolation.
    """
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(dict(metadata))})
    return _by_name(torch.export.load(path).module(check_guards=check_guards), names)


def write_compiled(program: ExportedProgram, path: Path, metadata: Metadata, names: Sequence[str]) -> Run:
    """Compiles the model for the processor or GPU at hand, and writes ``model.pt2`` for
    ``torch._inductor.aoti_load_package``, with the metadata for its ``get_metadata()``."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": dict(metadata)}
    )
    return _by_name(aoti_load_package(str(path)), names)


def _by_name(function: Any, names: Sequence[str]) -> Run:
    def run(*tensors: Tensor) -> Sequence[Tensor]:
        outputs = function(*tensors)
        return [outputs[name] for name in names]

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """A context without the notes of exporters on their own progress. Errors are raised all the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
