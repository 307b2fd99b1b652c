"""What is on its way to host memory: one block, one copy per device, waited for by the devices it comes from."""

from __future__ import annotations

import pytest
import torch
from probing import step
from tiny_llama import llama, lora, trainable
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradpruner
from gradpruner.model.decoder import Decoder
from gradpruner.probe import host_copies as arrival
from gradpruner.probe.estimators.exact import ExactReader
from gradpruner.probe.estimators.gradient import GradientReader
from gradpruner.probe.estimators.lora import LoraReader, _ldexp
from gradpruner.probe.host_copies import Arrival, joined, one_ahead, to_host
from gradpruner.training.probe_batches import ProbeBatches


class Calls(TorchDispatchMode):
    """Name, device of the result, whether it is pinned memory, whether the call returns before it is done."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        device = result.device.type if isinstance(result, torch.Tensor) else None
        to_host = name == "copy_" and args[0].device.type == "cpu" and args[1].device.type == "cuda"
        leaves = name == "_to_copy" and (args[0].device.type, device) == ("cuda", "cpu")
        waits = leaves or name in ("_local_scalar_dense", "nonzero") or (to_host and args[2:3] != (True,))
        self.seen.append((name, device, bool((kwargs or {}).get("pin_memory")), to_host, waits))
        return result

    def count(self, **wanted):
        names = ("name", "device", "pinned", "to_host", "waits")
        return sum(all(dict(zip(names, call, strict=True))[k] == v for k, v in wanted.items()) for call in self.seen)


def some(*shapes, dtype=torch.float32):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_views_of_one_block_and_equal_their_tensors(dtype):
    given = [*some((4, 7), (3, 2)), some((6, 5))[0].T, *some((8,), (0, 4), (), dtype=torch.bfloat16)]
    found = to_host(given, dtype)
    assert len({view.untyped_storage().data_ptr() for view in found}) == 1
    for view, tensor in zip(found, given, strict=True):
        assert view.dtype == dtype and torch.equal(view, tensor.to(dtype)) and view.is_contiguous()
    kept = found[0].clone()
    given[0].zero_()
    assert torch.equal(found[0], kept)
    assert torch.equal(to_host([given[1]], torch.float32)[0], given[1])
    assert to_host([], dtype) == []


def test_one_allocation_and_one_copy_per_device_whatever_the_number():
    with FakeTensorMode():
        given = [torch.empty(3, 4, device=f"cuda:{n // 5}", dtype=torch.bfloat16) for n in range(10)]
        with Calls() as calls:
            found = to_host([*given, torch.empty(2)], torch.float32)
    assert [view.shape for view in found] == [(3, 4)] * 10 + [(2,)] and {v.device.type for v in found} == {"cpu"}
    assert calls.count(pinned=True) == 1 and calls.count(to_host=True) == 2 and calls.count(waits=True) == 0


def test_a_tensor_alone_goes_without_a_second_copy_on_its_device():
    with FakeTensorMode():
        given = torch.empty(3, 4, device="cuda")
        with Calls() as calls:
            to_host([given], torch.float32)
            assert calls.count(name="empty") == calls.count(pinned=True) == 1
            to_host([given], torch.bfloat16)
            assert calls.count(name="empty") == 3 and calls.count(pinned=True) == 2


def test_vectors_are_joined():
    parts = [torch.arange(3.0).double(), torch.zeros(0).double(), torch.ones(2).double()]
    assert joined(parts).tolist() == [0, 1, 2, 1, 1]


@pytest.fixture
def marks(monkeypatch):
    """What was marked and waited for, in order, in the place of a device's events."""
    log = []

    class Mark:
        def __init__(self, device):
            self.number = sum(kind == "mark" for kind, *_ in log)
            log.append(("mark", str(device), self.number))

        def synchronize(self):
            log.append(("wait", self.number))

    monkeypatch.setattr(arrival, "mark", Mark)
    return log


def test_only_devices_that_work_on_their_own_are_waited_for_and_each_once(marks):
    names = ("cuda:0", "cpu", "cuda:1", "meta", "cuda:0")
    Arrival([torch.device(name) for name in names]).wait()
    assert marks == [("mark", "cuda:0", 0), ("mark", "cuda:1", 1), ("wait", 0), ("wait", 1)]


def test_the_next_is_on_its_way_while_one_is_used(marks):
    with FakeTensorMode():
        given = [(n, torch.empty(n + 1, device="cuda:0")) for n in range(3)]
        for n, host in one_ahead(iter(given)):
            assert host.device.type == "cpu" and host.shape == (n + 1,)
            marks.append(("used", n))
    kinds = [(kind, last) for kind, *_, last in marks]
    assert kinds == [
        ("mark", 0),
        ("mark", 1),
        ("wait", 0),
        ("used", 0),
        ("mark", 2),
        ("wait", 1),
        ("used", 1),
        ("wait", 2),
        ("used", 2),
    ]
    here = torch.ones(2)
    assert [host is here for _, host in one_ahead([(0, here)])] == [True]


# ---- the readers


