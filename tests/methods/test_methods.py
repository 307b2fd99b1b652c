"""Every method against a plain computation of its own: no hooks, deep copies, explicit loops."""

from __future__ import annotations

import copy
import itertools
import math

import model_families as families
import peft
import pytest
import torch
import transformers
from module_states import assert_same, everything
from torch.nn.functional import cosine_similarity, cross_entropy
from uneven_models import batch, build

from gradpruner import InvalidArgument, ModelMismatch, Plan, Probe, UnsupportedModel, apply
from gradpruner.methods import METHODS, Clues, Laco, format_method, parse_method
from gradpruner.methods.block import distances
from gradpruner.methods.held_out_loss import held_out_loss
from gradpruner.methods.laco import similarity_to_dense
from gradpruner.model.decoder import Decoder
from gradpruner.pruning.patch import fit_patches

PLAIN = ["drop-last", "shortgpt", "block", "random", "magnitude", "taylor", "loss"]
EVERY = [*PLAIN, "laco:combine=2,interval=1"]
LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


BATCHES = [batch([9, 4, 6], 1), batch([5, 11], 2), batch([3, 8], 3, left=True)]
HELD_OUT = [batch([12, 6], 4), batch([3, 7, 5], 5)]


def clues(model, seed=0):
    return Clues(model, BATCHES, HELD_OUT, seed)


def lowest(scores, count):
    return tuple(sorted(sorted(range(len(scores)), key=lambda j: (scores[j], -j))[:count]))


def states(model, inputs):
    """What enters each layer, what leaves the last one, and what leaves the norm; by running layers one by one."""
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        out = model(**given, use_cache=False, output_hidden_states=True)
        # transformers gives the last layer's only after the norm: take the norm away for the rest
        body, norm = model.model, model.model.norm
        body.norm = torch.nn.Identity()
        kept = model(**given, use_cache=False, output_hidden_states=True).hidden_states
        body.norm = norm
    return kept, out.hidden_states[-1]


def without(model, removed):
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList([m for j, m in enumerate(smaller.model.layers) if j not in removed])
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    return smaller


