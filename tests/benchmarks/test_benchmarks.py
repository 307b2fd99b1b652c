"""The benchmark harness: it compares like with like, gives a wrong answer no time, and its arithmetic is right."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace

import pytest
import torch
from tiny_llama import NAMES, llama

import gradpruner
from benchmarks import records
from benchmarks.__main__ import main
from benchmarks.ops.base import Implementation
from benchmarks.ops.cases import OPERATIONS, SHAPES, TOLERANCE, Count, Shapes, cases, product_tolerance
from benchmarks.ops.implementations import Ours, Reference, implementations
from benchmarks.ops.limits import Limits
from benchmarks.ops.plain_torch import _kth_value, _sampled_value, _top_value
from benchmarks.ops.timing import Measured, WrongAnswer, measure, quiet_collector
from benchmarks.plots import plot
from benchmarks.records import Result, read, results, table_rows, update, write
from benchmarks.runs import curves, pipeline
from gradpruner.errors import CheckpointError, InvalidArgument

CPU = torch.device("cpu")
ODD = Shapes(((33, 70), (7, 129)), 2)
EAGER = implementations(skip=["compiled"])


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Each memory measurement collects garbage, which takes a while with all that pytest has loaded."""
    with quiet_collector():
        yield


class Mine(Implementation):
    """What somebody else's class looks like."""

    name = "mine"

    def threshold(self, igia, k):
        return igia.flatten().topk(k).values[-1]


class OwnSums(Implementation):
    name = "wrong"

    def gram_norm(self, a, b):
        return torch.stack([(bi @ ai).square().sum() for ai, bi in zip(a, b, strict=True)]) * (1 + 3 * TOLERANCE)

    def square_accumulate_(self, igia, grad):
        igia.copy_(grad.float().square())

    def outer_square_accumulate_(self, igia, a, b):
        igia += b @ a

    def wgrad_square_accumulate_(self, igia, x, dy, grad):
        g = dy.float().T @ x.float()
        igia += g.square()
        return g.sum()

    def threshold(self, igia, k):
        return igia.flatten().topk(k + 1).values[-1]

    def sign_merge_(self, weight, donors, igias, values, indices, scales):
        for donor, f, value in zip(donors, igias, values, strict=True):
            weight += (f > value) * donor  # signs not looked at

    def factor_merge(self, weight, donor, a, b, k):
        Ours(CPU).factor_merge(weight, donor, a, b, k + k // 100 + 2)

    def weight_importance(self, weight, norms, grads, alpha):
        return weight.float().abs() * (norms if grads is None else norms + grads) * (1 + 3 * TOLERANCE)

    def prune_groups_(self, weight, norms, grads, alpha, kept, group):
        return Ours(CPU).prune_groups_(weight, None, grads, alpha, kept, group)  # norms not looked at

    def apply_mask_(self, weight, mask):
        Ours(CPU).apply_mask_(weight, mask ^ 128)

    def wgrad_abs_accumulate_(self, total, x, dy):
        total += dy.float().T @ x.float()


class WrongMask(Implementation):
    name = "wrong"

    def threshold(self, igia, k):
        return (igia < igia.flatten().kthvalue(k + 1).values).float()  # as many, but the smallest

    def prune_groups_(self, weight, norms, grads, alpha, kept, group):
        return ~Ours(CPU).prune_groups_(weight, norms, grads, alpha, kept, group)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_implementation_agrees_with_the_reference(op):
    for case in OPERATIONS[op](ODD):
        measured = measure(case, EAGER, 1, CPU)
        names = [each.name for each in measured]
        assert names[0] == "reference" and {"released", "ours"} <= set(names)
        assert any(each.kind == "torch" for each in measured)
        assert all(each.seconds and min(each.seconds) > 0 for each in measured)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATIONS)
