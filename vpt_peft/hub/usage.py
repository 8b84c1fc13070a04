"""Code of a model card: loads the adapter, and runs it on one image or video."""

from __future__ import annotations

import json

from transformers.backbone_utils import BackboneMixin

from ..adapter import Adapter
from ..backbones import find_class
from ..config import CLASSIFICATION_TASKS

BACKBONE_CLASSES = {
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "VIDEO_CLASSIFICATION": "AutoModelForVideoClassification",
    "SEMANTIC_SEGMENTATION": "AutoModelForSemanticSegmentation",
    "MASKED_IMAGE_MODELING": "AutoModelForMaskedImageModeling",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "AutoModelForZeroShotImageClassification",
    "OBJECT_DETECTION": "AutoModelForObjectDetection",
    "DEPTH_ESTIMATION": "AutoModelForDepthEstimation",
    "KEYPOINT_DETECTION": "AutoModelForPoseEstimation",
    "FEATURE_EXTRACTION": "AutoModel",
}
PIPELINES = {
    "IMAGE_CLASSIFICATION": "image-classification",
    "SEMANTIC_SEGMENTATION": "image-segmentation",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "zero-shot-image-classification",
    "OBJECT_DETECTION": "object-detection",
    "DEPTH_ESTIMATION": "depth-estimation",
    "FEATURE_EXTRACTION": "image-feature-extraction",
}
PIPELINE_TAGS = {  # the Hub's names of the tasks
    **PIPELINES,
    "VIDEO_CLASSIFICATION": "video-classification",
    "KEYPOINT_DETECTION": "keypoint-detection",
}
UNNAMED = "path/to/backbone"  # in place of a backbone that the card cannot name
CLASSIFICATION = """\
with torch.no_grad():
    logits = vpt(**inputs).logits
print(vpt.config.id2label[logits.argmax(-1).item()])"""
MULTI_LABEL = """\
with torch.no_grad():
    probabilities = vpt(**inputs).logits.sigmoid()[0]
print({vpt.config.id2label[label]: probability for label, probability in enumerate(probabilities.tolist())})"""
REGRESSION = """\
with torch.no_grad():
    values = vpt(**inputs).logits[0]
print({vpt.config.id2label[label]: value for label, value in enumerate(values.tolist())})"""
SEGMENTATION = """\
with torch.no_grad():
    logits = vpt(**inputs).logits
logits = torch.nn.functional.interpolate(logits, size=(image.height, image.width), mode="bilinear")
mask = logits.argmax(1)[0]  # a label for each pixel, (height, width)
print([vpt.config.id2label[label] for label in mask.unique().tolist()])"""
FEATURES = """\
with torch.no_grad():
    features = vpt(**inputs).last_hidden_state  # (1, number of tokens, width)
print(features.shape)"""
FEATURE_MAPS = """\
with torch.no_grad():
    feature_maps = vpt(**inputs).feature_maps  # each (1, channels, height, width)
print([features.shape for features in feature_maps])"""
MASKED = """\
num_patches = (inputs.pixel_values.shape[-1] // vpt.config.patch_size) ** 2
bool_masked_pos = torch.rand(1, num_patches) < 0.5  # the patches to predict
with torch.no_grad():
    output = vpt(**inputs, bool_masked_pos=bool_masked_pos)
predicted = output.get("reconstruction", output.get("logits"))  # the image, or scores of visual tokens
print(predicted.shape)"""
ZERO_SHOT = """\
tokenizer = AutoTokenizer.from_pretrained(vpt.name_or_path)
labels = ["a photo of a cat", "a photo of a dog"]
texts = tokenizer(labels, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = vpt(**inputs, **texts).logits_per_image
print(labels[logits.argmax(-1).item()])"""
DETECTION = """\
with torch.no_grad():
    output = vpt(**inputs)
sizes = [(image.height, image.width)]
(found,) = processor.post_process_object_detection(output, threshold=0.5, target_sizes=sizes)
for label, score, box in zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist()):
    print(vpt.config.id2label[label], score, box)  # corners of the box: x, y, x, y"""
DEPTH = """\
with torch.no_grad():
    output = vpt(**inputs)
(found,) = processor.post_process_depth_estimation(output, target_sizes=[(image.height, image.width)])
print(found["predicted_depth"].shape)  # (height, width)"""
KEYPOINTS = """\
with torch.no_grad():
    output = vpt(**inputs)
((found,),) = processor.post_process_pose_estimation(output, boxes=boxes)
for label, score, (x, y) in zip(found["labels"].tolist(), found["scores"].tolist(), found["keypoints"].tolist()):
    print(vpt.config.id2label[label], score, x, y)"""
BOXES = "boxes = [[(0, 0, image.width, image.height)]]  # of each person in the image: x, y, width, height"

OTHERS = {
    "SEMANTIC_SEGMENTATION": SEGMENTATION, "MASKED_IMAGE_MODELING": MASKED, "ZERO_SHOT_IMAGE_CLASSIFICATION": ZERO_SHOT,
    "OBJECT_DETECTION": DETECTION, "DEPTH_ESTIMATION": DEPTH, "KEYPOINT_DETECTION": KEYPOINTS,
}  # fmt: skip


