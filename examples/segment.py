"""Fine-tunes a model for semantic segmentation.

    python examples/segment.py openmmlab/upernet-swin-tiny scenes out

The folder "scenes" contains "images" and "masks": a mask has the name of its image and labels as pixel values, 255 for
pixels without a label.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from vpt_peft import PromptConfig, get_vpt_model, parameter_groups

name, data, output, *epochs = sys.argv[1:]
images = sorted(path for path in Path(data, "images").iterdir() if path.suffix in (".jpg", ".png"))
masks = {path.stem: path for path in Path(data, "masks").iterdir()}
num_labels = 1 + max(label for path in masks.values() for label in np.unique(Image.open(path)) if label != 255)

processor = AutoImageProcessor.from_pretrained(name, do_reduce_labels=False)
model = AutoModelForSemanticSegmentation.from_pretrained(
    name, dtype=torch.float32, num_labels=int(num_labels), ignore_mismatched_sizes=True
)
vpt = get_vpt_model(model, PromptConfig(num_tokens=10)).train()
vpt.print_trainable_parameters()  # the decode head belongs to the adapter


def collate(paths):
    pixel_values = processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt").pixel_values
    size = pixel_values.shape[:1:-1]  # width and height
    labels = [np.array(Image.open(masks[path.stem]).resize(size, Image.Resampling.NEAREST)) for path in paths]
    return pixel_values, torch.from_numpy(np.stack(labels)).long()


batches = DataLoader(images, batch_size=4, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW(parameter_groups(vpt))
for epoch in range(int(*epochs or [20])):
    for pixel_values, labels in batches:
        loss = vpt(pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
vpt.save_pretrained(output, image_processor=processor)
