"""Mutations of an adapter folder: edits, damage, and what other tools write.

Each function takes hypothesis' ``draw`` and the bytes of a file, and returns those of a changed one. JSON objects are
changed as pairs of a key and the text of its value, so that keys can occur twice and values need not be valid JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st

from vpt_peft.io import pack_weights

Draw = Callable[[st.SearchStrategy[Any]], Any]
Pairs = list[tuple[str, str]]

HUGE = [2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**4000]
NASTY = [
    "", " ", "\0", "../../etc/passwd", "/dev/zero", "C:\\x", "a\nb", "\ud800", "\x1b[2J", "$title", "é" * 300,
    "x" * 10**5,
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U64", "BOOL", "F8_E4M3", "F4", "C64", "f32", ""]
KNOWN = [
    "default", "image", "prompt", "global", "uniform", "normal", "none", "all", "auto", "tokens", "key_value", "VPT",
    "IMAGE_CLASSIFICATION", "FEATURE_EXTRACTION", "vit", "swin", "regression", "classifier", "vit.layernorm", "main",
    "layernorm", "google/vit",
]  # fmt: skip
# Values that would be valid, though of another adapter.
OTHERS: dict[str, list[Any]] = {
    "num_tokens": [0, 1, 2, 3], "deep": [True, False], "carry": [True, False], "shared": [True, False],
    "layers_to_transform": [None, [0], [1, 3], [0, 1, 2, 3]], "projection_dim": [None, 3, 4], "dropout": [0, 0.1, 0.5],
    "pooling": ["default", "image", "prompt", "global"], "bias": ["none", "all"], "init": ["uniform", "normal"],
    "modules_to_save": [None, ["vit.layernorm"], ["classifier"]], "route": ["auto", "tokens", "key_value"],
    "problem_type": [None, "regression"], "model_type": ["vit", "swin"],
    "model_class": [None, "ViTModel", "ViTForImageClassification", "AutoModel", "PreTrainedModel"],
    "widths": [[24] * 4, [24] * 3],
    "task_type": [None, "IMAGE_CLASSIFICATION", "FEATURE_EXTRACTION"], "label2id": [{}, {"a": 0}],
    "id2label": [{"0": "a"}],
}  # fmt: skip
NEW_KEYS = ["num_labels", "auto_map", "torch_dtype", "depth", "__class__", "Num_tokens", "model", "quantization_config"]


def numbers() -> st.SearchStrategy[Any]:
    return st.integers(-3, 30) | st.sampled_from(HUGE) | st.floats() | st.sampled_from([1e300, 0.1, -0.0, 0.5])


def plain() -> st.SearchStrategy[Any]:
    words = st.sampled_from(KNOWN) | st.sampled_from(NASTY) | st.text(max_size=6)
    return st.none() | st.booleans() | numbers() | words


def values() -> st.SearchStrategy[Any]:
    return st.recursive(
        plain(),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.just("0"), inner, max_size=3)
        ),
        max_leaves=6,
    )


def texts() -> st.SearchStrategy[str]:
    """Of any JSON value, and of some that are none."""
    deep = st.sampled_from([100, 5_000, 200_000]).map(lambda depth: "[" * depth + "]" * depth)
    return values().map(_dump) | plain().map(_dump) | deep | st.sampled_from(["", "tru", "1e999", "01", "'a'", "NaN"])


def _dump(value: Any) -> str:
    return json.dumps(value)


def changed_object(draw: Draw, pairs: Pairs) -> Pairs:
    """A JSON object after one edit."""
    pairs = list(pairs)
    place = draw(st.integers(0, max(0, len(pairs) - 1)))
    key, value = pairs[place] if pairs else ("x", "0")
    match draw(
        st.sampled_from(
            ["other", "other", "value", "value", "inside", "inside", "remove", "add", "twice", "rename", "order"]
        )
    ):
        case "other" if key in OTHERS:
            pairs[place : place + 1] = [(key, _dump(draw(st.sampled_from(OTHERS[key]))))]
        case "value":
            pairs[place : place + 1] = [(key, draw(texts()))]
        case "inside":
            pairs[place : place + 1] = [(key, changed_text(draw, value))]
        case "remove":
            del pairs[place : place + 1]
        case "add":
            pairs.insert(place, (draw(st.sampled_from(NEW_KEYS + NASTY) | st.text(max_size=5)), draw(texts())))
        case "twice":
            pairs.insert(draw(st.integers(0, len(pairs))), (key, draw(st.just(value) | texts())))
        case "rename":
            pairs[place : place + 1] = [(draw(st.sampled_from([key + " ", key.upper(), *NASTY, *NEW_KEYS])), value)]
        case "order":
            pairs = draw(st.permutations(pairs))
    return pairs


def changed_text(draw: Draw, text: str) -> str:
    """The text of a JSON value after an edit inside it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text + draw(texts())
    if isinstance(value, dict):
        return render(changed_object(draw, [(key, _dump(inner)) for key, inner in value.items()]))
    if isinstance(value, list) and value:
        place = draw(st.integers(0, len(value) - 1))
        value[place : place + 1] = draw(st.lists(plain(), max_size=2))
        return _dump(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _dump(value + draw(st.integers(-3, 3)))
    return draw(texts())


def render(pairs: Pairs) -> str:
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in pairs) + "}"