def pipeline_code(adapter: Adapter, model_id: str, subfolder: str | None) -> str | None:
    """The lines that run an adapter on an image file by :func:`~vpt_peft.pipeline`; None if it cannot.

    Args:
        model_id, subfolder: repository or folder of the adapter.
    """
    task_type = str(adapter.config.task_type)
    if adapter.config.base_model_name_or_path is None or task_type not in PIPELINES:
        return None
    if _returns_feature_maps(adapter) or adapter.num_frames:
        return None
    labels = ', candidate_labels=["cat", "dog"]' if task_type == "ZERO_SHOT_IMAGE_CLASSIFICATION" else ""
    return "\n".join([
        "from vpt_peft import pipeline",
        "",
        f'print(pipeline({_source(model_id, subfolder)})("image.jpg"{labels}))',
    ])  # fmt: skip


def usage_code(adapter: Adapter, model_id: str, subfolder: str | None, has_processor: bool) -> str:
    """Python code that loads an adapter with its backbone and runs it on an image file, or on that of a video.

    Args:
        model_id, subfolder: repository or folder of the adapter.
        has_processor: an image or video processor is saved beside the adapter; otherwise the backbone's is used.
    """
    source = _source(model_id, subfolder)
    backbone_class = adapter.model_class or BACKBONE_CLASSES[str(adapter.config.task_type)]
    processor_class = "AutoVideoProcessor" if adapter.num_frames else "AutoImageProcessor"
    if adapter.config.base_model_name_or_path is not None:
        names, vpt_class = [processor_class], "AutoVPTModel"
        loading = [f"vpt = AutoVPTModel.from_pretrained({source})"]
    else:
        names, vpt_class = [processor_class, backbone_class], "VPTModel"
        loading = [
            f'model = {backbone_class}.from_pretrained("{UNNAMED}")  # the backbone that the adapter was trained on',
            f"vpt = VPTModel.from_pretrained(model, {source})",
        ]
    options = "" if has_processor else _without_crop(adapter)
    names += ["AutoTokenizer"] if adapter.config.task_type == "ZERO_SHOT_IMAGE_CLASSIFICATION" else []
    return "\n".join([
        "import torch",
        *([] if adapter.num_frames else ["from PIL import Image"]),
        f"from transformers import {', '.join(sorted(names))}",
        "",
        f"from vpt_peft import {vpt_class}",
        "",
        *loading,
        f"processor = {processor_class}.from_pretrained({source if has_processor else 'vpt.name_or_path'}{options})",
        "",
        _reading(adapter),
        _prediction(adapter),
    ])  # fmt: skip


def _without_crop(adapter: Adapter) -> str:
    """Options of the backbone's image processor, made for classification, for a decode head that was added."""
    is_added = adapter.config.task_type == "SEMANTIC_SEGMENTATION" and adapter.head.paths == ["classifier"]
    size = getattr(adapter.model_config, "image_size", None)
    if not is_added or size is None:
        return ""
    height, width = (size, size) if isinstance(size, int) else size
    return f', do_center_crop=False, size={{"height": {height}, "width": {width}}}'


def _source(model_id: str, subfolder: str | None) -> str:
    """Arguments: a JSON string is a Python string."""
    return json.dumps(model_id) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")


def _returns_feature_maps(adapter: Adapter) -> bool:
    return issubclass(find_class(adapter.model_class) or object, BackboneMixin)


def _reading(adapter: Adapter) -> str:
    """Reads the inputs from a file."""
    if adapter.num_frames:
        options = f"do_sample_frames=True, num_frames={adapter.num_frames}"
        return f'inputs = processor("video.mp4", {options}, return_tensors="pt")  # torchcodec decodes it'
    options, boxes = "", ""
    if adapter.config.location == "border" and adapter.image_size:
        height, width = adapter.image_size  # smaller than the processor makes them
        options = f'size={{"height": {height}, "width": {width}}}, do_center_crop=False, '
    if adapter.config.task_type == "KEYPOINT_DETECTION":
        options, boxes = f"{options}boxes=boxes, ", f"{BOXES}\n"
    image = 'image = Image.open("image.jpg").convert("RGB")'
    return f'{image}\n{boxes}inputs = processor(image, {options}return_tensors="pt")'


def _prediction(adapter: Adapter) -> str:
    model_config = adapter.model_config
    if adapter.config.task_type == "FEATURE_EXTRACTION":
        return FEATURE_MAPS if _returns_feature_maps(adapter) else FEATURES
    if adapter.config.task_type not in CLASSIFICATION_TASKS:
        return OTHERS[str(adapter.config.task_type)]
    problem_type = model_config.problem_type
    if problem_type == "multi_label_classification":
        return MULTI_LABEL
    is_regression = problem_type == "regression" or (problem_type is None and model_config.num_labels == 1)
    return REGRESSION if is_regression else CLASSIFICATION
