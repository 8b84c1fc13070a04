"""The plan of an adapter: which prompts each layer sees, and by which route they reach it."""

from __future__ import annotations

from dataclasses import dataclass

from .config import PromptConfig
from .errors import ConfigError, RouteError, shown


@dataclass(frozen=True)
class Step:
    """What one layer does with prompts.

    Attributes:
        fresh: it gets prompts of its own; else it goes on with what the previous layer made of its prompts.
        route: ``"key_value"``: prompts are only keys and values in its attention; ``"tokens"``: they are
            computed like any other token, since something reads what they become.
    """

    fresh: bool
    route: str


def plan_steps(config: PromptConfig, num_layers: int, pools_prompts: bool) -> tuple[Step | None, ...]:
    """One step a layer, None where it sees no prompts.

    Args:
        pools_prompts: the classifier reads what prompts become in the last layer.

    Raises:
        ConfigError: a layer does not exist, or no prompt reaches the layer that the pooling reads.
        RouteError: ``route="key_value"`` where something reads what prompts become.
    """
    fresh = _fresh_layers(config, num_layers)
    present: list[bool] = []
    for layer in range(num_layers):
        carried = config.carry and layer > 0 and present[layer - 1]
        present.append(layer in fresh or carried)
    if pools_prompts and not present[-1]:
        raise ConfigError(
            f'pooling="{config.pooling}" reads prompts in the last layer ({num_layers - 1}), but none reach it with '
            f"layers_to_transform={sorted(fresh)} and carry={config.carry}. Add that layer, or carry the prompts."
        )

    def is_read(layer: int) -> bool:
        if layer == num_layers - 1:
            return pools_prompts
        return config.carry and layer + 1 not in fresh

    read = [layer for layer in range(num_layers) if present[layer] and is_read(layer)]
    if config.route == "key_value" and read:
        reason = "the pooling reads them" if read == [num_layers - 1] else "they are carried into the next layer"
        raise RouteError(
            f'route="key_value" is exact only where nothing reads what prompts become, but in layers {read} {reason}. '
            'Use route="auto", which takes keys and values in all other layers.'
        )
    return tuple(
        Step(layer in fresh, "tokens" if layer in read or config.route == "tokens" else "key_value")
        if present[layer]
        else None
        for layer in range(num_layers)
    )


def _fresh_layers(config: PromptConfig, num_layers: int) -> set[int]:
    if config.num_tokens == 0:
        return set()
    if config.layers_to_transform is None:
        return set(range(num_layers)) if config.deep else {0}
    missing = [layer for layer in config.layers_to_transform if layer >= num_layers]
    if missing:
        raise ConfigError(
            f"layers_to_transform must name layers from 0 to {num_layers - 1}, got {shown(missing)}. "
            f"The backbone has {num_layers} layers whose results are read."
        )
    return set(config.layers_to_transform)
