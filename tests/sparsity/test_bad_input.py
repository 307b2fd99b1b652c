"""What is refused, with the argument's name, and that the model is then as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from gradpruner.errors import GradPrunerError, InvalidArgument, ModelMismatch, UnsupportedModel
from gradpruner.run.oneshot import _probe
from gradpruner.sparsity import sparsify
from gradpruner.sparsity.criteria import parse_criterion
from gradpruner.sparsity.gradients import gradient_norms
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.statistics import LinearStatistics
from gradpruner.training.finetune import add_adapters
from gradpruner.training.recipe import Recipe

PADDED = torch.tensor([[1, 2, 0]])


def model_of(**others):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 61,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                **others,
            }
        )
    )


def batches_of(count=3):
    return [{"input_ids": torch.arange(1, 13).view(1, 12) + i} for i in range(count)]


def refuses(model, error, says, batches=None, **options):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=says):
        sparsify(model, batches_of() if batches is None else batches, **options)
    for name, p in model.state_dict().items():
        assert torch.equal(p.view(torch.int32), before[name].view(torch.int32)), name  # a NaN too
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trains


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "wonda"}, "method = 'wonda'; accepted are"),
        ({"method": "gblm:beta=1"}, "'beta=1' is no option=value; its options are"),
        ({"method": "gblm:p=3"}, "p = 3; accepted are 1 and 2"),
        ({"method": "gblm:alpha=0"}, "alpha = 0"),
        ({"method": "gblm:activations=1"}, "activations = 1"),
        ({"method": "sparsegpt:block=0"}, "block = 0"),
        ({"method": "sparsegpt:damping=0"}, "damping = 0"),
        ({"method": "dsnot:start=gblm"}, "start = 'gblm'"),
        ({"method": "dsnot:cycles=-1"}, "cycles = -1"),
        ({"method": "dsnot:threshold=-1"}, "threshold = -1"),
        ({"pattern": "2:4", "ratio": "half"}, "ratio = 'half'"),
        ({"pattern": "2:4", "ratio": float("nan")}, "ratio = nan"),
        ({"pattern": "2:4", "ratio": True}, "ratio = True"),
        ({"method": "dsnot:overshoot=1"}, "overshoot = 1"),
        ({"method": "dsnot", "pattern": "matrix"}, "pattern = 'matrix'; dsnot"),
        ({"ratio": 1.0}, "ratio = 1.0"),
        ({"ratio": "half"}, "ratio = 'half'"),
        ({"pattern": "5:10"}, "multiple of 10"),
        ({"pattern": "2:4", "ratio": 0.4}, "ratio = 0.4"),
        ({"allocation": "best"}, "allocation = 'best'; accepted are"),
        ({"allocation": "alphapruning", "ratio": 0.9}, "alphapruning would take 1"),
        ({"allocation": "alphapruning", "pattern": "2:4"}, "pattern = '2:4'"),
        ({"method": "igia"}, "igia is None"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [], "method": "gblm:activations=false"}, "batches is empty"),
        ({"batches": [{"input_ids": PADDED, "attention_mask": (PADDED > 0).long()}]}, "padding"),
    ],
    ids=str,
)
def test_arguments(options, says):
    refuses(model_of(), InvalidArgument, says, **options)


def test_magnitude_needs_no_batches():
    assert sparsify(model_of(), [], method="magnitude").sparsity() == 0.5


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot", "gblm"])
def test_activations_that_are_not_finite(method):
    """They come in the second layer: the first is pruned by then, and restored."""
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    refuses(model, InvalidArgument, r"layers\.1\.self_attn.*NaN or Inf|the loss of a sample is nan", method=method)


def test_activations_that_are_all_zero():
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    refuses(model, InvalidArgument, r"layers\.1\.mlp\.\w+\.weight are all zero")
    refuses(model, InvalidArgument, r"the gradient of model\.layers\.1\.mlp\.\w+\.weight is zero", method="gblm")


def test_one_input_that_is_always_zero_goes_first():
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = 0
    for method in ("wanda", "sparsegpt", "dsnot"):
        pruned = model_of()
        pruned.load_state_dict(model.state_dict())
        sparsify(pruned, batches_of(), method=method)
        assert not pruned.model.layers[1].mlp.up_proj.weight[:, 5].any()
        assert all(p.isfinite().all() for p in pruned.parameters())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gblm"])
def test_a_layer_whose_forward_is_not_its_own(method):
    model = model_of()
    ids, expected = batches_of()[0]["input_ids"], model_of()
    expected.load_state_dict(model.state_dict())
    model.model.layers[2].forward = model.model.layers[2].forward
    refuses(model, UnsupportedModel, "replaced the forward", method=method)
    assert ["forward" in vars(layer) for layer in model.model.layers] == [False, False, True]
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_a_layer_that_stands_twice():
    model = model_of()
    model.model.layers[2] = model.model.layers[1]
    refuses(model, GradPrunerError, "layer")
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there(device):
    for method in ("wanda", "magnitude", "gblm"):
        refuses(model_of(), InvalidArgument, f"device = '{device}'", method=method, device=device)


def test_a_weight_that_overflows():
    """What SparseGPT adds to the weights that stay may be more than half precision holds."""
    weight = torch.tensor([[4e4, 6e4, 1.0, 1.0]], dtype=torch.float16)  # the first goes, the second makes up for it
    x = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0], [0.0, 0.0, 9e6, 0.0], [0.0, 0.0, 0.0, 9e6]])
    with pytest.raises(InvalidArgument, match="float16 does not hold"):
        parse_criterion("sparsegpt:damping=1e-15").prune_(
            weight, LinearStatistics(hessian=x.T @ x), Pattern("row", 0.25)
        )


def test_gradients_are_asked_for_rightly():
    model = model_of()
    for wrong in (3, True, "2"):
        with pytest.raises(InvalidArgument, match=r"p = .*accepted are 1 and 2"):
            gradient_norms(model, batches_of(), wrong)
    with pytest.raises(InvalidArgument, match="batches is empty; gradient_norms"):
        gradient_norms(model, [])
    padded = [{**batches_of()[0], "attention_mask": torch.tensor([[0] + [1] * 11])}]
    with pytest.raises(InvalidArgument, match="padding"):
        gradient_norms(model, padded)
    given = gradient_norms(model, batches_of())
    given["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    refuses(model, InvalidArgument, "up_proj.weight hold a NaN", method="gblm", gradients=given)


def test_gradients_of_something_else():
    model = model_of()
    given = gradient_norms(model, batches_of())
    refuses(model, InvalidArgument, "gradients given; wanda", method="wanda", gradients=given)
    name = "model.layers.1.mlp.up_proj.weight"
    for wrong, said in (
        (None, "nothing"),
        (given[name].double(), "torch.float64"),
        (given[name].t(), r"torch.float32 of shape \(16, 24\)"),
    ):
        less = {**given, name: wrong} if wrong is not None else {k: v for k, v in given.items() if k != name}
        refuses(model, InvalidArgument, f"gradients holds {said}.* for {name}", method="gblm", gradients=less)


def test_models():
    adapted = add_adapters(model_of(), Recipe(rank=2))
    refuses(adapted, InvalidArgument, "model has adapters")
    refuses(adapted.base_model.model, InvalidArgument, "model has adapters")  # as transformers' add_adapter leaves it
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )
    refuses(experts, UnsupportedModel, "2 experts in one tensor")
    with pytest.raises(GradPrunerError):
        sparsify(torch.nn.Linear(4, 4), batches_of())


def test_an_igia_of_this_model_and_of_another():
    model, other = model_of(), model_of(num_hidden_layers=2)
    watched = add_adapters(model, Recipe(rank=2))
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches_of()]
    igia, _ = _probe(watched.train(), batches, Recipe(learning_rate=1e-2, rank=2), 3)
    plain = watched.unload()
    refuses(other, ModelMismatch, "igia", method="igia", igia=igia)
    dense = {name: p.clone() for name, p in plain.state_dict().items()}
    masks = sparsify(plain, [], method="igia", igia=igia)
    assert len(masks.bits) == len(igia.importance) == 21
    for (layer, weight), importance in igia.importance.items():
        name = f"model.layers.{layer}.{weight}"
        by = importance.dense().f * dense[name].abs()
        stays = by.argsort(descending=True, stable=True)[:, : by.shape[1] // 2].sort().values
        assert torch.equal((plain.state_dict()[name] != 0).nonzero()[:, 1].view(len(by), -1), stays), name
    assert masks.sparsity() == 0.5


def test_a_criterion_says_what_it_is():
    for text in ("wanda", "gblm:p=1,alpha=10.0", "sparsegpt:block=64", "dsnot:start=magnitude"):
        assert str(parse_criterion(text)) == text
