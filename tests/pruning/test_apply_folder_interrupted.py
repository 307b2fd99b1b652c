"""apply_folder on a full disk, killed half way, and with little memory."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import struct
import subprocess
import sys

import pytest
import torch
from stored_models import DROP, content, dense, soft_limit
from transformers import AutoModelForCausalLM, LlamaConfig

import gradpruner
from gradpruner.cli.main import main
from gradpruner.model.decoder import Decoder
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Factors
from gradpruner.storage import files

pytestmark = pytest.mark.in_ci  # the slow ones among them

# a checkpoint is half written, and the process says so and stops there until it is killed
HALF_WAY = """
import sys
from pathlib import Path
import gradpruner
from gradpruner.storage import tensor_files
real, done = tensor_files._write, []
def write(file, tensor):
    done.append(tensor)
    if len(done) == 20:
        file.flush()
        print("half way", flush=True)
        sys.stdin.read()
    return real(file, tensor)
tensor_files._write = write
from gradpruner.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "old", [pytest.param(False, marks=pytest.mark.slow, id="new"), pytest.param(True, id="over an old one")]
)
def test_killed_half_way_leaves_nothing_that_loads_and_a_rerun_clears_up(old, tmp_path, capsys):
    source, out = dense("llama", tmp_path / "dense"), tmp_path / "stream"
    DROP.save(tmp_path / "plan.json")
    options = ["apply", "--model", str(source), "--plan", str(tmp_path / "plan.json"), "--out", str(out)]
    if old:
        out.mkdir()
        (out / "precious.txt").write_text("precious")
        options.append("--overwrite")
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half way\n"
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".stream.")]
    assert len(left) == 1 and any(p.stat().st_size > 10_000 for p in left[0].rglob("*.safetensors"))
    # as long as it lives, nobody takes its folder away
    gradpruner.apply_folder(source, tmp_path / "other", DROP)
    with files.atomic_folder(out, overwrite=True) as temporary:
        assert left[0].is_dir() and temporary.parent != left[0]
        (temporary / "precious.txt").write_text("precious")
    assert left[0].is_dir()
    if not old:
        shutil.rmtree(out)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (content(out) == {"precious.txt": b"precious"}) if old else not out.exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)
    assert left[0].is_dir()
    assert main(options) == 0
    assert "stream: verified; removes 3 of 6 decoder layers" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "other", "plan.json", "stream"]
    assert content(out) == content(tmp_path / "other")


LIMITED = """
import resource, sys
from pathlib import Path
import gradpruner, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from gradpruner.probe.igia import Igia
assert gradpruner.apply_folder and gradpruner.Plan  # imported before the limit is set
torch.set_num_threads(1)
torch.ones(1) + 1
source, out, plan, igia, limits = sys.argv[1:]
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
used = int(status["VmData"].split()[0]) * 1024
for limit in limits.split(","):
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(limit), -1))
    try:
        gradpruner.apply_folder(source, out, gradpruner.Plan.load(plan), Igia.load(igia, lazy=True))
        print("done")
    except MemoryError:
        print("MemoryError", Path(out).exists())
"""


@pytest.mark.slow
def test_memory_stays_under_three_layers_weights(tmp_path):
    """Six layers of 48 MiB, an embedding of 96: three of them, beyond what importing takes, must do."""
    config = LlamaConfig(
        vocab_size=24576,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        dtype="float32",
    )
    source = tmp_path / "dense"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(source)
    sizes, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in model.state_dict().items():
        sizes[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    header = json.dumps(sizes).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)  # holes: nothing of it takes disk
    decoder = Decoder(model)
    layer = sum(p.nbytes for p in decoder.layers[0].parameters())
    generator = torch.Generator().manual_seed(0)
    factors = {
        (w.layer, w.name): Factors(
            torch.randn(1, 2, w.shape[1], generator=generator), torch.randn(1, w.shape[0], 2, generator=generator)
        )
        for w in decoder.weights
        if w.layer in (2, 3) and "down_proj" in w.name
    }
    norms = torch.ones(1, len(decoder.weights), dtype=torch.float64)
    Igia(decoder.fingerprint(), "lora", 6, tuple(decoder.weights), norms, ("",) * 6, (0,) * 6, 0, factors).save(
        tmp_path / "igia.safetensors"
    )
    gradpruner.Plan(6, drop=[4, 5], merge={2: 1, 3: 1}).save(tmp_path / "plan.json")
    arguments = [str(source), str(tmp_path / "small"), str(tmp_path / "plan.json"), str(tmp_path / "igia.safetensors")]

    assert end > 6 * layer
    # the first shows that the limit is one: a weight of 16 MiB and its two donors do not fit in it
    limits = f"{20 << 20},{3 * layer}"
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments, limits], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 and run.stdout == "MemoryError False\ndone\n", run.stderr[-2000:]
    assert {p.name for p in tmp_path.iterdir()} == {"dense", "small", "plan.json", "igia.safetensors"}


def test_a_full_disk_leaves_nothing(tmp_path):
    source = dense("llama", tmp_path / "dense", max_shard_size="30KB")
    before = content(tmp_path)
    with soft_limit(resource.RLIMIT_FSIZE, 20_000), pytest.raises(gradpruner.CheckpointError, match="could not write"):
        gradpruner.apply_folder(source, tmp_path / "stream", DROP)
    assert content(tmp_path) == before
