"""Several test sets have scores each, beside the scores of all."""

from __future__ import annotations

import json

import pytest
from auto_runs import make_source

from gradpruner.cli.main import main
from gradpruner.data.load import load_examples
from gradpruner.data.table import join
from gradpruner.model.load import load_model
from gradpruner.run.stages import measure, measure_sets, short_names

SETTINGS = {"max_length": 64, "train_on": "answer", "batch_size": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("sets"))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(word, count):
    return [{"prompt": f"{word} {n}", "completion": "red green"[: 3 + 6 * (n % 2)]} for n in range(count)]


def test_scores_of_each_set_and_of_all(source, tmp_path):
    model, tokenizer = load_model(source)
    files = [write(tmp_path / "a.jsonl", pairs("word", 3)), write(tmp_path / "b.jsonl", pairs("what", 5))]
    book = write(tmp_path / "book.jsonl", [{"text": "word green blue"}])
    sets = [load_examples(file) for file in (*files, book)]
    joined = join(list(zip((*files, book), sets, strict=True)))
    joint, found = measure_sets(model, tokenizer, joined, **SETTINGS)
    together, _ = measure_sets(model, tokenizer, list(joined), **SETTINGS)
    assert joint.exact_match == together.exact_match and joint.examples == together.examples == 9
    assert joint.perplexity == pytest.approx(together.perplexity, rel=1e-6)
    assert [one["name"] for one in found] == ["a.jsonl", "b.jsonl", "book.jsonl"]
    assert [one["source"] for one in found] == [*files, book]
    for one, examples in zip(found, sets, strict=True):
        alone = measure(model, tokenizer, examples, **SETTINGS).to_dict()
        assert {name: one[name] for name in alone} == alone
    assert found[2]["exact_match"] is None
    assert len({one["perplexity"] for one in found}) == 3


def test_a_set_of_which_all_is_skipped(source, tmp_path):
    model, tokenizer = load_model(source)
    short, long = pairs("word", 3), [{"prompt": "word", "completion": "red " * 80}]
    sets = [
        (name, load_examples(write(tmp_path / name, rows))) for name, rows in (("a.jsonl", short), ("b.jsonl", long))
    ]
    joint, found = measure_sets(model, tokenizer, join(sets), **SETTINGS, too_long="skip")
    assert found[1]["examples"] == 0 and found[1]["perplexity"] is None
    assert joint.examples == 3 and joint.perplexity == pytest.approx(found[0]["perplexity"])


def test_names_tell_sets_apart():
    assert short_names(["x/a.jsonl", "y/b.jsonl"]) == ["a.jsonl", "b.jsonl"]
    assert short_names(["x/a.jsonl", "y/a.jsonl"]) == ["x/a.jsonl", "y/a.jsonl"]
    assert short_names(["a.jsonl", "a.jsonl"]) == ["a.jsonl (1)", "a.jsonl (2)"]


def test_a_run_shows_the_scores_of_each_set(source, tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", pairs("who", 8))
    tests = [write(tmp_path / "a.jsonl", pairs("word", 3)), write(tmp_path / "b.jsonl", pairs("what", 5))]
    options = ["--steps", "4", "--batch-size", "2", "--count", "2", "--no-dense", "--out", str(tmp_path / "out")]
    assert main(["run", "--model", source, "--data", train, "--test-data", *tests, *options]) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(one["name"], one["examples"]) for one in row["test_sets"]] == [("a.jsonl", 3), ("b.jsonl", 5)]
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (printed, card, page):
        for one in row["test_sets"]:
            assert f"perplexity: {one['name']}" in text and f"{one['perplexity']:.3f}" in text
    assert "Examples of each set: a.jsonl 3, b.jsonl 5." in printed and str(tmp_path) not in card


def test_a_folder_goes_on_only_with_the_same_test_sets(source, tmp_path, capsys):
    """Scores of sets are kept, so other sets of the same examples are another run."""
    rows = pairs("word", 5)
    train = write(tmp_path / "train.jsonl", pairs("who", 8))
    options = ["--steps", "4", "--batch-size", "2", "--count", "2", "--no-dense", "--out", str(tmp_path / "out")]
    for name, first, code in (("one", 2, 0), ("renamed", 2, 0), ("other", 3, 2)):
        tests = [
            write(tmp_path / name / f"{part}.jsonl", some) for part, some in enumerate((rows[:first], rows[first:]))
        ]
        assert main(["run", "--model", source, "--data", train, "--test-data", *tests, *options]) == code
    assert "test_sets; expected" in capsys.readouterr().err
