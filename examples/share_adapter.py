"""Share an adapter: push it to the Hugging Face Hub and load it by its name.

    python examples/share_adapter.py me/digits-vpt --backbone google/vit-base-patch16-224-in21k

Requires an account and a token (``hf auth login``). ``HF_ENDPOINT`` selects a Hub other than huggingface.co.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoModelForImageClassification

from vpt_peft import AutoVPTModel, PromptConfig, VPTError, get_vpt_model
from vpt_peft.hub import check_model_name
from vpt_peft.recipes.data.transforms import load_image_processor

LABELS = ["cat", "dog", "owl"]


def share(repo_id: str, backbone: str, private: bool) -> None:
    """Pushes an adapter, loads it again, and compares the logits of both."""
    check_model_name(backbone)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    model = AutoModelForImageClassification.from_pretrained(backbone, ignore_mismatched_sizes=True, **labels)
    vpt = get_vpt_model(model, PromptConfig(num_tokens=10))
    vpt.print_trainable_parameters()
    # ... train it here ...

    processor = load_image_processor(backbone)
    details = {"commit_message": "Upload an untrained adapter", "license": "mit"}
    commit = vpt.push_to_hub(repo_id, image_processor=processor, private=private, **details)
    print(f"Pushed to {commit.commit_url}")

    loaded = AutoVPTModel.from_pretrained(repo_id)  # loads the backbone too
    print(f"Loaded {repo_id} onto {loaded.active_config.base_model_name_or_path}, labels {loaded.config.id2label}")

    image = torch.rand(1, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        pushed, pulled = vpt.eval()(image).logits, loaded(image).logits
    print(f"Identical logits: {torch.equal(pushed, pulled)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", help="repository to push to, such as me/digits-vpt; created if it does not exist")
    parser.add_argument("--backbone", default="google/vit-base-patch16-224-in21k", help="a ViT or Swin checkpoint")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    arguments = parser.parse_args()
    try:
        share(arguments.repo_id, arguments.backbone, arguments.private)
    except (VPTError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