def test_compiled_torch_agrees_with_the_reference(op):
    classes = [each for each in implementations() if each.name in ("reference", "compiled", "ours")]
    for case in OPERATIONS[op](Shapes(((33, 70),), 2)):
        compiled = [each for each in measure(case, classes, 1, CPU) if each.name == "compiled"]
        assert len(compiled) == (op not in ("gram_norm", "threshold", "prune_groups_"))


class WrongTie(Implementation):
    name = "wrong"

    def threshold(self, igia, k):
        value, index = Ours(CPU).threshold(igia, k)
        return value, index - 1  # without ties the value's own place: nothing equal is kept


class Raising(Implementation):
    name = "raising"

    def threshold(self, igia, k):
        raise RuntimeError("\nat 7:3:\n  tl.dot(a, b)\nK >= 16\n")


class Tiring(Mine):
    name = "tiring"
    calls = 0

    def threshold(self, igia, k):
        Tiring.calls += 1
        if Tiring.calls == 4:  # the first call, the one for the memory, a round, and then
            raise MemoryError("no more")
        return super().threshold(igia, k)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("wrong", [OwnSums, WrongMask, WrongTie])
def test_a_wrong_implementation_has_no_time(op, wrong):
    if not hasattr(wrong, op):
        pytest.skip("not wrong there")
    for case in OPERATIONS[op](ODD):
        reference, found, ours = measure(case, [Reference, wrong, Ours], 1, CPU)
        assert found.error.startswith("wrong: ") and not found.seconds and math.isnan(found.first_s)
        assert not reference.error and not ours.error and ours.seconds


def test_what_raises_has_no_time_and_the_others_go_on(capsys):
    case = next(OPERATIONS["threshold"](ODD))
    Tiring.calls = 0
    found = {each.name: each for each in measure(case, [Reference, Raising, Tiring, Ours], 3, CPU)}
    assert found["raising"].error == "RuntimeError: at 7:3: ... K >= 16"
    assert found["tiring"].error == "MemoryError: no more" and not found["tiring"].seconds
    assert len(found["ours"].seconds) == 3 and not found["ours"].error
    assert "tl.dot(a, b)" in capsys.readouterr().err


def test_nothing_is_timed_that_could_not_be_checked(capsys):
    class Failing(Raising):
        name, kind = "reference", "reference"

    case = next(OPERATIONS["threshold"](ODD))
    reference, ours = measure(case, [Failing, Ours], 1, CPU)
    assert reference.error.startswith("RuntimeError") and ours.error == "not run: the reference failed"
    no_data = replace(case, make=lambda normal: normal(-1))
    assert [each.error for each in measure(no_data, [Reference, Ours], 1, CPU)][1] == ours.error


def test_only_sums_over_tokens_on_a_gpu_may_be_further_off():
    assert product_tolerance(CPU) == TOLERANCE < product_tolerance(torch.device("cuda")) == 5e-5


def test_weights_too_large_for_a_cpu_are_merged_on_a_gpu():
    def merged(device):
        return {(c.shape, c.variant) for c in cases("factor_merge", SHAPES["llama-8b"], torch.device(device))}

    left_out = {(shape, f"r={r}, t=40") for shape in ("14336x4096", "4096x14336") for r in (8, 64)}
    left_out.add(("4096x4096", "r=64, t=40"))
    assert merged("cuda") - merged("cpu") == left_out and len(merged("cuda")) == 8


def test_every_call_starts_from_the_same_state():
    """Wrong from the second call on would go unseen: but there is nothing to go wrong if the state is put back."""
    seen = []

    class Watching(Implementation):
        name = "watching"

        def square_accumulate_(self, igia, grad):
            seen.append(float(igia.sum()))
            igia += grad.float() ** 2

    measure(next(OPERATIONS["square_accumulate_"](ODD)), [Reference, Watching, Ours], 3, CPU)
    assert len(seen) == 5 and len(set(seen)) == 1