def test_block_influence():
    model = build()
    totals, tokens = [0.0] * families.LAYERS, 0
    for inputs in BATCHES:
        hidden, _ = states(model, inputs)
        for row in range(len(inputs["input_ids"])):
            for place in range(inputs["input_ids"].shape[1]):
                if inputs["attention_mask"][row, place]:
                    tokens += 1
                    for j in range(families.LAYERS):
                        x, y = hidden[j][row, place].double(), hidden[j + 1][row, place].double()
                        totals[j] += float(x @ y / x.norm() / y.norm())
    expected = [1 - total / tokens for total in totals]
    assert METHODS["shortgpt"]().scores(clues(model)) == pytest.approx(expected, rel=1e-4)
    assert METHODS["shortgpt"]().plan(clues(model), 3).drop == lowest(expected, 3)
    assert lowest(expected, 3) != (3, 4, 5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_block_of_least_angle(count):
    model, starts = build(), range(families.LAYERS - count + 1)
    angles = {start: [] for start in starts}
    for inputs in BATCHES:
        hidden, _ = states(model, inputs)
        for row, mask in enumerate(inputs["attention_mask"].tolist()):
            last = max(place for place, real in enumerate(mask) if real)
            for start in starts:
                x, y = hidden[start][row, last].double(), hidden[start + count][row, last].double()
                angles[start].append(math.acos(float(x @ y / x.norm() / y.norm())) / math.pi)
    expected = [sum(a) / len(a) for a in angles.values()]
    assert distances(Decoder(model), clues(model), count) == pytest.approx(expected, rel=1e-5)
    first = expected.index(min(expected))
    assert METHODS["block"]().plan(clues(model), count).drop == tuple(range(first, first + count))


def test_of_equal_blocks_the_later_one_goes():
    model = build()
    for parameter in model.model.layers.parameters():  # layers that add nothing at all
        parameter.data.zero_()
    assert METHODS["block"]().plan(clues(model), 2).drop == (4, 5)
    assert METHODS["loss"]().plan(clues(model), 2).drop == (4, 5)


def test_held_out_loss_step_by_step():
    model, removed = build(), []

    def loss(smaller):
        total, tokens = 0.0, 0
        for inputs in HELD_OUT:
            with torch.no_grad():
                logits = smaller(**{**inputs, "labels": None}, use_cache=False).logits
            for row, labels in enumerate(inputs["labels"].tolist()):
                for place, label in enumerate(labels):
                    if label != -100:
                        total += float(cross_entropy(logits[row, place - 1].double(), torch.tensor(label)))
                        tokens += 1
        return total / tokens

    for count in range(1, 5):
        tried = {j: loss(without(model, {*removed, j})) for j in range(families.LAYERS) if j not in removed}
        removed.append(min(tried, key=tried.get))
        assert METHODS["loss"]().plan(clues(model), count).drop == tuple(sorted(removed))
    alone = [loss(without(model, {j})) for j in range(families.LAYERS)]
    assert tuple(sorted(removed[:3])) != lowest(alone, 3)  # what is removed already counts
    assert held_out_loss(Decoder(model), clues(model)) == pytest.approx(loss(model), rel=1e-6)


def test_magnitude():
    model = build()
    expected = []
    for layer in model.model.layers:
        entries = torch.cat([layer.get_submodule(name).weight.detach().flatten() for name in LINEARS])
        expected.append(math.sqrt(sum(x * x for x in entries.tolist())))
    assert METHODS["magnitude"]().scores(clues(model)) == pytest.approx(expected, rel=1e-9)
    assert METHODS["magnitude"]().plan(clues(model), 2).drop == lowest(expected, 2)


def test_taylor():
    model = build()
    weights = [[layer.get_submodule(name).weight for name in LINEARS] for layer in model.model.layers]
    loss = sum(model(**inputs).loss for inputs in BATCHES) / len(BATCHES)
    gradients = iter(torch.autograd.grad(loss, [w for layer in weights for w in layer]))
    expected = [
        sum(float((w.detach().double() * next(gradients).double()).abs().sum()) for w in layer) for layer in weights
    ]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of a step before; does not count
    with torch.no_grad():
        assert METHODS["taylor"]().scores(clues(model)) == pytest.approx(expected, rel=1e-4)
    assert METHODS["taylor"]().plan(clues(model), 3).drop == lowest(expected, 3)


def test_random_is_seeded_and_nested():
    model, method = build(), METHODS["random"]()
    drawn = {seed: [set(method.plan(clues(model, seed), n).drop) for n in range(1, 6)] for seed in range(8)}
    assert drawn[3] == [set(method.plan(clues(model, 3), n).drop) for n in range(1, 6)]
    assert all(small < large for sets in drawn.values() for small, large in itertools.pairwise(sets))
    assert len({frozenset(sets[2]) for sets in drawn.values()}) > 3


def folded(model, merge):
    """LaCo's merge by state dicts, in a copy; the donors are still there."""
    copied, dense = copy.deepcopy(model), model.model.layers
    for target in set(merge.values()):
        donors = [j for j in merge if merge[j] == target]
        total = {name: value.float() for name, value in dense[target].state_dict().items()}
        for j in sorted(donors):
            for name, value in dense[target].state_dict().items():
                total[name] = total[name] + (dense[j].state_dict()[name].float() - value.float())
        copied.model.layers[target].load_state_dict(total)
    return copied


def similarity(model, merge):
    smaller, cosines = without(folded(model, merge), merge), []
    for inputs in BATCHES:
        (_, a), (_, b) = states(model, inputs), states(smaller, inputs)
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            cosines.append(float(cosine_similarity(a[row][mask].flatten(), b[row][mask].flatten(), dim=0)))
    return sum(cosines) / len(cosines)


def walked(model, count, method, threshold, known):
    groups, at, seen = {}, families.LAYERS - method.combine, []
    while at >= method.low:
        gone = {d for donors in groups.values() for d in donors}
        room = min(method.combine - 1, count - len(gone))
        above = [j for j in range(at + 1, families.LAYERS) if j not in gone]
        tried, mine = dict(groups), []
        for j in above[:room]:
            mine += [j, *tried.pop(j, [])]
        tried[at] = mine
        merge = {d: target for target, donors in tried.items() for d in donors}
        key = tuple(sorted(merge.items()))
        known[key] = known[key] if key in known else similarity(model, merge)
        seen.append(known[key])
        if seen[-1] > threshold:
            groups = tried
            if len(merge) == count:
                return merge, seen
            at -= method.interval
        else:
            at -= 1
    return None, seen


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("laco", 2),
        ("laco:combine=2,interval=1", 2),
        ("laco:combine=3,low=0,interval=2", 4),
        ("laco:combine=3,low=0,interval=3", 4),
        ("laco:combine=2,interval=1", 4),
    ],
)
def test_laco(text, count):
    model, method, known = build(), parse_method(text), {}
    for k in range(19, -21, -1):
        expected, seen = walked(model, count, method, k / 20, known)
        assert all(abs(s - k / 20) > 1e-5 for s in seen)  # rounding decides nothing
        if expected:
            break
    assert k < 19
    plan = method.plan(clues(model), count)
    assert plan.merge == expected and plan.drop == () and len(plan.removed) == count
    shared = folded(model, expected)
    smaller = method.cut(clues(model), plan)
    for new, old in enumerate(plan.kept):
        for name, value in shared.model.layers[old].state_dict().items():
            assert torch.equal(smaller.model.layers[new].state_dict()[name], value), (old, name)
    assert smaller.config.num_hidden_layers == families.LAYERS - count


