"""A quantized transformer on the NPU stand-in: the real device code, with products that go to torch_npu."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import run
from generate_kit import short_toy

TESTS = Path(__file__).parent
PROGRAM = """
import json, sys, types
sys.path.insert(0, sys.argv[2])
import npu_standin, torch
npu_standin.install()
torch.set_num_threads(1)
from pathlib import Path
from generate_kit import TOY, forward, inputs, opened
from streamq import outputs
from streamq.device import open_device
from streamq.generation.layers import quantized_weights
from streamq.generation.store import Room
from streamq.generation.transformer import Transformer

shapes = []

def npu_quant_matmul(x1, x2, scale, *, pertoken_scale, output_dtype):
    assert x1.dtype == x2.dtype == torch.int8 and scale.dtype == pertoken_scale.dtype == torch.float32
    shapes.append([*x1.shape, *x2.shape])
    acc = x1.cpu().double() @ x2.cpu().double()
    return (acc.float() * scale.cpu() * pertoken_scale.cpu()[:, None]).to(output_dtype).to(x1.device)

# after diffusers, which looks for the real one when it is imported
sys.modules["torch_npu"] = types.SimpleNamespace(npu_quant_matmul=npu_quant_matmul)
folder = Path(sys.argv[1])
with opened(folder, torch.bfloat16) as one:
    due = forward(one.module, torch.bfloat16).float()
    block = one.store.kept_nbytes("blocks.0")
weights = quantized_weights(outputs.find_outputs(folder)[0], folder, TOY / "transformer")
device, found = open_device("npu:0"), []
for room in (Room(0), Room(block, block), Room(1 << 40)):
    one = Transformer(weights, device, room, torch.bfloat16)
    given = {name: tensor.to("npu:0") for name, tensor in inputs(torch.bfloat16).items()}
    with torch.no_grad():
        for _ in range(2):
            made = one.module(return_dict=False, **given)[0].cpu().float()
    found.append({"error": float((made - due).norm() / due.norm()), "resident": one.store.resident})
    one.close()
print(json.dumps({"block": block, "found": found, "shapes": shapes, "hazards": npu_standin.counts.hazards}))
"""


def test_blocks_on_the_card_in_ram_and_on_disk(tmp_path: Path) -> None:
    toy = short_toy(tmp_path / "toy", blocks=3)
    quantized = tmp_path / "quantized"
    how = ("--quant_type", "w8a8", "--format", "mindie", "--device", "cpu", "--quiet")
    assert run("quant", "--model_path", toy, "--save_path", quantized, *how).returncode == 0
    argv = [sys.executable, "-c", PROGRAM, quantized, TESTS]
    result = subprocess.run([str(one) for one in argv], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["hazards"] == []
    assert len(told["shapes"]) == 3 * 2 * 3 * 9  # rooms, forwards, blocks, layers: all but ffn.2 are int8
    assert [one["resident"][0] // told["block"] for one in told["found"]] == [0, 1, 3]
    assert told["found"][1]["resident"][1] > 0.9 * told["block"] and told["found"][0]["resident"][1] == 0
    assert all(one["error"] < 0.02 for one in told["found"])  # outputs are rounded to bf16 once more
    assert len({one["error"] for one in told["found"]}) == 1
