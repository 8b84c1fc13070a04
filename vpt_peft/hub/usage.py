"""Code of a model card: loads the adapter, and runs it on one image."""

from __future__ import annotations

import json

import transformers
from transformers.backbone_utils import BackboneMixin

from ..adapter import Adapter

BACKBONE_CLASSES = {
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "SEMANTIC_SEGMENTATION": "AutoModelForSemanticSegmentation",
    "MASKED_IMAGE_MODELING": "AutoModelForMaskedImageModeling",
    "FEATURE_EXTRACTION": "AutoModel",
}
UNNAMED = "path/to/backbone"  # in place of a backbone that the card cannot name
CLASSIFICATION = """\
with torch.no_grad():
    logits = vpt(pixel_values).logits
print(vpt.config.id2label[logits.argmax(-1).item()])"""
MULTI_LABEL = """\
with torch.no_grad():
    probabilities = vpt(pixel_values).logits.sigmoid()[0]
print({vpt.config.id2label[label]: probability for label, probability in enumerate(probabilities.tolist())})"""
REGRESSION = """\
with torch.no_grad():
    values = vpt(pixel_values).logits[0]
print({vpt.config.id2label[label]: value for label, value in enumerate(values.tolist())})"""
SEGMENTATION = """\
with torch.no_grad():
    logits = vpt(pixel_values).logits
logits = torch.nn.functional.interpolate(logits, size=(image.height, image.width), mode="bilinear")
mask = logits.argmax(1)[0]  # a label for each pixel, (height, width)
print([vpt.config.id2label[label] for label in mask.unique().tolist()])"""
FEATURES = """\
with torch.no_grad():
    features = vpt(pixel_values).last_hidden_state  # (1, number of tokens, width)
print(features.shape)"""
FEATURE_MAPS = """\
with torch.no_grad():
    feature_maps = vpt(pixel_values).feature_maps  # each (1, width, height, width of the map)
print([feature_map.shape for feature_map in feature_maps])"""
MASKED = """\
num_patches = (pixel_values.shape[-1] // vpt.config.patch_size) ** 2
bool_masked_pos = torch.rand(1, num_patches) < 0.5  # the patches to predict
with torch.no_grad():
    image = vpt(pixel_values, bool_masked_pos=bool_masked_pos).reconstruction
print(image.shape)"""


def usage_code(adapter: Adapter, model_id: str, subfolder: str | None, has_processor: bool) -> str:
    """Python code that loads an adapter with its backbone and runs it on an image file.

    Args:
        model_id, subfolder: repository or folder of the adapter.
        has_processor: an image processor is saved beside the adapter; otherwise the backbone's is used.
    """
    source = json.dumps(model_id)  # a JSON string is a Python string
    source += f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    backbone_class = adapter.model_class or BACKBONE_CLASSES[str(adapter.config.task_type)]
    if adapter.config.base_model_name_or_path is not None:
        names, vpt_class = ["AutoImageProcessor"], "AutoVPTModel"
        loading = [f"vpt = AutoVPTModel.from_pretrained({source})"]
    else:
        names, vpt_class = sorted({"AutoImageProcessor", backbone_class}), "VPTModel"
        loading = [
            f'model = {backbone_class}.from_pretrained("{UNNAMED}")  # the backbone that the adapter was trained on',
            f"vpt = VPTModel.from_pretrained(model, {source})",
        ]
    options = ""
    if adapter.config.location == "border" and adapter.image_size:
        height, width = adapter.image_size  # smaller than the processor makes them
        options = f'size={{"height": {height}, "width": {width}}}, do_center_crop=False, '
    return "\n".join([
        "import torch",
        "from PIL import Image",
        f"from transformers import {', '.join(names)}",
        "",
        f"from vpt_peft import {vpt_class}",
        "",
        *loading,
        f"processor = AutoImageProcessor.from_pretrained({source if has_processor else 'vpt.name_or_path'})",
        "",
        'image = Image.open("image.jpg").convert("RGB")',
        f'pixel_values = processor(image, {options}return_tensors="pt").pixel_values',
        _prediction(adapter),
    ])  # fmt: skip


def _prediction(adapter: Adapter) -> str:
    task_type, model_config = str(adapter.config.task_type), adapter.model_config
    if task_type != "IMAGE_CLASSIFICATION":
        is_backbone = issubclass(getattr(transformers, adapter.model_class or "", object), BackboneMixin)
        features = FEATURE_MAPS if is_backbone else FEATURES
        return {"SEMANTIC_SEGMENTATION": SEGMENTATION, "MASKED_IMAGE_MODELING": MASKED}.get(task_type, features)
    problem_type = model_config.problem_type
    if problem_type == "multi_label_classification":
        return MULTI_LABEL
    is_regression = problem_type == "regression" or (problem_type is None and model_config.num_labels == 1)
    return REGRESSION if is_regression else CLASSIFICATION
