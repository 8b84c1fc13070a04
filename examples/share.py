"""Saves an adapter, shares it on the Hub if a name is given, and loads it again.

    python examples/share.py facebook/dinov2-base my-adapter rose.jpg [me/my-adapter]

For the Hub, log in once with `hf auth login`.
"""

import sys

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vpt_peft import AutoVPTModel, PromptConfig, get_vpt_model, pipeline

name, folder, file, *repository = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(
    name, dtype=torch.float32, id2label={0: "rose", 1: "daisy"}, ignore_mismatched_sizes=True
)
processor = AutoImageProcessor.from_pretrained(name)
vpt = get_vpt_model(model, PromptConfig(num_tokens=10, kind="prefix"))
...  # train it, see trainer.py and loop.py

vpt.save_pretrained(folder, image_processor=processor)
if repository:
    vpt.push_to_hub(*repository, image_processor=processor, training_data="flowers", metrics={"accuracy": 0.95})

again = AutoVPTModel.from_pretrained(*repository or [folder])  # loads its backbone too
for key, tensor in again.get_adapter_state_dict().items():
    assert torch.equal(tensor, vpt.get_adapter_state_dict()[key])
print(pipeline(*repository or [folder])(file))
