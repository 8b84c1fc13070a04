"""Adapters and their backbones as files that run without vpt-peft: ONNX, torch.export, AOTInductor."""

from .file import export, export_adapter

__all__ = ["export", "export_adapter"]
