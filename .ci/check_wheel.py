"""Smoke test of the installed wheel, run by ``make package`` in an environment without other packages."""

import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import vpt_peft
from vpt_peft import PromptConfig, VPTModel, get_vpt_model

folder = Path(vpt_peft.__file__).parent
assert "site-packages" in folder.parts, f"expected vpt_peft from the wheel, got {folder}"
assert version("vpt-peft") == vpt_peft.__version__, f"the metadata has version {version('vpt-peft')}"
for name in ("py.typed", "hub/card_template.md"):
    assert files("vpt_peft").joinpath(name).is_file(), f"{name} is missing in the wheel"
for name in ("pytest", "sklearn", "PIL"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed, but must not be a dependency"

command = [str(Path(sys.executable).with_name("vpt-peft")), "--version"]
printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
assert printed == f"vpt-peft {vpt_peft.__version__}\n", f"vpt-peft --version prints {printed!r}"


def backbone() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))


pixels = torch.rand(2, 3, 16, 16)
vpt = get_vpt_model(backbone(), PromptConfig(num_tokens=3)).eval()
with tempfile.TemporaryDirectory() as saved, torch.no_grad():
    vpt.save_pretrained(saved)
    reloaded = VPTModel.from_pretrained(backbone(), saved)
    assert torch.equal(vpt(pixels).logits, reloaded(pixels).logits)
print(f"The wheel of vpt_peft {vpt_peft.__version__} works with torch {torch.__version__}.")
