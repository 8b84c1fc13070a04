"""Fine-tunes a vision transformer with the Trainer of transformers.

    python examples/trainer.py facebook/dinov2-base flowers out

The folder "flowers" contains "train" and "validation", each with one folder of images per class.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from vpt_peft import PromptConfig, adamw, get_vpt_model

name, data, output, *epochs = sys.argv[1:]
splits = load_dataset("imagefolder", data_dir=data)
labels = splits["train"].features["label"].names
processor = AutoImageProcessor.from_pretrained(name)


def collate(examples):
    images = [example["image"].convert("RGB") for example in examples]
    targets = torch.tensor([example["label"] for example in examples])
    return {**processor(images, return_tensors="pt"), "labels": targets}


def accuracy(predictions):
    return {"accuracy": (predictions.predictions.argmax(-1) == predictions.label_ids).mean().item()}


model = AutoModelForImageClassification.from_pretrained(
    name,
    dtype=torch.float32,
    id2label=dict(enumerate(labels)),
    label2id={label: index for index, label in enumerate(labels)},
    ignore_mismatched_sizes=True,  # the head belongs to the adapter and is new
)
vpt = get_vpt_model(model, PromptConfig(num_tokens=10, kind="prefix", bias="all"))
vpt.print_trainable_parameters()

settings = TrainingArguments(
    output,
    num_train_epochs=int(*epochs or [15]),
    per_device_train_batch_size=16,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # of all steps
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    remove_unused_columns=False,  # or Trainer deletes the images before they are read
    report_to="none",
)
trainer = Trainer(
    vpt,
    settings,
    data_collator=collate,
    train_dataset=splits["train"],
    eval_dataset=splits["validation"],
    compute_metrics=accuracy,
    optimizer_cls_and_kwargs=adamw(vpt),  # a learning rate for each kind of parameter
)
trainer.train()
print(trainer.evaluate())
vpt.save_pretrained(output, image_processor=processor)
