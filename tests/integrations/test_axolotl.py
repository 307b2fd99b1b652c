"""The plugin against Axolotl's own base class, plugin manager and configuration."""

from __future__ import annotations

import pytest
from training_runs import LAYERS, PROBE, same, tensors, trainer

import gradpruner
from gradpruner.model.decoder import Decoder

pytest.importorskip("axolotl.integrations.base", reason="the plugin needs Axolotl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAME = "gradpruner.integrations.axolotl.GradPrunerPlugin"


@pytest.fixture
def manager():
    from axolotl.integrations.base import PluginManager

    found = PluginManager.get_instance()
    found.plugins.clear()
    found.register(NAME)
    yield found
    found.plugins.clear()


def test_a_trainer_of_axolotls_is_cut(manager, tmp_path):
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault({"gradpruner_steps": PROBE, "gradpruner_ratio": 0.4, "adapter": "lora"})
    (plugin,) = manager.plugins.values()
    plugin.register(cfg)
    assert cfg.lora_mlp_kernel is False
    made, _ = trainer(tmp_path / "plugin", attached=False)
    manager.post_trainer_create(cfg, made)
    made.train()
    manager.post_train(cfg, made.model)
    other, callback = trainer(tmp_path / "attached")
    other.train()
    assert len(Decoder(made.model).layers) == LAYERS - len(callback.plan.removed)
    assert same(tensors(made.model), tensors(other.model))


def test_the_options_are_a_part_of_axolotls_configuration(manager):
    from axolotl.integrations.config import merge_input_args

    _, kind = merge_input_args()
    assert {"gradpruner_steps", "gradpruner_ratio", "base_model"} <= set(kind.model_fields)


def test_an_option_that_does_not_exist_is_refused(manager):
    (plugin,) = manager.plugins.values()
    with pytest.raises(gradpruner.InvalidArgument, match="gradpruner_ration: no such option; accepted are"):
        plugin.register({"gradpruner_ration": 0.4})


def test_every_option_is_one_of_attach():
    import inspect

    from gradpruner.integrations.axolotl import NAMES, PREFIX

    known = set(inspect.signature(gradpruner.attach).parameters)
    assert {name.removeprefix(PREFIX) for name in NAMES} == known - {"trainer", "factor_dtype"}