@pytest.mark.parametrize("merge", [{5: 4}, {3: 2, 4: 2}, {1: 0, 2: 0, 5: 3}])
def test_similarity_of_a_merged_model(merge):
    model = build()
    found = similarity_to_dense(Decoder(model), BATCHES)
    assert found({}) == pytest.approx(1) and found(merge) == pytest.approx(similarity(model, merge), abs=1e-6)


@pytest.mark.parametrize("threshold", [0.05, 0.19])
def test_laco_at_a_given_threshold(threshold):
    model, method = build(), Laco(threshold, combine=2, interval=1)
    expected, seen = walked(model, 2, method, threshold, {})
    assert expected and min(abs(s - threshold) for s in seen) < 0.05
    assert method.plan(clues(model), 2).merge == expected


def test_laco_takes_in_what_was_merged_before():
    model = build()
    for count, expected, options in (
        (3, {3: 2, 4: 2, 5: 2}, {}),
        (4, {2: 1, 3: 1, 4: 1, 5: 1}, {"combine": 3, "interval": 2}),
        (4, {1: 0, 2: 0, 4: 3, 5: 3}, {"combine": 3, "interval": 3, "low": 0}),
        (2, {3: 2, 5: 4}, {"combine": 2, "interval": 2}),
    ):
        assert Laco(threshold=-1, **options).plan(clues(model), count).merge == expected


def test_laco_adds_in_float32_and_stores_once():
    model = build().to(torch.bfloat16)
    plan = Plan(families.LAYERS, merge={3: 2, 4: 2, 5: 2})
    expected = folded(model, plan.merge).model.layers[2].state_dict()
    smaller = Laco().cut(clues(model), plan)
    for name, value in smaller.model.layers[2].state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, expected[name]), name


def test_laco_says_what_it_cannot_do():
    model = build()
    with pytest.raises(InvalidArgument, match=r"laco merges 0 at most \(threshold 1, combine 4, interval 4, low 1\)"):
        Laco(threshold=1).plan(clues(model), 2)
    with pytest.raises(InvalidArgument, match="4 of 6 layers to remove; laco merges 3 at most"):
        Laco().plan(clues(model), 4)


def test_laco_refuses_layers_of_unequal_structure():
    model = build("qwen3-moe-sparse-step")
    before = everything(model)
    with pytest.raises(InvalidArgument, match="layer 5 differs in structure from layer 4"):
        Laco(combine=2).plan(clues(model), 1)
    with pytest.raises(InvalidArgument, match="layer 2 differs in structure from layer 1"):
        Laco().cut(clues(model), Plan(families.LAYERS, merge={5: 3, 2: 1}))
    assert_same(everything(model), before)


def test_laco_puts_back_what_a_refused_cut_merged():
    model = families.build(families.REFUSED["gpt2-inverse-index"]())
    before = everything(model)
    with pytest.raises(UnsupportedModel, match="scal"):
        Laco().cut(clues(model), Plan(families.LAYERS, merge={3: 2}))
    assert_same(everything(model), before)


def test_laco_puts_back_what_a_failed_search_merged():
    model, calls = build(), []
    before = everything(model)

    def fail(*_):
        calls.append(1)
        if len(calls) > len(BATCHES) + 1:
            raise RuntimeError("no memory")

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        Laco().plan(clues(model), 2)
    handle.remove()
    assert_same(everything(model), before)


