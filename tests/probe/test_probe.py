from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from probing import run, step
from tiny_llama import NAMES, batch, llama, lora, trainable
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

import gradpruner
from gradpruner.model.decoder import Decoder
from gradpruner.probe.estimators.lora import LoraReader
from gradpruner.probe.importance import Dense, Factors


def frozen(model):
    for p in model.parameters():
        p.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)  # something has to need a gradient
    return model


def true_gradients(model, seeds):
    """dL/dW of every linear by plain autograd, model left untouched by any optimizer."""
    model = copy.deepcopy(model).requires_grad_(True)
    out = []
    for seed in seeds:
        model.zero_grad()
        ids = batch(seed)
        model(input_ids=ids, labels=ids).loss.backward()
        out.append(
            {
                (j, n): layer.get_submodule(n).weight.grad.clone()
                for j, layer in enumerate(model.model.layers)
                for n in NAMES
            }
        )
    return out


def check_against(igia, gradients, rel=1e-5):
    for n, weight in enumerate(igia.weights):
        key = (weight.layer, weight.name.removesuffix(".weight"))
        want = torch.stack([g[key].double().square().sum() for g in gradients])
        torch.testing.assert_close(igia.square_norms[:, n], want, rtol=rel, atol=0)
        if igia.importance:
            f = igia.importance[weight.layer, weight.name].f
            torch.testing.assert_close(f, sum(g[key].square() for g in gradients), rtol=1e-3, atol=1e-9)


def test_full_fine_tuning_reads_the_gradients():
    model = llama()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients = true_gradients(model, range(4))
    igia = run(model, optimizer=sgd)
    assert igia.estimator == "gradient" and igia.model.count("-") == 0
    check_against(igia, gradients)


def test_full_fine_tuning_from_adams_state():
    model = llama()
    gradients = true_gradients(model, range(4))
    igia = run(model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0))
    assert igia.estimator == "adam"
    for weight in igia.weights:
        f = igia.importance[weight.layer, weight.name].f.double()
        want = sum(g[weight.layer, weight.name.removesuffix(".weight")].double().square() for g in gradients)
        ratio = f / (1e-3 * want)  # (1 - beta2) sum beta2^(t-i) g_i^2: F up to 0.4 % over four steps
        assert float(ratio.min()) > 0.99 and float(ratio.max()) < 1.001


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "not torch's Adam"),
        (lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95)), "forgets within 40 steps"),
        (lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1), "coupled weight decay"),
    ],
)
def test_adams_state_is_refused_where_it_is_not_the_importance(optimizer, reason):
    model = llama()
    probe = gradpruner.Probe(model, estimator="adam")
    with pytest.raises(gradpruner.ProbeError, match=reason):
        probe.start(optimizer(list(model.parameters())), 40)


def test_exact_on_frozen_weights_stores_no_gradient_and_gives_the_model_back():
    model = frozen(llama())
    gradients = true_gradients(model, range(4))
    logits = model(input_ids=batch(9)).logits
    igia = run(model, estimator="exact", optimizer=torch.optim.SGD(trainable(model), lr=0.0))
    check_against(igia, gradients)
    assert all(layer.get_submodule(n).weight.grad is None for layer in model.model.layers for n in NAMES)
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(model(input_ids=batch(9)).logits, logits)


def test_exact_sums_only_keeps_no_importance():
    model = frozen(llama())
    gradients = true_gradients(model, range(4))
    igia = run(model, estimator="exact", importance=False, optimizer=torch.optim.SGD(trainable(model), lr=0.0))
    assert not igia.importance
    check_against(igia, gradients)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_exact_on_trainable_weights_trains_as_autograd_does(micro_batches):
    plain, watched = llama(), llama()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, watched)]
    probe = gradpruner.Probe(watched, estimator="exact", micro_batches=micro_batches)
    norms = []
    with probe.watching(optimizers[1], 3):
        for i in range(3):
            for model in (plain, watched):
                for micro in range(micro_batches):
                    ids = batch(10 * i + micro)
                    model(input_ids=ids, labels=ids).loss.backward()
            norms.append(
                [
                    plain.model.layers[w.layer].get_parameter(w.name).grad.double().square().sum()
                    for w in probe._decoder.weights
                ]
            )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probe.igia.square_norms, torch.tensor(norms), rtol=1e-4, atol=0)


