"""Conversations: what the chat template writes, and which of its tokens are learned."""

from __future__ import annotations

import json

import chat_templates as templates
import pytest
from chat_templates import chat_tokenizer
from tokenizers import Tokenizer
from word_tokenizers import make_tokenizer

from gradpruner.data.examples import Example, Message
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument
from gradpruner.model.loss import IGNORED

ONE = Example((Message("user", "hi"),), (Message("assistant", "yo"),))
TWO = Example(
    (Message("user", "hi"),),
    (Message("assistant", "yo"), Message("user", "bye"), Message("assistant", "ciao")),
)


def shown(tokenizer, row):
    """The text of a row, what is learned in braces."""
    text, inside = "", False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORED, token)
        if (label != IGNORED) != inside:
            text, inside = text + ("}" if inside else "{"), not inside
        text += tokenizer.convert_ids_to_tokens(token).replace("Ċ", "\n").replace("Ġ", " ")
    return text + ("}" if inside else "")


def learned(example, tokenizer, **options):
    (row,) = tokenize([example], tokenizer, **{"max_length": 1000, **options})
    return shown(tokenizer, row)


TURNS = {  # of the conversation TWO: before the first answer, first answer, between, second answer, after it
    "CHATML": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "yo<|im_end|>",
        "\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n",
        "ciao<|im_end|>",
        "\n",
    ),
    "LLAMA": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "yo<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "ciao<|eot_id|>",
        "",
    ),
    "GEMMA": (
        "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
        "yo<end_of_turn>",
        "\n<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\n",
        "ciao<end_of_turn>",
        "\n",
    ),
    "MISTRAL": ("<s>[INST] hi [/INST]", " yo</s>", "[INST] bye [/INST]", " ciao</s>", ""),
    "PHI": (
        "<|user|>\nhi<|end|>\n<|assistant|>\n",
        "yo<|end|>",
        "\n<|user|>\nbye<|end|>\n<|assistant|>\n",
        "ciao<|end|>",
        "\n</s>",
    ),
    "ALPACA": (
        "### Instruction:\nhi\n\n### Response:\n",
        "yo\n\n",
        "### Instruction:\nbye\n\n### Response:\n",
        "ciao\n\n</s>",  # the template has no token that ends a turn, so the end token is added
        "",
    ),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", TURNS)
def test_what_is_learned(name, bos):
    """The same with a tokenizer that puts BOS before a text: a template writes it itself, or it is not there."""
    tokenizer = chat_tokenizer(getattr(templates, name), bos=bos)
    start, first, between, second, end = TURNS[name]
    assert learned(TWO, tokenizer) == f"{start}{{{first}}}{between}{{{second}}}{end}"
    assert learned(TWO, tokenizer, train_on="assistant") == learned(TWO, tokenizer)
    assert learned(TWO, tokenizer, train_on="last") == f"{start}{first}{between}{{{second}}}{end}"
    assert learned(TWO, tokenizer, train_on="all") == f"{{{start}{first}{between}{second}{end}}}"


def test_the_answer_of_a_prompt_with_earlier_turns():
    example = Example((*TWO.prompt, *TWO.answer[:2]), TWO.answer[2:])
    for template in (templates.CHATML, templates.MARKED):
        tokenizer = chat_tokenizer(template)
        assert "yo<|im_end|>}" not in learned(example, tokenizer)
        assert "{yo<|im_end|>}" in learned(example, tokenizer, train_on="assistant")
        for train_on in ("answer", "assistant"):
            assert "{ciao<|im_end|>}" in learned(example, tokenizer, train_on=train_on)


def test_the_learned_turns_follow_the_tokens_of_their_prompt():
    """A generation begins after the tokens of the prompt, even where the answer's beginning would merge with them."""
    tokenizer = chat_tokenizer(templates.CHATML)
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    merged = settings["model"]["vocab"]["ĊĊ"] = len(tokenizer)
    settings["model"]["merges"] = [["Ċ", "Ċ"]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(settings))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\nyo"}]
    assert merged in tokenizer.apply_chat_template(messages)["input_ids"]
    (row,) = tokenize([Example(ONE.prompt, (Message("assistant", "\n\nyo"),))], tokenizer, max_length=100)
    del messages[1]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt and row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert row["labels"][len(prompt)] != IGNORED


