"""Text and conversations as one text, for the commands that cut windows of it."""

from __future__ import annotations

import json

import pytest
from chat_templates import CHATML, chat_tokenizer
from word_tokenizers import make_tokenizer

from gradpruner.cli.main import main
from gradpruner.data.examples import Example, Message
from gradpruner.data.text_windows import text_of, tokens_of
from gradpruner.errors import InvalidArgument

CHAT = Example((Message("user", "Hi"),), (Message("assistant", "Hello"),))
WRITTEN = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
)


def test_conversations_are_written_by_the_template():
    tokenizer = chat_tokenizer(CHATML)
    assert text_of([CHAT, CHAT], tokenizer) == WRITTEN * 2
    assert text_of([Example("a", "b"), Example("c"), CHAT], tokenizer) == f"a b\n\nc\n\n{WRITTEN}"
    assert text_of([Example("a", "b"), Example("c")], make_tokenizer()) == "a b\n\nc"
    with pytest.raises(InvalidArgument, match="no chat template"):
        text_of([Example("a"), CHAT], make_tokenizer())


def test_a_begin_token_of_the_template_is_not_doubled():
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = chat_tokenizer(template, bos=True)
    tokens = tokens_of(text_of([CHAT, CHAT], tokenizer), tokenizer, 4)
    assert tokenizer.decode(tokens) == "<s>Hi</s>Hello</s>" * 2
    assert tokenizer.decode(tokens_of("Hi there", tokenizer, 4)) == "<s>Hi there"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["evaluate", "--window", "8", "--train-on", "all"], "--train-on would change nothing"),
        (["evaluate", "--window", "8", "--too-long", "skip", "--rouge", "4"], "--too-long and --rouge would change"),
        (["sparsify", "--out", "sparse", "--train-on", "last"], "unrecognized arguments: --train-on last"),
        (["sparsify", "--out", "sparse", "--too-long", "skip"], "unrecognized arguments: --too-long skip"),
    ],
)
def test_options_of_rows_are_refused_for_windows(tmp_path, capsys, command, words):
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"text": "Once upon a time"}))
    try:
        code = main([*command, "--model", str(tmp_path / "model"), "--data", str(data)])
    except SystemExit as error:
        code = error.code
    assert code == 2 and words in capsys.readouterr().err