def parse(text: bytes) -> Pairs:
    return [(key, _dump(value)) for key, value in json.loads(text).items()]


def configs(draw: Draw, content: bytes) -> bytes:
    """adapter_config.json with some fields changed."""
    pairs = parse(content)
    for _ in range(draw(st.integers(1, 2))):
        pairs = changed_object(draw, pairs)
    return render(pairs).encode()


def damaged(draw: Draw, content: bytes) -> bytes:
    """Any file with bytes changed, put in, left out, or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        # Most of a weights file is numbers: half of all damages go to its header.
        place = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 2_000)))
        match draw(st.sampled_from(["flip", "flip", "set", "insert", "delete", "cut", "repeat"])):
            case "flip" if place < len(data):
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "set" if place < len(data):
                data[place] = draw(st.integers(0, 255))
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del data[place : place + draw(st.integers(1, 9))]
            case "cut":
                del data[place:]
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 300))]
    return bytes(data)


def split(content: bytes) -> tuple[bytes, bytes]:
    """The header's text and the data of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    return content[8:start], content[start:]


def join(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def headers(draw: Draw, content: bytes) -> bytes:
    """A weights file with another header."""
    header, data = split(content)
    pairs = parse(header)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, max(0, len(pairs) - 1)))
        if draw(st.booleans()) or not pairs or pairs[place][0] == "__metadata__":
            pairs = changed_object(draw, pairs)
        else:
            pairs[place] = (pairs[place][0], entry(draw, pairs[place][1]))
    text = render(pairs).encode()
    length = draw(st.none() | st.none() | st.sampled_from([0, 1, len(text) - 1, len(text) + 8, 2**40, 2**64 - 1]))
    return join(text, data + draw(st.just(b"") | st.just(b"") | st.binary(max_size=8)), length)


def seals(draw: Draw, content: bytes) -> bytes:
    """A sealed weights file with an edit in the seal's JSON: in the config, in a hash, or anywhere."""
    header, data = split(content)
    entries = dict(parse(header))
    metadata = json.loads(entries["__metadata__"])
    text = metadata["vpt_peft"]
    sealed = dict(parse(text.encode()))
    match draw(st.sampled_from(["config", "config", "replaces", "seal", "object", "text"])):
        case "config":
            sealed["config"] = render(changed_object(draw, parse(sealed["config"].encode())))
            text = render(list(sealed.items()))
        case "replaces" | "seal" as name:
            others = [_dump(""), _dump("0" * 64), _dump(sealed["seal"][1:-1].upper()), sealed["seal"]]
            sealed[name] = draw(st.sampled_from(others) | texts())
            text = render(list(sealed.items()))
        case "object":
            text = render(changed_object(draw, list(sealed.items())))
        case "text":
            text = damaged(draw, text.encode()).decode("latin-1")
    entries["__metadata__"] = _dump(metadata | {"vpt_peft": text})
    return join(render(list(entries.items())).encode(), data)


