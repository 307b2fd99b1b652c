"""The text of a method: `name:option=value`."""

from __future__ import annotations

import pytest
from method_inputs import PLAIN

from gradpruner import InvalidArgument
from gradpruner.methods import METHODS, format_method, parse_method


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