def on_a_card(model):
    """What trains, and its gradients, as fake CUDA tensors; all else stays: weights that accelerate has offloaded."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                fake = torch.nn.Parameter(torch.empty(parameter.shape, device="cuda:0"))
                fake.grad = torch.empty(parameter.shape, device="cuda:0")
                setattr(module, name, fake)
    return model


@pytest.mark.parametrize("estimator", ["lora", "gradient"])
def test_the_devices_of_the_gradients_are_waited_for_wherever_the_weights_are(estimator, marks):
    model = lora(llama()) if estimator == "lora" else llama()
    probe = gradpruner.Probe(model, estimator=estimator, importance=estimator == "lora")
    with FakeTensorMode():
        on_a_card(model)
        with Calls() as calls:
            probe.record()
    assert marks == [("mark", "cuda:0", 0)]
    assert calls.count(waits=True) == 0 and calls.count(to_host=True) == (2 if estimator == "lora" else 1)


def test_exact_sums_come_in_one_copy():
    model = llama()
    with FakeTensorMode():
        reader = ExactReader(Decoder(on_a_card(model)), importance=False, micro_batches=1)
        with Calls() as calls:
            norms = reader.read(None)
    assert norms.shape == (len(reader.weights),) and reader.devices == {torch.device("cuda:0")}
    assert calls.count(to_host=True) == 1 and calls.count(name="zero_") == 1 and calls.count(waits=True) == 0


def test_full_gradients_are_moved_one_by_one_through_pinned_memory(marks):
    model = llama()
    with FakeTensorMode():
        reader = GradientReader(Decoder(on_a_card(model)), importance=True)
        pairs = list(reader._gradients([reader._decoder.parameter(w) for w in reader.weights], [0, 1, 2]))
        with Calls() as calls:
            assert [weight for weight, _ in one_ahead(pairs)] == list(reader.weights[:3])
    assert calls.count(pinned=True) == calls.count(to_host=True) == 3 and calls.count(waits=True) == 0
    assert calls.count(device="cuda", name="empty") == 0


def test_a_step_is_taken_in_when_later_ones_are_on_their_way(monkeypatch, marks):
    """As on a card: told by what is marked, waited for, read and settled, and never of a step just read."""
    read, settle = LoraReader.read, LoraReader.settle

    def reading(self, scale):
        norms = read(self, scale)
        self.devices = {torch.device("cuda:0")}
        return norms

    def settling(self, usable):
        marks.append(("settle", len(usable)))
        settle(self, usable)
        assert len(self._pending) <= 2  # at most three blocks at once: pinned memory does not grow

    monkeypatch.setattr(LoraReader, "read", reading)
    monkeypatch.setattr(LoraReader, "settle", settling)
    model = lora(llama())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    with gradpruner.Probe(model).watching(optimizer, 5):
        for i in range(5):
            step(model, optimizer, i)
    assert [(kind, last) for kind, *_, last in marks] == [
        ("mark", 0),
        ("mark", 1),
        ("mark", 2),
        ("wait", 0),
        ("settle", 1),
        ("mark", 3),
        ("wait", 1),
        ("settle", 1),
        ("mark", 4),
        ("wait", 2),
        ("settle", 1),
        ("wait", 3),
        ("wait", 4),
        ("settle", 2),
    ]


def test_nothing_that_is_kept_lies_in_the_block_it_arrived_in(monkeypatch):
    blocks = []

    def keeping(tensors, dtype):
        blocks.append(to_host(tensors, dtype))
        return blocks[-1]

    monkeypatch.setattr("gradpruner.probe.estimators.lora.to_host", keeping)
    model = lora(llama())
    probe = gradpruner.Probe(model, factor_dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: probe.record())
    for i in range(5):
        step(model, optimizer, i)
    kept = [factor for each in probe._reader._kept for pair in each.factors for factor in pair]
    parts = [part for each in probe.igia.importance.values() for part in each.parts.values()]
    arrived = {view.untyped_storage().data_ptr() for views in blocks for view in views}
    assert len(blocks) == len(arrived) == 5 and kept
    assert not arrived & {tensor.untyped_storage().data_ptr() for tensor in [*kept, *parts]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-149, -127, -126, -43, -1, 0, 1, 43, 127, 128, 140, 149])
def test_scaling_rounds_as_if_done_in_float64(dtype, exponent):
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    tensor = bits.view(torch.float32).nan_to_num().to(dtype)
    want = (tensor.double() * 2.0**exponent).to(dtype)
    found = _ldexp(tensor, exponent)
    assert found.dtype == dtype and torch.equal(found, want) and found.data_ptr() != tensor.data_ptr()


def test_inputs_are_kept_without_waiting_until_they_are_asked_for(marks):
    model = torch.nn.Module()
    model.forward = lambda **inputs: None
    inputs = ProbeBatches()
    inputs.watch(model)
    with FakeTensorMode():
        for _ in range(2):
            ids = torch.empty(2, 5, dtype=torch.long, device="cuda:0")
            with Calls() as calls:
                model(input_ids=ids, labels=ids)
            assert calls.count(to_host=True) == calls.count(pinned=True) == 1 and calls.count(waits=True) == 0
    assert [kind for kind, *_ in marks] == ["mark", "mark"]
    assert [batch["input_ids"].device.type for batch in inputs.batches] == ["cpu", "cpu"]
    assert [kind for kind, *_ in marks] == ["mark", "mark", "wait", "wait"]
    assert len(inputs.batches) == 2 and len(marks) == 4
