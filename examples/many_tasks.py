"""Answers for several tasks in one batch, on one backbone.

    python examples/many_tasks.py facebook/dinov2-base rose.jpg flowers=me/flowers-vpt colours=me/colours-vpt

The adapters are folders, or repositories on the Hub; all were trained on that backbone.
"""

import sys

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vpt_peft import VPTModel

name, file, *adapters = sys.argv[1:]
tasks = dict(adapter.split("=") for adapter in adapters)
(first, source), *others = tasks.items()
model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
vpt = VPTModel.from_pretrained(model, source, adapter_name=first)
for task, source in others:
    vpt.load_adapter(source, task)
vpt.eval()

processor = AutoImageProcessor.from_pretrained(name)
pixel_values = processor(Image.open(file).convert("RGB"), return_tensors="pt").pixel_values
with torch.inference_mode(), vpt.serving():
    output = vpt(pixel_values.expand(len(tasks), -1, -1, -1), adapter_names=[*tasks])  # one adapter for each image

for task, logits in zip(tasks, output.logits, strict=True):
    score, label = logits.softmax(-1).max(-1)  # logits beyond the labels of the task are -inf
    vpt.set_adapter(task)
    print(f"{task}: {vpt.config.id2label[label.item()]}, {100 * score:.1f} %")