def test_laco_cuts_only_the_model_that_was_planned_for():
    model, other = build(), build(seed=1)
    for parameter in [*model.parameters(), *other.parameters()]:
        parameter.requires_grad_(False)  # now the plan knows the weights, which a merge changes
    plan = Laco().plan(clues(model), 2)
    with pytest.raises(ModelMismatch, match="other weights"):
        Laco().cut(clues(other), plan)
    assert len(Laco().cut(clues(model), plan).model.layers) == 4


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_plan_leaves_the_model_as_it_was_and_cut_removes_what_it_says(name, text):
    method = parse_method(text)
    for count in (1, 3, 4):
        model = build(name)
        layers = Decoder(model).layers
        model.train()
        layers[1].eval()
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 3 > 0)
            parameter.grad = torch.ones_like(parameter) if index % 2 else None
        before, original = everything(model), list(layers)
        plan = method.plan(clues(model), count)
        assert_same(everything(model), before)
        assert len(plan.removed) == count and plan == method.plan(clues(model), count)
        gone = sum(p.numel() for j in plan.removed for p in original[j].parameters())
        assert plan.parameter_ratio == gone / sum(p.numel() for p in model.parameters())
        assert Plan.from_dict(plan.to_dict()) == plan
        ids = families.tokens()
        model.eval()
        expected = families.skipped_logits(model, plan.removed, ids)
        smaller = method.cut(clues(model), plan)
        assert smaller is model and list(Decoder(model).layers) == [original[j] for j in plan.kept]
        with torch.no_grad():
            same = torch.allclose(smaller(input_ids=ids).logits, expected, atol=1e-5)
        assert same == (not plan.merge)


@pytest.mark.parametrize("text", EVERY)
def test_count_out_of_range(text):
    model, seen = build(), []
    model.model.register_forward_hook(lambda *_: seen.append(1))
    for count in (0, -1, families.LAYERS, 99, 2.0):
        with pytest.raises(InvalidArgument, match=r"count|layers to remove"):
            parse_method(text).plan(clues(model), count)
    assert not seen  # nothing is computed first


@pytest.mark.parametrize("text", ["shortgpt", "block", "taylor", "laco", "loss"])
def test_batches_are_wanted(text):
    with pytest.raises(InvalidArgument, match="held_out is empty" if text == "loss" else "batches is empty"):
        parse_method(text).plan(Clues(build(), [], [], 0), 1)


@pytest.mark.parametrize("text", ["taylor", "loss"])
def test_labels_are_wanted(text):
    bare = [{k: v for k, v in inputs.items() if k != "labels"} for inputs in BATCHES]
    model = build()
    before = everything(model)
    with pytest.raises(InvalidArgument, match="labels"):
        parse_method(text).plan(Clues(model, bare, bare, 0), 1)
    assert_same(everything(model), before)


def test_an_answer_is_wanted_to_hold_out():
    unlabelled = {**HELD_OUT[0], "labels": torch.full_like(HELD_OUT[0]["labels"], -100)}
    with pytest.raises(InvalidArgument, match="no token has a label"):
        METHODS["loss"]().plan(Clues(build(), [], [unlabelled], 0), 1)
    decoder = Decoder(build())
    with_and_without = [Clues(decoder.base, [], held_out, 0) for held_out in (HELD_OUT, [*HELD_OUT, unlabelled])]
    assert len({held_out_loss(decoder, given) for given in with_and_without}) == 1


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    for text in ("shortgpt", "block", "laco:combine=2,low=0", "loss"):
        with pytest.raises(UnsupportedModel, match="an encoder-decoder"):
            parse_method(text).plan(clues(model), 1)


@pytest.mark.parametrize("text", ["magnitude", "taylor", "laco"])
def test_packed_weights_are_refused(text):
    model = build()
    model.model.layers[3].mlp.up_proj.weight.quant_state = object()  # as bitsandbytes marks its own
    with pytest.raises(UnsupportedModel, match=r"mlp.up_proj.weight .*is quantised"):
        parse_method(text).plan(clues(model), 2)


