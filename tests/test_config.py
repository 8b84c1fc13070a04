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
    (
        {"pooling": "mean"},
        "pooling must be one of 'default', 'image', 'prompt', 'global', 'class', 'class_and_image', 'pooled', got",
    ),
    ({"route": "fast"}, "route must be one of 'auto', 'tokens', 'key_value', got 'fast'."),
    ({"bias": "lora_only"}, "bias must be one of 'none', 'all', got 'lora_only'."),
    ({"location": "below"}, "location must be one of 'prepend', 'add', 'add-shared', 'pixel', 'border', 'channel'"),
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
    ({"kind": "prefix", "deep": False}, 'kind="prefix" needs deep=True, got False: its keys and values belong to'),
    ({"kind": "prefix", "route": "tokens"}, "kind=\"prefix\" needs route='auto', got 'tokens'"),
    ({"kind": "prefix", "location": "add"}, "kind=\"prefix\" needs location='prepend', got 'add'"),
    ({"kind": "prefix", "pooling": "global"}, 'reads outputs of prompts, which kind="prefix" does not have'),
    *(
        (
            {"location": location, "deep": False, name: value},
            f'location="{location}" needs {name}={only!r}, got {value!r}',
        )
        for location in ("add", "add-shared", "border", "channel")
        for name, value, only in (
            ("carry", False, True),
            ("projection_dim", 6, None),
            ("route", "tokens", "auto"),
            ("route", "key_value", "auto"),
        )
    ),
    *(
        ({"location": location, "deep": False, **values}, f'location="{location}" needs {message}')
        for location in ("border", "channel")
        for values, message in (
            ({"deep": True}, "deep=False, got True: its prompts are part of the image and not of a layer."),
            ({"layers_to_transform": [0]}, "layers_to_transform=None, got (0,)"),
            ({"shared": True}, "shared=False, got True"),
        )
    ),
    *(
        (
            {"location": location, "deep": False, "pooling": pooling},
            f'"{pooling}" reads outputs of prompts, which location',
        )
        for location in ("add", "add-shared", "border", "channel")
        for pooling in ("prompt", "global")
    ),
    ({"location": "pixel", "projection_dim": 6}, "needs projection_dim=None, got 6: its prompts are projected by the"),
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


@pytest.mark.parametrize(
    "values",
    [
        {"location": "add", "layers_to_transform": [1], "shared": True, "dropout": 0.1, "pooling": "image"},
        {"location": "add-shared", "deep": False, "bias": "all"},
        {"location": "pixel", "carry": False, "shared": True, "pooling": "prompt", "route": "tokens"},
        {"location": "border", "deep": False, "dropout": 0.1, "modules_to_save": ["layernorm"]},
        {"location": "channel", "deep": False, "init": "normal", "num_tokens": 0},
    ],
)
def test_other_options_go_with_each_location(values: dict[str, object]) -> None:
    config = PromptConfig(**values)
    assert PromptConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