def test_exact_with_the_wrong_number_of_micro_batches_is_refused():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = gradpruner.Probe(model, estimator="exact", micro_batches=2)
    refused = pytest.raises(gradpruner.ProbeError, match="expected micro_batches = 2")
    with probe.watching(optimizer, 2), refused:
        step(model, optimizer, 0)


def test_exact_through_autocast_and_adapters():
    model = lora(llama())
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    with gradpruner.Probe(model, estimator="exact").watching(optimizer, 1) as probe:
        ids = batch(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    gradients = true_gradients(llama(), [0])
    check = probe.igia.layer_scores("squared")
    for j in range(len(check)):
        want = sum(g.double().square().sum() for (layer, _), g in gradients[0].items() if layer == j)
        assert float(check[j]) == pytest.approx(float(want), rel=0.1)  # bfloat16 forward and backward


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", ["lora", "gradient", "exact"])
def test_a_step_with_a_bad_gradient_is_left_out_counted_and_does_not_poison(estimator, bad):
    def watch(with_bad):
        model = lora(llama()) if estimator == "lora" else llama()
        optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
        probe = gradpruner.Probe(model, estimator=estimator)
        with probe.watching(optimizer, 4 + with_bad):
            for i in range(4):
                step(model, optimizer, i)
                if i == 1 and with_bad:
                    keep = {k: v.clone() for k, v in model.state_dict().items()}
                    step(model, optimizer, 50, scale=bad)
                    model.load_state_dict(keep)  # the training would be lost; the probe's sums must not be
        return probe.igia

    good, igia = watch(0), watch(1)
    assert igia.skipped == 1 and igia.steps == 4
    torch.testing.assert_close(igia.square_norms, good.square_norms, rtol=1e-9, atol=0)
    for key, kept in good.importance.items():
        torch.testing.assert_close(igia.importance[key].dense().f, kept.dense().f, rtol=1e-6, atol=0)


def test_record_for_loops_without_hooks_equals_the_hooks():
    with_hooks, without = run(lora(llama())), lora(llama())
    optimizer, probe = torch.optim.AdamW(trainable(without), lr=1e-3), gradpruner.Probe(without)
    for i in range(4):
        ids = batch(i)
        without(input_ids=ids, labels=ids).loss.backward()
        probe.record()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(probe.igia.square_norms, with_hooks.square_norms)


@pytest.mark.parametrize("fused", [True, False])
def test_under_grad_scaler(fused):
    """A fused optimizer is handed scaled gradients, the scale and the verdict; the other unscaled ones."""

    def watch(scale):
        model = lora(llama())
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        with gradpruner.Probe(model).watching(optimizer, 4) as probe:
            for i in (0, 1, 77, 2):
                if i == 77 and scale == 1:
                    continue
                ids = batch(i)
                loss = model(input_ids=ids, labels=ids).loss * (float("inf") if i == 77 else 1)
                scaler.scale(loss).backward()
                if not fused:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return probe.igia

    plain, scaled = watch(1), watch(2.0**10)
    assert scaled.steps == 3 and scaled.skipped == (1 if fused else 0)  # the other's hook is not called at all
    torch.testing.assert_close(scaled.square_norms, plain.square_norms, rtol=1e-3, atol=0)


def test_through_accelerate():
    expected = run(lora(llama()))
    accelerator = Accelerator(cpu=True)
    model = lora(llama())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    with gradpruner.Probe(model).watching(optimizer, 4) as probe:
        for i in range(4):
            ids = batch(i)
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(probe.igia.square_norms, expected.square_norms, rtol=1e-9, atol=0)


def test_probe_callback_in_a_trainer(tmp_path):
    set_seed(0)
    model = lora(llama())
    data = [{"input_ids": row, "labels": row} for i in range(8) for row in batch(i)]
    callback = gradpruner.ProbeCallback(steps=3, save_to=tmp_path / "igia.safetensors")
    arguments = TrainingArguments(
        tmp_path / "out",
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    igia = gradpruner.Igia.load(tmp_path / "igia.safetensors")
    assert igia.steps == 3 and igia.estimator == "lora"
    assert torch.equal(igia.square_norms, callback.igia.square_norms)
    smaller = gradpruner.apply(model, igia.plan(0.4, preset="paper"), igia)
    assert smaller.config.num_hidden_layers == 5


def test_factors_are_kept_while_they_are_smaller_than_the_matrix():
    igia = run(lora(llama()), steps=3)
    for (layer, name), kept in igia.importance.items():
        shape = next(w.shape for w in igia.weights if (w.layer, w.name) == (layer, name))
        pair = 4 * sum(shape)  # r = 4
        usable = 2  # the first step is zero
        assert isinstance(kept, Factors) == (usable * pair < shape[0] * shape[1])


def test_factors_of_tiny_gradients_do_not_underflow():
    model = lora(llama())
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    with gradpruner.Probe(model).watching(optimizer, 3) as probe:
        for i in range(3):
            step(model, optimizer, i, scale=1e-13)  # F would be near 1e-60
    for kept in probe.igia.importance.values():
        f = kept.dense().f
        assert float((f > 0).float().mean()) > 0.9


def test_transposed_weights_of_gpt2():
    import transformers as hf

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    base = hf.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    optimizer, seen = torch.optim.SGD(trainable(model), lr=1.0), []
    with gradpruner.Probe(model).watching(optimizer, 3) as probe:
        for i in range(3):
            ids = batch(i)
            model(input_ids=ids, labels=ids).loss.backward()
            module = base.transformer.h[1].attn.c_attn
            seen.append(module.lora_B["default"].weight.grad @ module.lora_A["default"].weight.grad)
            optimizer.step()
            optimizer.zero_grad()
    f = probe.igia.importance[1, "attn.c_attn.weight"].dense().f
    want = sum(g.square() for g in seen).T
    assert f.shape == (16, 48) == base.transformer.h[1].attn.c_attn.weight.shape
    torch.testing.assert_close(f / f.max(), want / want.max(), rtol=1e-4, atol=1e-7)


def test_margin_and_stability():
    igia = run(lora(llama()), steps=6)
    plan = igia.plan(0.4)
    scores = igia.layer_scores()
    kept = min(float(scores[j]) for j in plan.kept if j)
    assert igia.margin(plan) == pytest.approx(1 - max(float(scores[j]) for j in plan.removed) / kept)
    stability = igia.stability(plan)
    assert len(stability) == 6 and stability[0] == 0.0 and stability[-1] == 1.0


def test_save_and_load(tmp_path):
    igia = run(lora(llama()))
    igia.save(tmp_path / "igia.safetensors")
    again = gradpruner.Igia.load(tmp_path / "igia.safetensors")
    assert again.weights == igia.weights and again.model == igia.model and again.structures == igia.structures
    assert torch.equal(again.square_norms, igia.square_norms)
    for key, kept in igia.importance.items():
        other = again.importance[key]
        pairs = [(kept.f, other.f)] if isinstance(kept, Dense) else [(kept.a, other.a), (kept.b, other.b)]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert [p.name for p in tmp_path.iterdir()] == ["igia.safetensors"]


@pytest.mark.parametrize("where", [0.001, 0.5, 0.9])
def test_a_flipped_byte_is_noticed(tmp_path, where):
    path = tmp_path / "igia.safetensors"
    run(lora(llama())).save(path)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(gradpruner.CheckpointError):
        gradpruner.Igia.load(path)


def test_on_a_device_nothing_stays_between_steps_and_nothing_waits():
    """Fake CUDA tensors stand for a card: what the reader makes there is gone, and each copy is asynchronous."""
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    made: list[weakref.ref] = []
    calls: list[tuple[str, bool]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            found = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.device.type == "cuda"]
            made.extend(weakref.ref(t) for t in found)
            to_host = name == "copy_" and args[0].device.type == "cpu" and args[1].device.type == "cuda"
            blocking = name in ("_local_scalar_dense", "_to_copy", "nonzero") or (to_host and args[2:3] != (True,))
            calls.append((name, blocking))
            return result

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    fake = torch.nn.Parameter(torch.empty(parameter.shape, device="cuda"))
                    fake.grad = torch.empty(parameter.shape, device="cuda")
                    setattr(module, name, fake)
        reader = LoraReader(Decoder(model), importance=True, factor_dtype=torch.float32)
        with Watch():
            norms = reader.read(None)
        gc.collect()
    assert norms.device.type == "cpu" and any(name == "gram_norm" for name, _ in calls)
    assert sum(name == "copy_" for name, _ in calls) == 2  # the norms, and all pairs at once
    assert sum(name == "_foreach_copy_" for name, _ in calls) == 1
    assert not [name for name, blocking in calls if blocking]
    assert made and not [t for ref in made if (t := ref()) is not None]