@pytest.mark.parametrize("text", ["shortgpt", "block", "laco", "loss"])
def test_without_a_mask_every_token_is_real(text):
    whole = [{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])} for inputs in BATCHES]
    bare = [{k: v for k, v in inputs.items() if k != "attention_mask"} for inputs in BATCHES]
    plans = [parse_method(text).plan(Clues(build(), given, given, 0), 2) for given in (whole, bare)]
    assert plans[0] == plans[1]


def test_hidden_states_that_are_not_one_vector_a_token_are_refused():
    wrong = [{**BATCHES[0], "attention_mask": torch.ones(3, 1, 9, 9)}]
    for text in ("shortgpt", "block"):
        with pytest.raises(UnsupportedModel, match="one vector a token"):
            parse_method(text).plan(Clues(build(), wrong, wrong, 0), 1)


@pytest.mark.parametrize(
    "text",
    [
        *PLAIN,
        "laco",
        "laco:threshold=0.5",
        "laco:threshold=-1,combine=3,interval=1,low=0",
        "laco:combine=2",
        "gradpruner",
        "gradpruner:preset=paper,merge=3,probe_steps=10",
        "gradpruner:patch=false,adapters=discard",
        "gradpruner:kind=squared,top=0.5,weight=0.5,rank=4,share=0.1",
        "shortgpt:patch=true",
        "drop-last:adapters=keep",
        "loss:patch=true,adapters=keep,rank_factor=2",
    ],
)
def test_format_method_is_the_opposite_of_parse(text):
    assert format_method(parse_method(text)) == text and text.partition(":")[0] in METHODS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lacoo", "method = 'lacoo'; accepted are .*block, drop-last, .*laco, loss, magnitude, random, shortgpt"),
        ("shortgpt:fast=1", "'fast=1' is no option=value; its options are patch, adapters, rank_factor"),
        (
            "gradpruner:fast=1",
            "its options are preset, kind, merge, top, weight, patch, adapters, rank_factor, probe_steps",
        ),
        ("gradpruner:preset=best", "preset = 'best'; accepted are default, paper"),
        ("gradpruner:adapters=both", "adapters = 'both'; accepted are keep, discard"),
        ("gradpruner:patch=1", "patch = 1; accepted are True and False"),
        ("gradpruner:kind=nrom", "kind = 'nrom'; accepted are squared, norm, normalized, residual, gap"),
        ("gradpruner:probe_steps=0", "probe_steps = 0; expected a whole number, 1 or more"),
        ("gradpruner:rank_factor=0", "rank_factor = 0; expected a whole number, 1 or more"),
        ("gradpruner:rank=-1", "rank = -1; expected a whole number, 0 or more"),
        ("gradpruner:share=2", "share = 2; accepted is a share above 0 and up to 1"),
        ("laco:combine", "'combine' is no option=value; its options are threshold, combine, interval, low"),
        ("laco:combine=1", "combine = 1; expected a whole number, 2 or more"),
        ("laco:interval=0", "interval = 0; expected a whole number, 1 or more"),
        ("laco:low=-1", "low = -1"),
        ("laco:low=true", "low = True"),
        ("laco:combine=2.5", "combine = 2.5"),
        ("laco:threshold=nan", "threshold = nan; accepted are none and -1 to 1"),
        ("laco:threshold=high", "threshold = 'high'"),
    ],
)
def test_what_is_wrong_with_a_method_is_named(text, message):
    with pytest.raises(InvalidArgument, match=message):
        parse_method(text)


@pytest.fixture(scope="module")
def probed():
    """A model with adapters that do something, and what a probe saw of it."""
    torch.manual_seed(3)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    watched = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in watched.parameters() if p.requires_grad], lr=1e-3)
    probe = Probe(watched)
    with probe.watching(optimizer, len(BATCHES)):
        for inputs in BATCHES:
            watched(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, probe.igia


MANY = [*BATCHES, batch([9, 12, 6, 7], 6), batch([5, 11, 8], 7)]  # rows enough to hold some out


def seen(probed):
    model, igia = probed
    return Clues(copy.deepcopy(model), MANY, HELD_OUT, 0, lambda: igia)


def by_hand(probed, plan, *, keep, patch, igia=None, top=0.2, weight=1.0):
    """The cut model, in steps: patches as the model with its adapters has them, merge, patch, drop, adapters."""
    model = copy.deepcopy(probed[0])
    merged = copy.deepcopy(model).merge_and_unload()
    patches = fit_patches(merged, plan, MANY) if patch else []
    base = copy.deepcopy(model).unload()
    learned = {name: value - base.state_dict()[name] for name, value in merged.state_dict().items()}
    for position, layer in enumerate(Decoder(apply(copy.deepcopy(base), plan, igia, top=top, weight=weight)).layers):
        base.model.layers[plan.kept[position]].load_state_dict(layer.state_dict())
    state = base.state_dict()
    with torch.no_grad():
        for p in patches:
            state[f"model.layers.{p.weight.layer}.{p.weight.name}"] += p.change
        for name, delta in learned.items():
            state[name] += delta * keep
    return without(base, plan.removed)


def assert_close(smaller, expected):
    got, want = smaller.state_dict(), expected.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], want[name], atol=2e-4) for name in want)