@pytest.mark.parametrize("size", [50, 70_000, 300_001])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.99, 1.0])
def test_the_sampled_threshold_is_exact(size, share):
    igia = torch.randn(size, generator=torch.Generator().manual_seed(1)).square()
    k = max(1, int(share * size))
    right = igia.sort(descending=True).values[k - 1]
    assert _sampled_value(igia, k) == _kth_value(igia, k) == _top_value(igia, k) == right


def test_the_sampled_threshold_survives_ties():
    igia = torch.zeros(100_000)
    igia[::7] = 1.0
    assert _sampled_value(igia, 200) == 1.0 and _sampled_value(igia, 50_000) == 0.0


def test_memory_of_a_call_is_seen():
    class Hungry(Mine):
        name = "hungry"

        def threshold(self, igia, k):
            held = torch.ones(16 << 20)  # 64 MiB
            return super().threshold(igia, k) * held[0]

    case = next(OPERATIONS["threshold"](ODD))
    extra = {each.name: each.extra_bytes for each in measure(case, [Reference, Mine, Hungry, Ours], 1, CPU)}
    assert 60 << 20 < extra["hungry"] < 80 << 20 and extra["mine"] < 8 << 20


def test_counts():
    """14336 x 4096 at r = 8, t = 40 is 42 GFLOP a rebuild (docs/method.md, section 3); a merge is two."""
    cases = {(c.op, c.shape, c.variant): c.count for op in OPERATIONS.values() for c in op(SHAPES["llama-8b"])}
    entries = 14336 * 4096
    merge = cases["factor_merge", "4096x4096", "r=8, t=40"]
    assert merge.operations == 2 * 42_278_584_320 * 4096 // 14336
    assert merge.bytes == 6 * 4096 * 4096 + 4 * 40 * 8 * (4096 + 4096)
    assert cases["gram_norm", "224 pairs", "r=8"] == Count(32 * 81920 * 32, 72 * 81920 * 32, torch.float64)
    assert cases["sign_merge_", "4096x14336", "n=3"].bytes == 22 * entries
    assert cases["square_accumulate_", "14336x4096", "bf16"].bytes == 10 * entries
    assert cases["wgrad_square_accumulate_", "1024x4096", "bf16, T=1024"].operations == 2 * 1024 * 1024 * 4096
    assert cases["outer_square_accumulate_", "1024x4096", "r=64"].operations == 130 * 1024 * 4096
    assert cases["weight_importance", "1024x4096", "norms, grads"].bytes == 10 * 1024 * 4096
    assert cases["prune_groups_", "1024x4096", "2:4"].bytes == 33 * 1024 * 4096 // 8
    assert cases["apply_mask_", "4096x14336", "bf16"].bytes == 33 * entries // 8
    assert cases["wgrad_abs_accumulate_", "1024x4096", "bf16, T=1024"].operations == 2 * 1024 * 1024 * 4096


def test_the_limit_is_whichever_takes_longer():
    class Known(Limits):
        def bandwidth(self, size):
            return 10e9

        def peak(self, dtype):
            return {torch.float32: 100e9, torch.float64: 50e9}[dtype]

    limits = Known(CPU, 1)
    assert limits.of(Count(10**9, 10**9)) == (0.1, "bytes")
    assert limits.of(Count(10**9, 20 * 10**9)) == (0.2, "operations")
    assert limits.of(Count(10**9, 20 * 10**9, torch.float64)) == (0.4, "operations")


def test_the_machine_is_measured_once():
    limits = Limits(CPU, 1, side=64)
    assert 1e8 < limits.bandwidth(5 << 20) < 1e13 and limits.bandwidth(5 << 20) == limits.bandwidth(6 << 20)
    assert 1e7 < limits.peak(torch.float64) < 1e14 and limits.peak(torch.float64) == limits.peak(torch.float64)


