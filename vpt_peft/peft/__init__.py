"""Lets PEFT, and transformers with PEFT, open our adapters, once it is imported: ``import vpt_peft.peft``.

``PeftModel.from_pretrained(model, folder)``, ``AutoPeftModel``, ``get_peft_model(model, VPTConfig())``,
``model.load_adapter(folder)``, ``AutoModelForImageClassification.from_pretrained(folder)`` and
``transformers.pipeline(model=folder)`` then work as with adapters of PEFT. No function of either library is replaced:
three of PEFT's dictionaries get an entry each.
"""

from importlib.metadata import version

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import VPTConfig, VPTType
from .tuner import VPTTuner

__all__ = ["VPTConfig"]

OLDEST = (0, 21)  # earlier versions do not ask the tuner how its tensors are named in a file

if tuple(map(int, version("peft").split(".")[:2])) < OLDEST:
    raise ImportError(
        f"vpt_peft.peft needs peft {'.'.join(map(str, OLDEST))} or later, got {version('peft')}. Update: "
        "pip install 'vpt-peft[peft]'."
    )

PEFT_TYPE_TO_CONFIG_MAPPING[VPTType.VPT] = VPTConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[VPTType.VPT] = VPTTuner  # type: ignore[index]
# transformers renames "{prefix}{word}" in a file to "{prefix}{word}.{adapter_name}": our files have no prefix.
PEFT_TYPE_TO_PREFIX_MAPPING[VPTType.VPT] = ""  # type: ignore[index]
