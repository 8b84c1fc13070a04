"""transformers' Trainer, with nothing but ``Trainer(vpt, args, ...)``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers.hub_server import HubServer
from helpers.models import BUILDERS, Tiny, assert_same, logits, tiny_vit
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from vpt_peft import (
    AdapterError,
    CheckpointError,
    PromptConfig,
    PushAdapter,
    VPTModel,
    adamw,
    get_adapter_state_dict,
    get_vpt_model,
    parameter_groups,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


class Images(Dataset):  # type: ignore[type-arg]
    """Random images with labels that can be learned, and a column that no model takes."""

    def __init__(self, tiny: Tiny, number: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        size = tiny.pixel_values.shape[-1]
        self.labels = torch.arange(number) % 7
        self.images = torch.randn(number, 3, size, size, generator=generator) + self.labels[:, None, None, None] / 3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": int(self.labels[index]), "row": index}


def right(prediction: Any) -> dict[str, float]:
    return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(vpt: VPTModel, tiny: Tiny, callbacks: Any = None, optimizer: Any = None, **arguments: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"), "num_train_epochs": 2, "per_device_train_batch_size": 4,
            "eval_strategy": "epoch", "save_strategy": "epoch", "logging_steps": 1, "learning_rate": 1e-2,
            "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
        }  # fmt: skip
        images = Images(tiny)
        return Trainer(
            vpt, TrainingArguments(**{**defaults, **arguments}), train_dataset=images, eval_dataset=images,
            compute_metrics=right, callbacks=callbacks, optimizer_cls_and_kwargs=optimizer,
        )  # fmt: skip

    return make


def state(vpt: VPTModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt, vpt.active_adapter).items()}


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_checkpoint_holds_only_the_adapter_and_opens_as_one(tiny: Tiny, new: Any, trainer: Any) -> None:
    backbone = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    vpt = tiny.prompted()
    run = trainer(vpt, tiny)
    run.train()
    checkpoint = Path(run.args.output_dir, "checkpoint-8")
    size = sum(tensor.nbytes for tensor in state(vpt).values())
    for name in ("adapter_model.safetensors", "model.safetensors"):
        assert (checkpoint / name).stat().st_size < size + 2**14
    assert all(name.startswith("adapters.default.") for name in load_file(checkpoint / "model.safetensors"))
    assert len(logged(run, "eval_loss")) == len(logged(run, "eval_right")) == 2
    loaded = VPTModel.from_pretrained(new().model, checkpoint)
    assert_same(state(loaded), state(vpt))
    assert torch.equal(logits(loaded, tiny.pixel_values), logits(vpt.eval(), tiny.pixel_values))
    assert_same(tiny.model.state_dict(), backbone)
    earlier = VPTModel.from_pretrained(new().model, checkpoint.with_name("checkpoint-4"))
    assert not torch.equal(logits(loaded, tiny.pixel_values), logits(earlier, tiny.pixel_values))


@pytest.mark.parametrize("config", [{}, {"bias": "all", "dropout": 0.2}, {"deep": False, "projection_dim": 6}])
def test_resuming_continues_to_bit_identical_weights(
    tiny: Tiny, new: Any, trainer: Any, config: dict[str, Any]
) -> None:
    whole = tiny.prompted(**config)
    run = trainer(whole, tiny)
    run.train()
    resumed = new().prompted(**config)
    with torch.no_grad():
        for parameter in resumed.adapters.parameters():
            parameter.fill_(0.5)  # so that nothing but the checkpoint can give the weights of the whole run
    again = trainer(resumed, tiny)
    again.train(resume_from_checkpoint=str(Path(run.args.output_dir, "checkpoint-4")))
    assert again.state.global_step == 8 and len(logged(again, "loss")) == 8
    assert_same(state(resumed), state(whole))


def test_the_best_checkpoint_is_loaded_at_the_end_and_older_ones_are_deleted(tiny: Tiny, trainer: Any) -> None:
    vpt = tiny.prompted()
    scores = iter([0.1, 0.9, 0.5, 0.2])
    arguments = {"num_train_epochs": 4, "load_best_model_at_end": True, "metric_for_best_model": "score"}
    run = trainer(vpt, tiny, save_total_limit=1, greater_is_better=True, **arguments)
    run.compute_metrics = lambda _: {"score": next(scores)}
    run.train()
    best = Path(run.args.output_dir, "checkpoint-8")
    assert run.state.best_model_checkpoint == str(best)
    assert [path.name for path in best.parent.glob("checkpoint-*")] == ["checkpoint-8"]
    assert_same(state(vpt), state(VPTModel.from_pretrained(BUILDERS[tiny.name]().model, best)))


def test_columns_that_no_model_takes_are_left_out_of_a_data_set(vit: Tiny, trainer: Any) -> None:
    images = Images(vit)
    rows = datasets.Dataset.from_dict({
        "pixel_values": images.images.numpy(), "labels": images.labels.numpy(), "row": list(range(len(images))),
    }).with_format("torch")  # fmt: skip
    alike, vpt = vit.prompted(), BUILDERS["vit"]().prompted()
    trainer(alike, vit, save_strategy="no").train()
    run, given = trainer(vpt, vit, save_strategy="no"), set()
    vpt.register_forward_pre_hook(lambda _module, _args, kwargs: given.update(kwargs), with_kwargs=True)
    run.train_dataset = run.eval_dataset = rows
    run.train()
    assert given == {"pixel_values", "labels"}
    assert_same(state(vpt), state(alike), 1e-6)
    assert len(logged(run, "eval_loss")) == 2


def test_copies_on_several_gpus_in_one_process_are_refused_with_advice(vit: Tiny) -> None:
    with pytest.raises(AdapterError, match="Start one process per GPU with torchrun"):
        vit.prompted()._replicate_for_data_parallel()  # what nn.DataParallel asks of every module


def test_training_stops_early_and_callbacks_see_the_model(vit: Tiny, trainer: Any) -> None:
    seen = []

    class Watch(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(model)

    vpt = vit.prompted()
    arguments = {"load_best_model_at_end": True, "metric_for_best_model": "right", "num_train_epochs": 9}
    run = trainer(vpt, vit, [EarlyStoppingCallback(1), Watch()], learning_rate=0.0, **arguments)
    run.train()
    assert seen == [vpt, vpt]


def test_gradient_accumulation_is_the_larger_batch(tiny: Tiny, new: Any, trainer: Any) -> None:
    large, small = tiny.prompted(), new().prompted()
    trainer(large, tiny, per_device_train_batch_size=8, save_strategy="no", max_steps=2).train()
    trainer(
        small, tiny, gradient_accumulation_steps=4, per_device_train_batch_size=2, save_strategy="no", max_steps=2
    ).train()
    assert_same(state(small), state(large), 2e-5)


def test_losses_that_count_no_items_accumulate_rightly_too(vit: Tiny, trainer: Any) -> None:
    found = []
    for parts in ({"per_device_train_batch_size": 8}, {"gradient_accumulation_steps": 4}):
        model = BUILDERS["vit"]().model
        model.config.problem_type = "multi_label_classification"
        vpt = get_vpt_model(model, PromptConfig(num_tokens=2))
        vpt.adapters["default"].load_state_dict(found[0][1]) if found else None
        before = copy.deepcopy(vpt.adapters["default"].state_dict())
        run = trainer(
            vpt, vit, save_strategy="no", eval_strategy="no", max_steps=1, optim="sgd", max_grad_norm=0,
            **{"per_device_train_batch_size": 2, **parts},
        )  # fmt: skip
        run.data_collator = lambda rows: {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.eye(7)[[row["labels"] for row in rows]],
        }
        run.train()
        found.append((state(vpt), before))
    assert_same(found[1][0], found[0][0], 1e-6)


def test_unloading_ends_what_trainer_switched_on(tiny: Tiny, trainer: Any) -> None:
    vpt = tiny.prompted()
    trainer(vpt, tiny, save_strategy="no", max_steps=1, gradient_checkpointing=True).train()
    assert not vpt.unload().is_gradient_checkpointing


def test_gradient_checkpointing_changes_no_weight(tiny: Tiny, new: Any, trainer: Any) -> None:
    plain, checkpointed = tiny.prompted(deep=False), new().prompted(deep=False)
    trainer(plain, tiny, save_strategy="no").train()
    trainer(checkpointed, tiny, save_strategy="no", gradient_checkpointing=True).train()
    assert checkpointed.is_gradient_checkpointing
    assert_same(state(checkpointed), state(plain), 1e-6)


@pytest.mark.parametrize(
    ("tiny", "how"), [("vit", "bf16"), ("swin", "bf16"), ("beit", "bf16"), ("vit", "compiled")], indirect=["tiny"]
)
@pytest.mark.heavy
def test_it_trains_in_bfloat16_and_compiled(tiny: Tiny, new: Any, trainer: Any, how: str) -> None:
    vpt = tiny.prompted()
    precisions = set()
    arguments: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    if how == "bf16":
        arguments = {"bf16": True}
        linear = next(module for module in tiny.model.modules() if isinstance(module, torch.nn.Linear))
        linear.register_forward_hook(lambda _module, _inputs, output: precisions.add(output.dtype))
    counters.clear()
    run = trainer(vpt, tiny, num_train_epochs=6, learning_rate=2e-2, **arguments)
    run.train()
    assert torch.bfloat16 in precisions if how == "bf16" else counters["stats"]["unique_graphs"] > 0
    losses = logged(run, "loss")
    assert sum(losses[-4:]) < sum(losses[:4])
    loaded = VPTModel.from_pretrained(new().model, Path(run.args.output_dir, "checkpoint-24"))
    assert_same(state(loaded), state(vpt))
    assert all(tensor.dtype == torch.float32 for tensor in state(vpt).values())


def test_label_smoothing_gives_the_smoothed_loss(vit: Tiny, trainer: Any) -> None:
    vpt = vit.prompted()
    run = trainer(vpt, vit, label_smoothing_factor=0.2)
    batch = Images(vit).images[:4], torch.arange(4) % 7
    with torch.no_grad():
        loss = run.compute_loss(vpt, {"pixel_values": batch[0], "labels": batch[1]})
        expected = torch.nn.functional.cross_entropy(vpt(batch[0]).logits, batch[1], label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)
    run.train()


def test_only_the_active_adapter_is_in_a_checkpoint(tiny: Tiny, new: Any, trainer: Any) -> None:
    vpt = tiny.prompted()
    vpt.add_adapter("birds", PromptConfig(num_tokens=2), num_labels=7)
    vpt.set_adapter("birds")
    run = trainer(vpt, tiny)
    run.train()
    checkpoint = Path(run.args.output_dir, "checkpoint-8")
    assert not (checkpoint / "adapter_model.safetensors").exists()
    loaded = VPTModel.from_pretrained(new().model, checkpoint, adapter_name="birds")
    assert_same(state(loaded), state(vpt))
    second = new().prompted()
    second.add_adapter("birds", PromptConfig(num_tokens=2), num_labels=7)
    second.set_adapter("birds")
    trainer(second, tiny).train(resume_from_checkpoint=str(checkpoint.with_name("checkpoint-4")))
    assert_same(state(second), state(vpt))


def test_prompts_and_head_get_their_own_learning_rates(tiny: Tiny, trainer: Any) -> None:
    vpt = tiny.prompted(bias="all")
    run = trainer(
        vpt, tiny, optimizer=adamw(vpt, 1e-3, 1e-2, weight_decay=0.1), max_steps=1, lr_scheduler_type="constant"
    )
    run.train()
    tensors = vpt.adapters["default"].state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in tensors.items()}
    got = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in run.optimizer.param_groups
        for parameter in group["params"]
    }
    assert got.keys() == tensors.keys()
    assert got["prompts.0"] == (1e-3, 0.1)
    assert got["head.classifier.weight"] == (1e-2, 0.1)
    assert got["head.classifier.bias"] == (1e-2, 0.0)
    assert {got[name] for name in got if name.startswith("bias.")} == {(1e-3, 0.0)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"prefix": 3e-2, "bias": 3e-3, "head": 1e-2}),
        ({"learning_rate": 1e-3}, {"prefix": 1e-3, "bias": 1e-3, "head": 1e-2}),
        ({"bias_learning_rate": 1e-4, "head_learning_rate": None}, {"prefix": 3e-2, "bias": 1e-4, "head": 3e-3}),
    ],
)
def test_each_kind_of_parameter_has_a_learning_rate_of_its_own(
    vit: Tiny, given: dict[str, float], expected: dict[str, float]
) -> None:
    vpt = vit.prompted(kind="prefix", bias="all")
    rates = {id(own): group["lr"] for group in parameter_groups(vpt, **given) for own in group["params"]}
    adapter = vpt.adapters["default"]
    assert {part: {rates[id(own)] for own in getattr(adapter, part).parameters()} for part in expected} == {
        part: {rate} for part, rate in expected.items()
    }
    assert len(rates) == sum(own.requires_grad for own in vpt.parameters())
    tokens = get_vpt_model(tiny_vit().model, PromptConfig())
    assert {group["lr"] for group in parameter_groups(tokens)} == {3e-3, 1e-2}


def test_a_whole_model_that_trains_has_a_head_too(tiny: Tiny) -> None:
    rates = {
        id(parameter): group["lr"]
        for group in parameter_groups(tiny.model, 1e-4, 1e-3)
        for parameter in group["params"]
    }
    head = {id(parameter) for parameter in tiny.model.classifier.parameters()}
    assert rates == {id(one): 1e-3 if id(one) in head else 1e-4 for one in tiny.model.parameters()}
    with pytest.raises(AdapterError, match="got Linear, whose head is unknown"):
        parameter_groups(torch.nn.Linear(2, 2))
    assert parameter_groups(torch.nn.Linear(2, 2), 1e-3, None)[0]["lr"] == 1e-3


def test_parameter_groups_refuse_what_makes_no_sense(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    with pytest.raises(AdapterError, match="head_learning_rate must be a number of at least 0, got -1"):
        parameter_groups(vpt, head_learning_rate=-1)
    vpt.save_pretrained(tmp_path)
    vpt.unload()
    frozen = VPTModel.from_pretrained(vit.model, tmp_path)
    with pytest.raises(AdapterError, match="is_trainable=True"):
        adamw(frozen)


def test_trainer_pushes_what_opens_from_the_hub(vit: Tiny, trainer: Any, hub: HubServer) -> None:
    vpt = vit.prompted()
    run = trainer(vpt, vit, push_to_hub=True, hub_model_id="me/tuned", hub_token="hf_me")
    run.train()
    run.push_to_hub()
    loaded = VPTModel.from_pretrained(BUILDERS["vit"]().model, "me/tuned", token="hf_me")
    assert_same(state(loaded), state(vpt))


@pytest.mark.parametrize(("name", "repository"), [("me/tuned", "me/tuned"), ("tuned", "me/tuned"), (None, "me/out")])
def test_a_push_while_training_is_a_whole_adapter_with_the_callback(
    name: str | None, repository: str, vit: Tiny, trainer: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.trainer.is_peft_available", lambda: False)
    vpt = vit.prompted()
    arguments = {"push_to_hub": True, "hub_model_id": name, "hub_token": "hf_me", "hub_always_push": True}
    run = trainer(vpt, vit, [PushAdapter()], **arguments)
    run.train()
    loaded = VPTModel.from_pretrained(BUILDERS["vit"]().model, repository, token="hf_me")
    assert_same(state(loaded), state(vpt))
    card = Path(hf_hub_download(repository, "README.md", token="hf_me")).read_text()
    assert f'from_pretrained(model, "{repository}")' in card and run.args.output_dir not in card


@pytest.mark.parametrize("has_peft", [False, True])
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_no_push_of_trainer_publishes_the_path_of_a_local_backbone(
    strategy: str, has_peft: bool, vit: Tiny, trainer: Any, hub: HubServer, tmp_path: Path, monkeypatch: Any
) -> None:
    if has_peft:
        pytest.importorskip("peft")
    monkeypatch.setattr("transformers.trainer.is_peft_available", lambda: has_peft)
    vit.model.save_pretrained(tmp_path / "my backbone")
    vit.model = type(vit.model).from_pretrained(tmp_path / "my backbone")
    vpt = vit.prompted()
    arguments = {"push_to_hub": True, "hub_model_id": "me/tuned", "hub_token": "hf_me", "hub_always_push": True}
    run = trainer(vpt, vit, [PushAdapter()], hub_strategy=strategy, **arguments)
    with pytest.warns(UserWarning, match="is a local folder .*, which is not published"):
        run.train()
    run.push_to_hub()
    commits = hub.repo("me/tuned").history()
    assert [path for commit in commits for path, blob in commit.files.items() if b"my backbone" in blob.content] == []
    assert "adapter_config.json" in commits[0].files


def test_trainer_with_the_callback_refuses_a_repository_with_a_model_before_training(
    vit: Tiny, trainer: Any, hub: HubServer, tmp_path: Path
) -> None:
    vit.model.save_pretrained(tmp_path / "model")
    hub.add_repo("me/model", tmp_path / "model")
    before = hub.repo("me/model").history()
    run = trainer(vit.prompted(), vit, [PushAdapter()], push_to_hub=True, hub_model_id="me/model", hub_token="hf_me")
    for push in (run.train, run.push_to_hub):
        with pytest.raises(CheckpointError, match="'me/model' contains a model"):
            push()
    assert run.state.global_step == 0 and hub.repo("me/model").history() == before


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_a_checkpoint_goes_into_the_adapter_that_it_was_made_of(vit: Tiny, trainer: Any, is_forgotten: bool) -> None:
    def two(tiny: Tiny) -> VPTModel:
        vpt = tiny.prompted()
        vpt.add_adapter("birds", PromptConfig(num_tokens=5))  # of the same shapes
        return vpt

    vpt, resumed = two(vit), two(tiny_vit())
    vpt.set_adapter("birds")
    run = trainer(vpt, vit)
    run.train()
    before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(resumed, "default").items()}
    checkpoint = str(Path(run.args.output_dir, "checkpoint-8"))
    again = trainer(resumed, vit)
    if is_forgotten:
        with pytest.warns(
            UserWarning, match=r"contains birds, but not the active adapter default.*call set_adapter\('birds'\)"
        ):
            again._load_from_checkpoint(checkpoint)
    else:
        resumed.set_adapter("birds")
        again.train(resume_from_checkpoint=checkpoint)
    assert_same(dict(get_adapter_state_dict(resumed, "birds")), state(vpt))
    assert_same(dict(get_adapter_state_dict(resumed, "default")), before)
    with pytest.raises(CheckpointError, match=r"unexpected: adapters\.birds"):
        trainer(tiny_vit().prompted(), vit).train(resume_from_checkpoint=checkpoint)


def test_noise_on_the_embeddings_is_added_while_training_alone(vit: Tiny, trainer: Any) -> None:
    noisy, still, plain = vit.prompted(), tiny_vit().prompted(), tiny_vit().prompted()
    for vpt, alpha in ((noisy, 5.0), (still, 0.0), (plain, None)):
        run = trainer(vpt, vit, save_strategy="no", neftune_noise_alpha=alpha)
        run.train()
    assert_same(state(still), state(plain))
    assert not torch.equal(state(noisy)["prompts.0"], state(plain)["prompts.0"])
    assert torch.equal(logits(noisy.eval(), vit.pixel_values), logits(noisy, vit.pixel_values))
    assert not any(module.training for module in noisy.base_model.modules())


def test_a_state_dict_holds_adapters_alone_and_comes_back(tiny: Tiny, new: Any) -> None:
    vpt, other = tiny.prompted(), new().prompted()
    vpt.add_adapter("birds", PromptConfig(num_tokens=2))
    other.add_adapter("birds", PromptConfig(num_tokens=2))
    saved = vpt.state_dict()
    assert all(name.startswith(("adapters.default.", "adapters.birds.")) for name in saved)
    result = other.load_state_dict(copy.deepcopy(saved))
    assert result.missing_keys == result.unexpected_keys == []
    assert_same(dict(other.state_dict()), dict(saved))
    first, *_, last = saved
    for changed, message in (
        ({last: torch.zeros(1, 1)}, "of another shape"),
        ({last: torch.full_like(saved[last], torch.nan)}, "not finite"),
        ({"adapters.cats.prompts.0": torch.zeros(1, 1)}, "unexpected"),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict({**saved, first: saved[first] + 1, **changed})
        assert_same(dict(other.state_dict()), dict(vpt.state_dict()))
    alone = {name: tensor for name, tensor in saved.items() if name.startswith("adapters.default.")}
    assert set(other.load_state_dict(alone, strict=False).missing_keys) == saved.keys() - alone.keys()
    saved.popitem()
    with pytest.raises(CheckpointError, match="missing"):
        other.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="got the name 1"):
        other.load_state_dict({1: saved[first]})
    assert other.load_state_dict(saved, strict=False).missing_keys == [last]


def test_a_state_dict_with_the_backbones_weights_is_refused(vit: Tiny) -> None:
    vpt = vit.prompted()
    before = {name: tensor.clone() for name, tensor in vit.model.state_dict().items()}
    stranger = {f"base_model.{name}": torch.zeros_like(tensor) for name, tensor in before.items()}
    with pytest.raises(ValueError, match="The backbone never changes"):
        vpt.load_state_dict({**vpt.state_dict(), **stranger})
    assert_same(dict(vit.model.state_dict()), before)
    wrapped = torch.nn.ModuleDict({"inner": vpt})
    with pytest.raises(ValueError, match="The backbone never changes"):
        wrapped.load_state_dict({f"inner.{name}": tensor for name, tensor in {**vpt.state_dict(), **stranger}.items()})
    assert_same(dict(vit.model.state_dict()), before)


@pytest.mark.parametrize("is_full", [False, True])
def test_the_tools_of_torch_for_state_dicts_bring_one_back(tiny: Tiny, new: Any, is_full: bool) -> None:
    vpt, other = tiny.prompted(), new().prompted()
    torch.nn.init.ones_(vpt.adapters["default"].prompts[0])
    options = StateDictOptions(full_state_dict=is_full)
    given = get_model_state_dict(vpt, options=options)
    assert set(given) == set(vpt.state_dict())
    for _ in range(2):  # what torch has added to it, the backbone as it is, is no harm
        set_model_state_dict(other, given, options=options)
    assert_same(state(other), state(vpt))
    given["base_model.classifier.weight"] = torch.zeros_like(tiny.model.classifier.weight)
    with pytest.raises(CheckpointError, match="The backbone never changes"):
        set_model_state_dict(other, given, options=options)
    assert tiny.model.classifier.weight.any() and other.base_model.classifier.weight.any()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_a_models_own_folder_is_left_alone(vit: Tiny, tmp_path: Path, name: str) -> None:
    vit.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    vpt = vit.prompted()
    for arguments in ({}, {"state_dict": None}):
        with pytest.raises(
            CheckpointError, match=f"a folder of its own, but .* contains a model .{name}.*Choose another"
        ):
            vpt.save_pretrained(tmp_path, **arguments)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_over_a_checkpoint_updates_the_weights_that_trainer_loads(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    vpt.save_pretrained(tmp_path, state_dict=None)
    torch.nn.init.ones_(vpt.adapters["default"].prompts[0])
    vpt.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["prompts.0"].eq(1).all()
    assert_same(load_file(tmp_path / "model.safetensors"), {f"adapters.default.{key}": saved[key] for key in saved})


def test_wrong_arguments_are_refused_before_anything_is_written(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    with pytest.raises(TypeError, match="takes no shard_size"):
        vpt.save_pretrained(tmp_path / "x", shard_size="5GB")
    with pytest.raises(AdapterError, match="must name some of default"):
        vpt.save_pretrained(tmp_path / "x", [])
    assert not (tmp_path / "x").exists()


def test_the_loss_is_the_backbones_or_the_one_that_is_set(vit: Tiny) -> None:
    vpt = vit.prompted()
    assert vpt.loss_function == vit.model.loss_function
    vpt.loss_function = lambda labels, logits, config, **_: logits.sum() * 0 + 7
    assert vpt(vit.pixel_values, labels=vit.labels).loss == 7
    assert vit.model.loss_function is not vpt.loss_function


def test_an_adapter_without_a_head_has_parameter_groups(vit: Tiny) -> None:
    vpt = get_vpt_model(vit.model.vit, PromptConfig(num_tokens=2))
    assert [group["lr"] for group in parameter_groups(vpt)] == [3e-3]


def test_the_loss_is_divided_by_the_number_of_items_that_is_given(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    found = vpt(tiny.pixel_values, labels=tiny.labels, num_items_in_batch=torch.tensor(10)).loss
    expected = torch.nn.functional.cross_entropy(logits(vpt, tiny.pixel_values), tiny.labels, reduction="sum") / 10
    torch.testing.assert_close(found, expected)
    mean = vpt(tiny.pixel_values, labels=tiny.labels).loss
    torch.testing.assert_close(mean, expected * 10 / len(tiny.labels))


def test_the_loss_that_is_set_gets_the_number_of_items(vit: Tiny) -> None:
    vpt, given = vit.prompted(), []
    vpt.loss_function = lambda labels, logits, config, **kwargs: given.append(kwargs) or logits.sum()
    vpt(vit.pixel_values, labels=vit.labels)
    vpt(vit.pixel_values, labels=vit.labels, num_items_in_batch=6)
    assert given == [{}, {"num_items_in_batch": 6}]


def predictions(run: Trainer) -> list[Tensor]:
    """Trains, and returns the logits of each evaluation on the way."""
    found = []
    run.compute_metrics = lambda prediction: found.append(torch.tensor(prediction.predictions)) or {"ok": 1.0}
    run.train()
    return found


def test_noise_on_the_embeddings_is_in_the_loss_and_in_no_evaluation(vit: Tiny, trainer: Any) -> None:
    """At a learning rate of 0, the only difference is the noise."""
    arguments = {"save_strategy": "no", "learning_rate": 0.0, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    plain_run = trainer(vit.prompted(), vit, **arguments)
    noisy_run = trainer(tiny_vit().prompted(), vit, neftune_noise_alpha=50.0, **arguments)
    plain, noisy = predictions(plain_run), predictions(noisy_run)
    assert len(plain) == len(noisy) == 4
    for ours, theirs in zip(noisy, plain, strict=True):
        assert torch.equal(ours, theirs)
    losses = zip(logged(noisy_run, "loss"), logged(plain_run, "loss"), strict=True)
    assert all(abs(ours - theirs) > 1e-2 for ours, theirs in losses)


@pytest.mark.parametrize("kind", ["vit", "beit"])  # transformers' noise takes no embeddings of Swin's kind
def test_noise_on_the_embeddings_follows_the_mode_of_the_model(kind: str) -> None:
    tiny = BUILDERS[kind]()
    vpt = tiny.prompted()
    expected = logits(vpt, tiny.pixel_values)
    handle = activate_neftune(vpt, 50.0)
    for _ in range(2):
        assert not torch.equal(logits(vpt.train(), tiny.pixel_values), expected)
        assert torch.equal(logits(vpt.eval(), tiny.pixel_values), expected)
    deactivate_neftune(vpt, handle)
    assert torch.equal(logits(vpt.train(), tiny.pixel_values), expected)
    assert not any(module.training for module in vpt.base_model.modules())
