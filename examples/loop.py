"""Fine-tunes a vision transformer in a loop of your own.

    python examples/loop.py facebook/dinov2-base flowers out

The folder "flowers" contains "train" and "validation", each with one folder of images per class.
"""

import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, get_cosine_schedule_with_warmup

from vpt_peft import PromptConfig, get_vpt_model, parameter_groups

name, data, output, *epochs = sys.argv[1:]
num_epochs = int(*epochs or [15])
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
splits = load_dataset("imagefolder", data_dir=data)
labels = splits["train"].features["label"].names
processor = AutoImageProcessor.from_pretrained(name)


def collate(examples):
    images = [example["image"].convert("RGB") for example in examples]
    targets = torch.tensor([example["label"] for example in examples])
    return processor(images, return_tensors="pt").pixel_values, targets


train = DataLoader(splits["train"], batch_size=16, shuffle=True, collate_fn=collate)
validation = DataLoader(splits["validation"], batch_size=64, collate_fn=collate)

model = AutoModelForImageClassification.from_pretrained(
    name, dtype=torch.float32, id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
).to(device)
vpt = get_vpt_model(model, PromptConfig(num_tokens=10, kind="prefix", bias="all"))
optimizer = torch.optim.AdamW(parameter_groups(vpt))
steps = num_epochs * len(train)
schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)

for epoch in range(num_epochs):
    vpt.train()  # the frozen backbone stays in eval mode
    for pixel_values, targets in train:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            loss = vpt(pixel_values.to(device), labels=targets.to(device)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    vpt.eval()
    correct = 0
    with torch.inference_mode():
        for pixel_values, targets in validation:
            correct += (vpt(pixel_values.to(device)).logits.argmax(-1).cpu() == targets).sum().item()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {100 * correct / len(splits['validation']):.1f} %")

vpt.save_pretrained(output, image_processor=processor)