def test_thoughts_that_a_template_leaves_out():
    tokenizer = chat_tokenizer(templates.THINKING)
    thought = Message("assistant", "yo", json.dumps({"reasoning_content": "hm"}))
    (row,) = tokenize([Example(ONE.prompt, (thought,))], tokenizer, max_length=100)
    assert "assistant\n{<think>\nhm\n</think>\n\nyo<|im_end|>}" in shown(tokenizer, row)
    with pytest.raises(InvalidArgument, match=r"example 2: the chat template changes message 2.*train_on 'last'"):
        tokenize([ONE, Example(TWO.prompt, (thought, *TWO.answer[1:]))], tokenizer, max_length=100)
    last = learned(TWO, tokenizer, train_on="last")
    assert last.endswith("yo<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n{" + last.split("{")[1])
    opened = templates.THINKING.replace("assistant\n{% endif %}", "assistant\n<thoughts>\n{% endif %}")
    with pytest.raises(InvalidArgument, match=r"message 2.*not the prompt.*generation %}.*train_on 'all'"):
        tokenize([ONE], chat_tokenizer(opened), max_length=100)


def test_a_template_that_marks():
    tokenizer = chat_tokenizer(templates.MARKED)
    assert learned(TWO, tokenizer).count("{") == 2 and "{ciao<|im_end|>}" in learned(TWO, tokenizer)
    content_only = chat_tokenizer(templates.MARKED.replace("<|im_end|>{% endgen", "{% endgen"))
    assert "{yo}" in learned(TWO, content_only)  # what the template says
    other_prompt = chat_tokenizer(templates.MARKED.replace("%}<|im_start|>assistant\n", "%}<|im_start|>model\n"))
    assert learned(TWO, other_prompt, train_on="last").count("{") == 1
    nothing = chat_tokenizer(templates.MARKED.replace("%}{{ m['content'] }}<|im_end|>{% endg", "%}{% endg"))
    with pytest.raises(InvalidArgument, match="marks nothing"):
        tokenize([TWO], nothing, max_length=100)


def test_tools_and_other_keys_of_a_message():
    tokenizer = chat_tokenizer(templates.TOOLS)
    calls = json.dumps({"tool_calls": [{"function": {"name": "add"}}]})
    tools = json.dumps([{"name": "add"}])
    text = learned(Example(ONE.prompt, (Message("assistant", "", calls),), tools), tokenizer)
    assert text.startswith('<|im_start|>system\n[{"name": "add"}]<|im_end|>')
    assert 'assistant\n{<call>{"name": "add"}</call><|im_end|>}' in text


def test_a_conversation_that_the_assistant_begins():
    tokenizer = chat_tokenizer(templates.CHATML)
    example = Example((), (Message("assistant", "hello"), Message("user", "hi"), Message("assistant", "yo")))
    assert "kind.<|im_end|>\n<|im_start|>assistant\n{hello<|im_end|>}\n<|im_start|>user" in learned(example, tokenizer)


def test_a_template_that_wants_parts():
    parts = templates.CHATML.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")
    assert learned(TWO, chat_tokenizer(parts)) == learned(TWO, chat_tokenizer(templates.CHATML))


@pytest.mark.parametrize(
    ("template", "example", "options", "match"),
    [
        (None, ONE, {}, "no chat template.*--chat-template"),
        (
            templates.GEMMA,
            Example((Message("system", "x"), *ONE.prompt), ONE.answer),
            {},
            r"example 1.*\(system, user, assistant\).*System role not supported",
        ),
        (templates.CHATML, Example(ONE.prompt, ()), {}, "no turn of the assistant"),
        (templates.CHATML, Example("hi", "yo"), {"train_on": "assistant"}, "no turns: it is text"),
        (templates.CHATML.replace("m['content']", "m['content'] | upper"), ONE, {}, "does not write the content"),
        (templates.CHATML, ONE, {"train_on": "turns"}, "train_on.*turns.*answer.*assistant.*last.*all"),
    ],
)
def test_refusals(template, example, options, match):
    with pytest.raises(InvalidArgument, match=match):
        learned(example, chat_tokenizer(template), **options)


def test_texts_and_conversations_in_one_data_set():
    tokenizer = chat_tokenizer(templates.CHATML)
    rows = tokenize([ONE, Example("q", "a"), TWO], tokenizer, max_length=1000)
    assert [shown(tokenizer, row) for row in rows] == [
        learned(ONE, tokenizer),
        "q{ a</s>}",
        learned(TWO, tokenizer),
    ]
    assert rows[1] == tokenize([Example("q", "a")], make_tokenizer(), max_length=9)[0]