def some_results(op: str = "threshold") -> list[Result]:
    case = next(OPERATIONS[op](SHAPES["tiny"]))
    measured = [
        Measured("reference", "reference", (9.0,), 9.0, 4),
        Measured("released", "released", (4.0, 6.0, 8.0), 4.5, 3),
        Measured("in place", "torch", (2.0, 2.0, 2.0), 2.5, 2),
        Measured("compiled", "torch", (3.0, 3.0, 3.0), 33.0, 2),
        Measured("ours", "ours", (1.0, 2.0, 1.0), 1.5, 1),
    ]
    return results(case, measured, (0.5, "bytes"), CPU)


def test_ratios_are_taken_round_by_round():
    by_name = {each.implementation: each for each in some_results()}
    released = by_name["released"]
    assert (released.ratio_to_ours, released.ratio_min, released.ratio_max) == (4.0, 3.0, 8.0)
    assert (released.median_s, released.min_s, released.max_s, released.runs) == (6.0, 4.0, 8.0, 3)
    assert by_name["ours"].share_of_limit == 0.5 and by_name["ours"].ratio_to_ours == 1.0
    (row,) = table_rows(some_results())
    assert row["which"] == "in place" and row["best torch"] == "2 s" and row["released"] == "6 s"
    assert row["released / ours"] == "4.00 (3.00 to 8.00)" and row["compile s"] == 30.0


def test_csv_round_trip(tmp_path):
    path = tmp_path / "x.csv"
    write(path, some_results())
    assert read(path, Result) == some_results()
    path.write_text(path.read_text().replace("median_s", "median"))
    with pytest.raises(CheckpointError, match="Result"):
        read(path, Result)
    with pytest.raises(InvalidArgument, match="--csv"):
        read(tmp_path / "none.csv", Result)


