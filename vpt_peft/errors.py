"""Errors of the package. Each says what was expected, what came, and what to do."""


class VPTError(ValueError):
    """Base class of every error raised by vpt-peft. It is a ``ValueError`` too."""


class ConfigError(VPTError):
    """A :class:`~vpt_peft.PromptConfig` is invalid, or does not fit the model it is used with."""


class UnsupportedModelError(VPTError):
    """The model is no vision transformer that vpt-peft knows, or its code no longer looks as declared."""


class AdapterError(VPTError):
    """An adapter is missing, exists already, or cannot do what was asked of it."""


class CheckpointError(VPTError):
    """An adapter folder or state dict is incomplete, damaged, or made for another model."""


class RouteError(VPTError):
    """Prompts cannot take the route asked for, or did not reach a layer that they should have reached."""
