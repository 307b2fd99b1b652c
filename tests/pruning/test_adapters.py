"""Every adapter, optimizer and loop of docs/adapters.md, and that table against what happens now."""

from __future__ import annotations

import adapter_matrix as adapters
import adapters_table
import oracle
import peft
import pytest
import torch
from adapter_cases import PEFT_OF_KIND, of_kind
from adapter_loops import CASES
from adapter_models import Case, is_here, llama, lora, options
from thinned import IN_CI

import gradpruner
from gradpruner.model.decoder import Decoder, base_name
from gradpruner.pruning.apply import skipping_logits

ROWS = adapters_table.rows_in(adapters_table.TABLE.read_text())


def marked(number: int, case: Case):
    by_default = number % 4 == 0 and "compile" not in case.name
    marks = [pytest.mark.slow] if case.slow else [] if by_default else IN_CI
    return pytest.param(case, id=f"{case.group}: {case.name}", marks=marks)


@pytest.mark.parametrize("case", [marked(number, case) for number, case in enumerate(CASES)])
def test_case(case):
    if case.missing:
        pytest.skip(f"needs {case.missing}")
    row = adapters.run(case)
    written = ROWS[case.group, case.name]
    if adapters_table.kind_of(written) in ("works", "refused"):  # it may have been written without what this needs
        assert written == adapters_table.line(case, row), "run python tests/support/adapters_table.py"


def test_the_table_has_these_cases_and_counts_them():
    assert list(ROWS) == [(case.group, case.name) for case in CASES]
    assert adapters_table.counts(list(ROWS.values())) in adapters_table.TABLE.read_text()


def test_merging_here_is_the_oracles():
    weight, donor = torch.randint(-2, 3, (2, 12, 9), generator=torch.Generator().manual_seed(0)).bfloat16() / 3
    mask = oracle.mask_of(torch.rand(12, 9, generator=torch.Generator().manual_seed(1)), 40)
    assert torch.equal(adapters.merge(weight, donor, mask), oracle.merge(weight, [donor], [mask]))


def test_parameters_of_every_kind_of_adapter_are_known_as_such():
    """A new kind in peft would otherwise be taken for linear weights of the layer, in silence."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prompts = ("prompt_tuning_", "multitask_prompt_tuning_", "p_tuning_", "prefix_tuning_", "cpt_", "cartridge_")
    unknown = [
        prefix
        for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values()
        if prefix not in prompts and base_name(f"layer.{prefix}a.default") is not None
    ]
    assert unknown == []


@pytest.mark.parametrize("kind", ["GRALORA", "PEANUT", "ADALORA"])
def test_adapters_with_matrices_of_their_own_do_not_become_weights_of_the_layer(kind):
    if not is_here(PEFT_OF_KIND.get(kind, "peft")):
        pytest.skip(f"needs {PEFT_OF_KIND[kind]}")
    plain = Decoder(llama())
    adapted = Decoder(of_kind(kind)(llama()))
    assert adapted.weights == plain.weights and adapted.total_parameters() == plain.total_parameters()
    assert [adapted.structure(j) for j in range(6)] == [plain.structure(j) for j in range(6)]


def test_an_unknown_way_to_begin_an_adapter_is_refused():
    model = lora(llama())
    model.peft_config["default"].init_lora_weights = "of tomorrow"
    with pytest.raises(gradpruner.UnsupportedModel, match=r"init_lora_weights='of tomorrow'.*model as it was before"):
        gradpruner.apply(model, gradpruner.Plan(6, drop=[1]), adapters="discard")


def test_looking_at_the_base_model_unfreezes_no_adapter():
    model = lora(llama())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    skipping_logits(Decoder(model), (1,))
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("tied", [True, False])
def test_what_modules_to_save_trained_is_discarded_and_a_tie_is_kept(tied):
    base = llama(tie_word_embeddings=tied)
    head = base.lm_head.weight.clone()
    model = options(modules_to_save=["lm_head"])(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1)
    small = gradpruner.apply(model, gradpruner.Plan(6, drop=[1, 3]), adapters="discard")
    assert torch.equal(small.lm_head.weight, head)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied


def test_a_plan_that_removes_every_layer_with_adapters():
    model = options(layers_to_transform=[1, 3])(llama())
    small = gradpruner.apply(model, gradpruner.Plan(6, drop=[1, 3]), adapters="discard")
    assert small.config.num_hidden_layers == 4 and not hasattr(small, "peft_config")


def test_a_prompt_is_taken_off_and_nothing_else():
    base = llama()
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert gradpruner.apply(model, gradpruner.Plan(6, drop=[1]), adapters="discard") is base


def test_adaption_prompt_is_refused_and_left_as_it_was():
    model = peft.get_peft_model(
        llama(), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=3)
    )
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(gradpruner.UnsupportedModel, match="AdaptionPromptModel cannot be taken off"):
        gradpruner.apply(model, gradpruner.Plan(6, drop=[1]), adapters="discard")
    assert [name for name, _ in model.named_parameters()] == before


def test_a_mixed_peft_model_is_refused():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(llama(), config, mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(gradpruner.UnsupportedModel, match="without a PeftModel around it"):
        gradpruner.apply(model, gradpruner.Plan(6, drop=[1, 3, 4]), adapters="discard")
    small = gradpruner.apply(model.unload().requires_grad_(True), gradpruner.Plan(6, drop=[1, 3, 4]))
    adapters.check_smaller(small, llama(), {})
