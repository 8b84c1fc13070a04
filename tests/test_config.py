"""PromptConfig: a config that exists is valid."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vpt_peft import ConfigError, PromptConfig

BAD = [
    ({"num_tokens": -1}, "num_tokens must be at least 0, got -1."),
    ({"num_tokens": 2.5}, "num_tokens must be an integer, got 2.5."),
    ({"num_tokens": True}, "num_tokens must be an integer, got True."),
    ({"deep": 1}, "deep must be True or False, got 1."),
    ({"projection_dim": 0}, "projection_dim must be at least 1, got 0."),
    ({"dropout": 1.0}, "dropout must be a number from 0 to below 1, got 1.0."),
    ({"dropout": float("nan")}, "dropout must be a number from 0 to below 1, got nan."),
    ({"pooling": "mean"}, "pooling must be one of 'default', 'image', 'prompt', 'global', got 'mean'."),
    ({"route": "fast"}, "route must be one of 'auto', 'tokens', 'key_value', got 'fast'."),
    ({"bias": "lora_only"}, "bias must be one of 'none', 'all', got 'lora_only'."),
    ({"location": "add"}, "location must be one of 'prepend', got 'add'."),
    ({"peft_type": "LORA"}, "peft_type must be one of 'VPT', got 'LORA'."),
    ({"task_type": "CAUSAL_LM"}, "task_type must be one of None"),
    ({"layers_to_transform": []}, "layers_to_transform must be None or a list of different layer numbers"),
    ({"layers_to_transform": [1, 1]}, "layers_to_transform must be"),
    ({"layers_to_transform": [-1]}, "layers_to_transform must be"),
    ({"layers_to_transform": ["0"]}, "layers_to_transform must be"),
    ({"modules_to_save": "mlp"}, "modules_to_save must be None or a list of module names, got 'mlp'."),
    ({"revision": 3}, "revision must be a string or None, got 3."),
    ({"deep": False, "layers_to_transform": [2]}, "deep=False uses fresh prompts in layer 0 only"),
    ({"num_tokens": 0, "pooling": "prompt"}, "reads prompts, got num_tokens=0"),
    ({"kind": "tokens"}, "kind must be one of 'token', 'prefix', got 'tokens'."),
    ({"kind": "prefix", "deep": False}, 'kind="prefix" needs deep=True, got False: a prefix belongs to the attention'),
    ({"kind": "prefix", "route": "tokens"}, "kind=\"prefix\" needs route='auto', got 'tokens': a prefix has keys"),
    ({"kind": "prefix", "pooling": "global"}, 'has no outputs of prompts, which pooling="global" reads'),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_bad_value_says_what_was_expected_and_what_came(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PromptConfig(**values)
    assert message in str(error.value)
    assert isinstance(error.value, ValueError)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="no field depth, tokens"):
        PromptConfig.from_dict({"tokens": 3, "depth": 1, "num_tokens": 4})


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PromptConfig().num_tokens = 3  # type: ignore[misc]


def test_a_config_survives_json() -> None:
    config = PromptConfig(num_tokens=3, layers_to_transform=[2, 0], modules_to_save=["mlp"], dropout=0.1)
    assert config.layers_to_transform == (0, 2)
    assert PromptConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(PromptConfig.from_dict(config.to_dict()))
