"""The plan.json of a run: made by the run itself, or written or edited by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.errors import InvalidArgument, ModelMismatch
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.storage.provenance import MADE_FROM, need_same


def check_made_by_run(
    path: Path,
    record: Any,
    settings: Mapping[str, str],
    made_from: Callable[[], Mapping[str, str]],
    stale: Sequence[Path],
) -> None:
    """Check that a plan was made from the settings and the probe of this run.

    Args:
        path: plan.json.
        record: what it records that it was made from.
        settings: digest of the settings.
        made_from: returns digests of the settings and of the probe. It may run the probe, so it is called last.
        stale: what was made from the plan. If the plan is refused, the message names these to be deleted.

    Raises:
        InvalidArgument: the plan was made by another run, with other settings, or from another probe.
    """
    if not isinstance(record, Mapping) or record.get("settings") != settings["settings"]:
        raise InvalidArgument(
            f"{str(path)!r} was made by another run, or with other settings; expected a plan of this run. Delete "
            f"it, or remove its {MADE_FROM!r} to use it as a plan by hand"
        )
    # the plan itself may differ: it may have been edited
    need_same(path, {**record, "plan": ""}, {**made_from(), "plan": ""}, delete=[path, *stale])


def with_parameter_ratio(plan: Plan, igia: Igia) -> Plan:
    """Return a plan by hand with the share of parameters that its layers really have.

    Args:
        plan: the plan.
        igia: of the run's probe. It knows the parameters of each layer.

    Raises:
        ModelMismatch: the plan is for another model.
    """
    if plan.layers != igia.layers:
        raise ModelMismatch(f"plan.json is for {plan.layers} decoder layers; the model has {igia.layers}")
    if plan.model not in (None, igia.model):
        raise ModelMismatch(
            "plan.json was made for another model than the run's; expected a plan for this one, or none of its "
            "fingerprint: set its 'model' to null if it is meant for this one all the same"
        )
    return dataclasses.replace(plan, parameter_ratio=igia.parameter_ratio(plan.removed))
