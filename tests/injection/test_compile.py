"""torch.compile where no eager call has been made before: in a new process, and in a new thread."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import BUILDERS, logits
from torch._dynamo.utils import counters

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers.models import BUILDERS, logits
from torch._dynamo.utils import counters

tiny = BUILDERS["vit"]()
vpt = tiny.prompted()
compiled = torch.compile(vpt, fullgraph=True, backend="aot_eager")
outputs = [logits(compiled, tiny.pixel_values) for _ in range(3)]
graphs = counters["stats"]["unique_graphs"]
print(graphs, max((output - logits(vpt, tiny.pixel_values)).abs().max().item() for output in outputs) < 1e-5)
"""

pytestmark = pytest.mark.heavy


def test_a_compiled_model_needs_no_eager_call_in_a_new_process() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(TESTS)], capture_output=True, text=True)
    assert run.stdout.split() == ["1", "True"], run.stderr[-3000:]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [("vit", {}), ("vit", {"deep": False}), ("vit", {"kind": "prefix"}), ("swin", {}), ("beit", {})],
)
def test_a_compiled_model_compiles_once_for_several_calls_and_threads(
    kind: str, config: dict[str, Any], backend: str
) -> None:
    tiny = BUILDERS[kind]()
    vpt = tiny.prompted(**config)
    compiled = torch.compile(vpt, fullgraph=True, backend=backend)
    counters.clear()
    outputs = []
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:  # the thread is new, and so is its forward context
            outputs += list(thread.map(lambda _: logits(compiled, tiny.pixel_values), range(3)))
    assert counters["stats"]["unique_graphs"] == 1
    for output in outputs:
        torch.testing.assert_close(output, logits(vpt, tiny.pixel_values), atol=1e-5, rtol=0)
