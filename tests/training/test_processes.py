"""Several processes: what two of them compute together is what one computes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import BUILDERS, assert_same
from helpers.processes import CONFIGS, WAYS, step, train
from safetensors.torch import load_file
from torch import distributed

from vpt_peft import AdapterError, VPTModel, get_adapter_state_dict

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they computed."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [*launch, str(ROOT / "tests" / "helpers" / "processes.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_gradients_and_weights_of_one_with_the_whole_batch(
    way: str, kind: str, config: str, together: Path
) -> None:
    tiny = BUILDERS[kind]()
    vpt = tiny.prompted(**CONFIGS[config]).train()
    gradients = step(vpt, vpt, tiny.pixel_values, tiny.labels)
    folder = together / f"{way}-{kind}-{config}"
    assert_same(load_file(folder / "gradients.safetensors"), gradients, TOLERANCE)
    loaded = VPTModel.from_pretrained(BUILDERS[kind]().model, folder)
    for name, tensor in get_adapter_state_dict(loaded).items():
        firm = gradients[name].abs() > 1e-4  # AdamW's first step takes the sign of the smallest gradient for its size
        expected = get_adapter_state_dict(vpt)[name]
        torch.testing.assert_close(tensor[firm], expected[firm], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("way", WAYS)
def test_prompts_start_as_the_same_tokens_in_all_processes(way: str, kind: str, together: Path) -> None:
    tiny = BUILDERS[kind]()
    vpt = tiny.prompted()
    torch.manual_seed(0)
    vpt.init_prompts([tiny.pixel_values])
    expected = {name: value for name, value in get_adapter_state_dict(vpt).items() if name.startswith("prompts.")}
    for process in range(2):
        assert_same(load_file(together / f"{way}-{kind}-deep" / f"prompts-{process}.safetensors"), expected, TOLERANCE)


@pytest.mark.parametrize("kind", BUILDERS)
def test_trainer_in_two_processes_trains_what_it_trains_in_one(kind: str, together: Path, tmp_path: Path) -> None:
    tiny = BUILDERS[kind]()
    vpt = tiny.prompted()
    train(vpt, tiny, tmp_path, batch_size=4)
    loaded = VPTModel.from_pretrained(BUILDERS[kind]().model, together / f"trainer-{kind}")
    assert_same(get_adapter_state_dict(loaded), get_adapter_state_dict(vpt), 1e-4)
    assert (together / f"trainer-{kind}" / "model.safetensors").stat().st_size < 20_000, "the adapter alone"


def test_a_move_that_would_lose_the_backbone_is_refused() -> None:
    vpt = BUILDERS["vit"]().prompted()
    with pytest.raises(AdapterError, match="cpu_ram_efficient_loading"):
        vpt.to("meta")