OPTIONS = [
    ("merge=1", True, True),
    ("merge=1,patch=true,adapters=keep", True, True),
    ("merge=1,adapters=discard", False, True),
    ("merge=1,patch=false", True, False),
    ("preset=paper", False, False),
    ("preset=paper,patch=true", False, True),
]


@pytest.mark.parametrize(("text", "keep", "patch"), OPTIONS)
def test_gradpruner_keeps_and_patches_as_told(probed, text, keep, patch):
    method, given = parse_method(f"gradpruner:{text}"), seen(probed)
    assert method.settled("adapters") == ("keep" if keep else "discard")
    plan = method.plan(given, 3)
    assert plan.removed and len(plan.merge) == 1  # what is above 0.3 of the layers is folded
    smaller = method.cut(given, plan)
    assert not any("lora" in name for name, _ in smaller.named_parameters())
    expected = by_hand(probed, plan, keep=keep, patch=patch, igia=probed[1])
    assert_close(smaller, expected)
    others = [
        by_hand(probed, plan, keep=a, patch=b, igia=probed[1])
        for a, b in itertools.product((0, 1), (0, 1))
        if (a, b) != (keep, patch)
    ]
    for other in others:  # every option makes another model
        with pytest.raises(AssertionError):
            assert_close(smaller, other)


def test_gradpruner_passes_on_how_it_merges(probed):
    for text, options in [("top=0.6", {"top": 0.6}), ("weight=0.5", {"weight": 0.5})]:
        method, given = parse_method(f"gradpruner:preset=paper,{text}"), seen(probed)
        plan = method.plan(given, 3)
        smaller = method.cut(given, plan)
        assert_close(smaller, by_hand(probed, plan, keep=False, patch=False, igia=probed[1], **options))
        with pytest.raises(AssertionError):
            assert_close(smaller, by_hand(probed, plan, keep=False, patch=False, igia=probed[1]))


def test_gradpruner_plans_by_its_score_and_merging(probed):
    igia = probed[1]
    for kind, merge in itertools.product(("squared", "norm", "normalized"), (0, 2)):
        plan = parse_method(f"gradpruner:kind={kind},merge={merge}").plan(seen(probed), 3)
        scores = igia.layer_scores(kind).tolist()
        assert set(plan.removed) == set(sorted(range(1, len(scores)), key=lambda j: scores[j])[:3])
        assert len(plan.merge) == merge


@pytest.mark.parametrize(
    ("text", "keep", "patch"),
    [
        ("", False, False),
        ("patch=true", False, True),
        ("adapters=keep", True, False),
        ("patch=true,adapters=keep", True, True),
    ],
)
@pytest.mark.parametrize("name", ["drop-last", "shortgpt"])
def test_dropping_keeps_and_patches_where_asked_to(probed, name, text, keep, patch):
    method, given = parse_method(f"{name}:{text}"), seen(probed)
    assert method.settled("adapters") == ("keep" if keep else "discard")
    plan = method.plan(given, 2)
    smaller = method.cut(given, plan)
    assert_close(smaller, by_hand(probed, plan, keep=keep, patch=patch))
    for a, b in {(0, 0), (0, 1), (1, 0), (1, 1)} - {(keep, patch)}:
        with pytest.raises(AssertionError):
            assert_close(smaller, by_hand(probed, plan, keep=a, patch=b))


def test_default_options_are_the_papers_but_for_the_interval():
    assert Laco() == Laco(threshold=None, combine=4, interval=4, low=1) == parse_method("laco:threshold=none")