def test_files_without_the_newer_columns_can_be_read(tmp_path):
    path = tmp_path / "x.csv"
    found = [replace(each, call_s=0.5) for each in some_results()]
    write(path, found)
    assert read(path, Result) == found
    with path.open(newline="") as file:
        lines = [
            {name: line[name] for name in line if name not in ("call_s", "error")} for line in csv.DictReader(file)
        ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    assert read(path, Result) == some_results()
    update(path, some_results("gram_norm"))
    assert read(path, Result) == [*some_results(), *some_results("gram_norm")]


def test_the_committed_files_can_be_read():
    committed = list(records.FOLDER.glob("*-llama-8b*.csv"))
    assert committed and all(read(each, Result) for each in committed)


def failing_results(failing: str) -> list[Result]:
    case = next(OPERATIONS["threshold"](SHAPES["tiny"]))
    measured = [
        Measured("reference", "reference", (9.0,), 9.0, 4, (9.5,)),
        Measured("in place", "torch", (4.0, 4.0), 2.5, 2, (5.0, 6.0)),
        Measured("topk", "torch", (3.0, 3.0), 2.5, 2, (4.0, 4.0)),
        Measured("ours", "ours", (2.0, 1.0), 1.5, 1, (2.5, 2.5)),
    ]
    measured = [replace(e, seconds=(), calls=(), error="wrong: 0.5") if e.name == failing else e for e in measured]
    return results(case, measured, (0.5, "bytes"), CPU)


@pytest.mark.parametrize("failing", ["ours", "topk", "reference"])
def test_what_failed_is_in_no_ratio_no_plot_and_no_best(tmp_path, failing):
    found = failing_results(failing)
    (row,) = table_rows(found)
    assert row["failed"] == f"{failing}: wrong: 0.5"
    assert (row["which"], row["best torch, call"]) == (("in place", "5.5 s") if failing == "topk" else ("topk", "4 s"))
    ours = [row[name] for name in ("ours", "ours, call", "ours of limit", "best torch / ours")]
    assert ours[0] == ("" if failing == "ours" else "1.5 s") and len({not each for each in ours}) == 1
    assert row["reference"] == ("" if failing == "reference" else "9 s (once)")
    path = tmp_path / "x.csv"
    write(path, found)
    bad = next(each for each in read(path, Result) if each.implementation == failing)
    assert bad.error == "wrong: 0.5" and bad.runs == 0 and bad.call_s is None
    assert all(math.isnan(each) for each in (bad.median_s, bad.min_s, bad.max_s, bad.ratio_to_ours, bad.share_of_limit))
    drawn = plot(path)[0].read_bytes()
    write(path, [each for each in found if not each.error])
    assert plot(path)[0].read_bytes() == drawn


def test_a_second_run_replaces_its_rows_and_keeps_the_others(tmp_path):
    path = tmp_path / "x.csv"
    update(path, some_results("threshold"))
    update(path, some_results("gram_norm"))
    again = [replace(each, median_s=7.0) for each in some_results("threshold")]
    update(path, again)
    assert read(path, Result) == [*some_results("gram_norm"), *again]
    elsewhere = [replace(each, threads=77) for each in some_results("gram_norm")]
    update(path, elsewhere)
    assert read(path, Result) == elsewhere


def test_plots_come_from_the_csv(tmp_path):
    path = tmp_path / "x.csv"
    write(path, [*some_results("threshold"), *some_results("sign_merge_")])
    drawn = plot(path)
    assert [each.name for each in drawn] == ["x-threshold.svg", "x-sign_merge.svg"]
    assert all(each.read_text(encoding="utf-8").startswith("<?xml") for each in drawn)
    before = drawn[0].read_bytes()
    assert plot(path)[0].read_bytes() == before
    write(path, [replace(each, median_s=100.0 * each.median_s) for each in some_results("threshold")])
    assert plot(path)[0].read_bytes() != before


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = "x threshold --shapes tiny --repeats 2 --skip compiled --also test_benchmarks:Mine --csv --plot"
    monkeypatch.setattr(sys, "argv", words.split())
    assert main() == 0
    out = capsys.readouterr().out
    assert "4 an entry" in out and "mine" in out and "of limit" in out
    (path,) = (tmp_path / "results").glob("*-tiny.csv")
    found = read(path, Result)
    assert len({each.row for each in found}) == 4 and {each.implementation for each in found} >= {"mine", "ours"}
    assert all(each.runs == (1 if each.kind == "reference" else 2) for each in found)


def test_the_command_goes_on_after_a_failure_and_ends_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = "x threshold gram_norm --shapes tiny --repeats 1 --skip compiled --also test_benchmarks:OwnSums"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--also", "test_benchmarks:Raising", "--csv"])
    assert main() == 1
    out, err = capsys.readouterr()
    assert "wrong: wrong: the threshold is off by" in out and "\ngram_norm\n" in out
    assert "benchmarks: threshold at 48x48, top 20 %: 'wrong': wrong: the threshold is off by" in err
    assert "benchmarks: threshold at 16x48, top 20 %: 'raising': RuntimeError: at 7:3: ... K >= 16" in err
    assert "benchmarks: gram_norm at 14 pairs, r=64: 'wrong': wrong: a norm is off by" in err
    (path,) = tmp_path.glob("*-tiny.csv")
    found = read(path, Result)
    assert {each.implementation for each in found if each.error} == {"wrong", "raising"}
    assert all(each.median_s > 0 for each in found if not each.error)
    assert {each.op for each in found} == {"threshold", "gram_norm"}


def test_a_budget_leaves_rows_out_and_says_which(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = "x gram_norm threshold --shapes tiny --repeats 1 --skip compiled --budget 1e-9"
    monkeypatch.setattr(sys, "argv", words.split())
    assert main() == 0
    out = capsys.readouterr().out
    assert "not run" in out and "gram_norm at 14 pairs, r=8" in out and "threshold at 80x48, top 20 %" in out
    monkeypatch.setattr(sys, "argv", [*words.split()[:-1], "0"])
    with pytest.raises(SystemExit, match="2"):
        main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--skip ours", "skip = 'ours'; accepted are released"),
        ("--also nowhere:Nothing", "expected package.module:Class"),
        ("--also gradpruner:Plan", "expected a subclass of Implementation"),
        ("--also benchmarks.ops.released:Released", "a name is taken twice"),
        pytest.param(
            "--device cuda", "torch sees no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
    ],
)
def test_wrong_calls(monkeypatch, capsys, words, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["x", *words.split()])
    assert main() == 1
    assert message in capsys.readouterr().err


PLAN = gradpruner.Plan(8, drop=[3], merge=[2, 5, 6])


def test_both_merges_of_the_pipeline_agree():
    model = llama(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = pipeline.merge_stage(model, 3, 2, plan=PLAN)
    assert [each.implementation for each in found] == ["released", "ours: apply, with its checks", "ours"]
    assert all(each.runs == 2 and each.ratio > 0 for each in found)
    assert found[2].ratio == 1.0
    entries = 8 * 3 * (4 * (24 + 24) + 3 * (24 + 52) - 2 * 12)  # r t (in + out); k and v are 12 high
    assert found[0].importance_bytes == 8 * 4 * entries
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_wrong_merge_stops_the_pipeline(monkeypatch):
    monkeypatch.setattr(pipeline, "_merge_ours", lambda weights, factors, plan: None)
    with pytest.raises(WrongAnswer, match="0 entries changed"):
        pipeline.merge_stage(llama(torch.bfloat16), 3, 1, plan=PLAN)
    monkeypatch.setattr(pipeline, "_merge_ours", lambda weights, *_: weights[4, f"{NAMES[0]}.weight"].mul_(2))
    with pytest.raises(WrongAnswer, match="otherwise than the released way"):
        pipeline.merge_stage(llama(torch.bfloat16), 3, 1, plan=PLAN)


def test_probe_overhead_pairs_steps_with_and_without():
    without, watched = pipeline.probe_overhead(llama(), 2, rows=2, length=8)
    assert (without.implementation, watched.implementation) == ("without", "with the probe")
    assert without.ratio == 1.0 and watched.runs == 2 and watched.ratio_min <= watched.ratio <= watched.ratio_max
    shapes = [(24, 24), (12, 24), (12, 24), (24, 24), (52, 24), (52, 24), (24, 52)]
    stored = sum(min(o * i, 2 * 8 * (o + i)) for o, i in shapes)  # factors of two steps, or F where that is smaller
    assert watched.importance_bytes == 8 * 4 * stored


def test_the_exponent_of_a_power_law():
    assert curves.exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2.0)
    assert curves.exponent([10, 100], [7.0, 7.0]) == pytest.approx(0.0)
    assert math.isnan(curves.exponent([1, 2], [0.0, 1.0])) and math.isnan(curves.exponent([4], [1.0]))
    with pytest.raises(InvalidArgument, match="as many"):
        curves.exponent([1, 2], [1.0])


def test_curves_to_csv_and_plot(tmp_path):
    points = [*curves.curve("factor_merge", "width", (16, 32), 1), *curves.curve("gram_norm", "rank", (2, 4, 8), 1)]
    assert [each.value for each in points] == [16, 32, 2, 4, 8] and min(each.median_s for each in points) > 0
    path = tmp_path / "c.csv"
    points = [replace(each, time_exponent=1.5, memory_exponent=0.5) for each in points]  # nan is not equal to itself
    write(path, points)
    assert read(path, curves.Point) == points
    drawn = curves.plot(path)
    assert drawn.name == "c.svg" and drawn.read_text(encoding="utf-8").startswith("<?xml")
    first, second = curves.table_rows(points)
    assert (first["values"], second["values"]) == ("16 32", "2 4 8") and first["time exponent"] == 1.5


def test_memory_of_the_probe_grows_with_depth():
    # a small model's factors become dense: at least F of every weight is held, 4 (1024 x 256 + 3 x 512 x 256) bytes
    points = curves.curve("probe", "depth", (2, 4), 1)
    assert points[0].extra_bytes > 2 << 20 and points[1].extra_bytes > 1.5 * points[0].extra_bytes
