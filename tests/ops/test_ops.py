"""The contract of the ops: schemas, use under torch.compile, and the calls that are refused."""

from __future__ import annotations

import pytest
import torch
from on_device import placed
from op_inputs import normal, whole

from gradpruner import ops
from gradpruner.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("backend")


def op_calls():
    a, b = normal(3, 2, 5), normal(3, 4, 2)
    f = normal(4, 5).square()
    value, index = torch.tensor(0.5), torch.tensor(3)
    op = torch.ops.gradpruner
    return {
        "gram_norm": (op.gram_norm, ([a[0], a[1]], [b[0], b[1]])),
        "square_accumulate_": (op.square_accumulate_, (f.clone(), normal(4, 5))),
        "outer_square_accumulate_": (op.outer_square_accumulate_, (f.clone(), a[0].clone(), b[0].clone())),
        "wgrad frozen": (op.wgrad_square_accumulate_, (f.clone(), normal(7, 5), normal(7, 4), None)),
        "wgrad trainable": (op.wgrad_square_accumulate_, (None, normal(7, 5), normal(7, 4), normal(4, 5))),
        "threshold": (op.threshold, (f, 7)),
        "factor_threshold": (op.factor_threshold, (a, b, 7)),
        "sign_merge_": (op.sign_merge_, (normal(4, 5), [normal(4, 5)], [f], [value], [index], [1.0])),
        "factor_sign_merge_": (
            op.factor_sign_merge_,
            (normal(4, 5), [normal(4, 5)], [a], [b], [value], [index], [1.0]),
        ),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    op, args = op_calls()[name]
    results = torch.library.opcheck(op, placed(args))
    assert set(results.values()) == {"SUCCESS"}


def test_ops_that_copy_from_the_host_are_left_out_of_cuda_graphs():
    """Those whose Triton kernels get a table from pinned memory, and no others."""
    copying = {"gram_norm", "sign_merge_", "factor_sign_merge_"}
    every = {name: getattr(torch.ops.gradpruner, name) for name in ops.__all__ if hasattr(torch.ops.gradpruner, name)}
    assert len(every) == 12
    assert {n for n, op in every.items() if torch.Tag.cudagraph_unsafe in op.default.tags} == copying


def test_every_op_is_usable_under_compile():
    op = torch.ops.gradpruner

    def probe_and_merge(a, b, weight, donor):
        value, index = op.factor_threshold(a, b, 4)
        op.factor_sign_merge_(weight, [donor], [a], [b], [value], [index], [1.0])
        return op.gram_norm([a[0]], [b[0]]) * 2

    a, b, donor = placed((whole(2, 3, 5), whole(2, 4, 3, seed=1), normal(4, 5, seed=2)))
    plain, compiled = placed((normal(4, 5), normal(4, 5)))
    expected = probe_and_merge(a, b, plain, donor)
    got = torch.compile(probe_and_merge, fullgraph=True, backend="aot_eager")(a, b, compiled, donor)
    assert torch.equal(got, expected) and torch.equal(plain, compiled)


BAD_CALLS = {
    "pairs of unequal length": lambda: ops.gram_norm([normal(2, 3)], []),
    "ranks that differ": lambda: ops.gram_norm([normal(2, 3)], [normal(4, 3)]),
    "integers": lambda: ops.square_accumulate_(torch.zeros(3), torch.ones(3, dtype=torch.int64)),
    "igia in half": lambda: ops.square_accumulate_(torch.zeros(3, dtype=torch.float16), torch.ones(3)),
    "a shape that does not fit": lambda: ops.square_accumulate_(torch.zeros(3), torch.ones(4)),
    "k too large": lambda: ops.threshold(torch.ones(3), 4),
    "k negative": lambda: ops.factor_threshold(normal(1, 1, 2), normal(1, 2, 1), -1),
    "half factors": lambda: ops.factor_threshold(normal(1, 1, 2).half(), normal(1, 2, 1).half(), 1),
    "tokens that differ": lambda: ops.wgrad_square_accumulate_(None, normal(3, 2), normal(4, 2), None),
    "donor of another dtype": lambda: ops.sign_merge_(
        torch.ones(2), [torch.ones(2).half()], [torch.ones(2)], [torch.tensor(1.0)], [torch.tensor(0)], [1.0]
    ),
    "a threshold missing": lambda: ops.sign_merge_(
        torch.ones(2), [torch.ones(2)], [torch.ones(2)], [], [torch.tensor(0)], [1.0]
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    with pytest.raises(InvalidArgument, match=r"expected|accepted"):
        BAD_CALLS[name]()


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("GRADPRUNER_BACKEND", "cudnn")
    with pytest.raises(InvalidArgument, match="reference, triton, cpp"):
        ops.threshold(torch.ones(3), 1)