def resealed(draw: Draw, config: bytes, content: bytes) -> bytes:
    """A weights file with a valid seal over another config, and over a hash that may be that of the config file."""
    changed = configs(draw, config)
    try:
        values = dict(json.loads(changed))
    except (ValueError, RecursionError):
        values = json.loads(config)
    replaces = draw(st.sampled_from(["", hashlib.sha256(config).hexdigest(), "0" * 64]))
    return pack_weights(safetensors.torch.load(content), values, replaces)


def entry(draw: Draw, text: str) -> str:
    """A tensor's entry in the header, changed."""
    try:
        said = json.loads(text)
        shape, span = list(said["shape"]), list(said["data_offsets"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return draw(texts())
    size = st.integers(-2, 40) | st.sampled_from(HUGE) | plain()
    match draw(st.sampled_from(["dtype", "shape", "offsets", "shift", "turn", "json"])):
        case "dtype":
            said["dtype"] = draw(st.sampled_from(DTYPES) | plain())
        case "shape":
            said["shape"] = draw(st.lists(size, max_size=12) | size)
        case "offsets":
            said["data_offsets"] = draw(st.lists(size, min_size=2, max_size=2) | size)
        case "shift":
            by = draw(st.sampled_from([-4, 4, 1, 2**40]))
            said["data_offsets"] = [number + by for number in span if isinstance(number, int)]
        case "turn":
            said["shape"] = draw(st.sampled_from([shape[::-1], [1, *shape], [*shape, 1], shape * 3, []]))
        case "json":
            return changed_text(draw, text)
    return _dump(said)


def retensored(draw: Draw, content: bytes) -> bytes:
    """A weights file that another tool wrote, without a seal, after an edit of the tensors."""
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(content).items()}
    for _ in range(draw(st.integers(1, 2))):
        change_tensors(draw, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(tensors, draw(st.sampled_from([None, {"format": "pt"}, {"note": "x"}])))


def change_tensors(draw: Draw, tensors: dict[str, torch.Tensor]) -> None:
    """One edit of a state dict."""
    if not tensors:
        return
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    match draw(st.sampled_from(["add", "add", "value", "cast", "cast", "shape", "remove", "rename", "extra", "swap"])):
        case "add":
            tensors[name] = tensor + draw(st.sampled_from([1, 2**-20, -3]))
        case "value" if tensor.numel() and tensor.dtype in (torch.float32, torch.float64):
            value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300, 3e38, 1e-45, 7.5]))
            flat = tensor.flatten().double() if value == 1e300 else tensor.flatten().clone()
            flat[draw(st.integers(0, tensor.numel() - 1))] = value
            tensors[name] = flat.reshape(tensor.shape)
        case "cast":
            kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float32]
            tensors[name] = tensor.to(draw(st.sampled_from(kinds)))
        case "shape":
            turned = [tensor[None], tensor[..., None], tensor.flatten(), tensor.flatten()[:0], torch.zeros(())]
            turned += [tensor.t()] if tensor.ndim == 2 else []
            tensors[name] = turned[draw(st.integers(0, len(turned) - 1))].clone()
        case "remove":
            del tensors[name]
        case "rename":
            names = ["../" + name, name + "\0", name + " ", name.upper(), "prompts.99", "prompts.00", "x" * 10**4]
            tensors[draw(st.sampled_from(names))] = tensors.pop(name)
        case "extra":
            tensors[draw(st.sampled_from(["", "prompts.99", "../x", "head", "weight"]))] = torch.zeros(2)
        case "swap":
            other = draw(st.sampled_from(sorted(tensors)))
            tensors[name], tensors[other] = tensors[other], tensor
