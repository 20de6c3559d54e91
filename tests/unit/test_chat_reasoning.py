"""Thoughts, calls and what chat templates leave out, with the templates that TRL ships."""

from __future__ import annotations

import json
from copy import copy
from functools import cache
from pathlib import Path

import pytest
import trl
from test_chat_template import CHATML, SPECIAL, TOOLS, call, talk, tokenizer_with
from tokenizers.processors import TemplateProcessing

from qlora_neft.data.chat_template import ChatTemplate
from qlora_neft.data.examples import BadRow, Dialogue, Passage
from qlora_neft.data.prepare import prepare_data
from qlora_neft.data.sources import Row
from qlora_neft.data.templates import JinjaTemplate, NoTemplate, VicunaTemplate, make_template
from qlora_neft.data.worker import RowWorker
from qlora_neft.errors import UserInputError
from qlora_neft.recipe.schema import Data
from scripts.families.tokenizer import byte_tokenizer

STOCK = Path(trl.__file__).parent / "chat_templates"
QWEN3 = str(STOCK / "qwen3.jinja")
DEEPSEEK = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
MORE = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|eot_id|>", *DEEPSEEK]
THINKING = talk("2+2?", "4", "3+3?", "6")
THINKING[1]["reasoning_content"], THINKING[3]["reasoning_content"] = "Add two twice.", "Three twice."
IN_TEXT = talk("2+2?", "<think>\nAdd two twice.\n</think>\n\n4", "3+3?", "<think>\nThree twice.\n</think>\n\n6")


@cache
def tokenizer():
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL, *MORE]})
    return made


@cache
def stock(name, **kwargs):
    return ChatTemplate(tokenizer(), (STOCK / f"{name}.jinja").read_text(), f"{name}.jinja", kwargs)


def beginning():
    """A tokenizer that puts a begin token before a text."""
    made = tokenizer_with()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    return made


def rendered(chat, messages, tools=None, trained=None):
    return chat.sequences(Dialogue(tuple(messages), tuple(tools) if tools else None, trained))


def trained(sequence):
    return [piece.text for piece in sequence if piece.trained]


def sequences(chat, messages, tools=None, flags=None):
    return [trained(pieces) for pieces in rendered(chat, messages, tools, flags).sequences]


def refused(chat, messages, tools=None):
    with pytest.raises(BadRow) as caught:
        rendered(chat, messages, tools)
    return str(caught.value)


def before(sequence):
    """The text before the last trained piece."""
    last = max(number for number, piece in enumerate(sequence) if piece.trained)
    return "".join(piece.text for piece in sequence[:last])


# ---- Thoughts ----


@pytest.mark.parametrize("messages", [THINKING, IN_TEXT], ids=["field", "text"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3", "<think>\n{}\n</think>\n\n{}<|im_end|>"),
        ("qwen3_5_think", "{}\n</think>\n\n{}<|im_end|>"),
        ("gptoss", "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"),
        ("deepseek_r1_distill", "{}\n</think>\n\n{}" + DEEPSEEK[2]),
    ],
)
def test_a_thought_that_later_turns_hide_is_trained_in_a_sequence_of_its_own(name, said, messages):
    chat = stock(name)
    found = rendered(chat, messages).sequences
    assert sorted(trained(pieces)[0] for pieces in found) == sorted(
        [said.format("Add two twice.", "4"), said.format("Three twice.", "6")]
    )
    assert all(len(trained(pieces)) == 1 for pieces in found)
    # Each stands behind what generation is given.
    prompts = {chat.prompt(messages[:1]), chat.prompt(messages[:3])}
    assert {before(pieces) for pieces in found} == prompts


def test_turns_without_a_thought_stay_together_and_no_turn_is_trained_twice():
    messages = talk("a", "one", "b", "two", "c", "three")
    messages[3]["reasoning_content"] = "Why."
    first, own = rendered(stock("qwen3"), messages).sequences
    assert trained(first) == ["one<|im_end|>", "<think>\n\n</think>\n\nthree<|im_end|>"]
    assert trained(own) == ["<think>\nWhy.\n</think>\n\ntwo<|im_end|>"]
    # The answer without its thought is no prompt either: a prompt's weight does not train it.
    assert [piece.text for piece in first if piece.excluded] == ["two<|im_end|>"]
    assert [piece.text for piece in own if piece.excluded] == ["one<|im_end|>"]


def test_only_the_turns_that_the_row_trains_are_trained():
    assert sequences(stock("qwen3"), THINKING, flags=(False, False, False, True)) == [
        ["<think>\nThree twice.\n</think>\n\n6<|im_end|>"]
    ]
    kept = talk("how", "five", "sure?", "four")
    [pieces] = rendered(ChatTemplate(tokenizer_with(CHATML)), kept, None, (False, False, False, True)).sequences
    assert [(piece.text, piece.trained) for piece in pieces if piece.trained or piece.excluded] == [
        ("five<|im_end|>", False),
        ("four<|im_end|>", True),
    ]


def test_a_template_without_a_place_for_a_thought_names_it():
    assert refused(stock("llama3_1"), THINKING) == "message 2: the chat template leaves out its thought"
    # Written into the text it stays there, and is trained as the row has it.
    assert sequences(ChatTemplate(tokenizer_with(CHATML)), IN_TEXT)[0][0].startswith(
        "<think>\nAdd two twice.\n</think>"
    )
    with pytest.raises(BadRow, match="message 2 has a thought"):
        VicunaTemplate("</s>").sequences(Dialogue(tuple(THINKING)))


def test_a_response_that_speaks_of_the_tag_has_no_thought():
    said = "Close it with </think> at the end."
    assert sequences(ChatTemplate(tokenizer_with(CHATML)), talk("how", said)) == [[f"{said}<|im_end|>"]]


def test_what_is_not_trained_behind_the_prompt_of_generation_is_named():
    answers = talk("how", "fine", "and", "bye")
    assert rendered(stock("qwen3"), answers).marks == frozenset()
    assert rendered(stock("qwen3_5_think"), answers).marks == {"off prompt"}
    assert rendered(stock("deepseek_r1_distill"), talk("how", "fine")).marks == {"off prompt"}
    chat = stock("qwen3", enable_thinking=False)
    assert chat.prompt(talk("how")).endswith("assistant\n<think>\n\n</think>\n\n")
    assert rendered(chat, talk("how", "fine")).marks == frozenset()
    assert sequences(chat, talk("how", "fine")) == [["fine<|im_end|>"]]
    assert rendered(chat, THINKING[:2]).marks == {"off prompt"}


@pytest.mark.parametrize("length", range(30, 72, 3))
def test_no_end_token_behind_half_a_thought_or_half_a_call(length):
    worker = RowWorker(tokenizer_with((STOCK / "qwen3.jinja").read_text()), "messages", "chat", Data(
        path="x.jsonl", max_length=length, split_conversations=False
    ))  # fmt: skip
    thinking = [{"role": "user", "content": "2?"}, {**THINKING[1], "content": "It is four."}]
    calling = [{"role": "user", "content": "2?"}, {**call(city="Rome" * 9), "content": ""}]
    end = worker.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for messages in (thinking, calling):
        [pieces] = worker.template.sequences(Dialogue(tuple(messages))).sequences
        [encoded] = worker.encoder.encode([pieces])
        cut, lost = worker._cut(encoded, set())
        said = worker.encoder.tokenizer.decode(cut.ids[cut.trained])
        if lost and cut.trained.any():
            whole = "</think>" in said and len(said.split("</think>\n\n")[-1].removesuffix("<|im_end|>")) > 0
            assert (cut.ids[-1] == end) == (whole and messages is thinking)


# ---- Calls ----


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "gptoss", "glm4moe", "deepseekv3"])
def test_arguments_as_text_and_as_an_object_are_the_same(name):
    as_text = call(city="Rome")
    as_text["tool_calls"][0]["function"]["arguments"] = json.dumps({"city": "Rome"})
    results = [{"role": "tool", "content": "yes"}, {"role": "assistant", "content": "Yes."}]
    [object_], [text] = (
        sequences(stock(name), [*talk("Sunny?"), {**calling, "content": None}, *results], TOOLS)
        for calling in (call(city="Rome"), as_text)
    )
    assert object_ == text and '\\"' not in text[0] and "Rome" in text[0]


def test_arguments_that_are_not_json():
    calling = call()
    calling["tool_calls"][0]["function"]["arguments"] = "{city"
    assert "arguments that are not JSON" in refused(stock("qwen2_5"), [*talk("x"), {**calling, "content": ""}])


def test_the_end_of_a_call_is_trained_and_stops_generation():
    template = JinjaTemplate(stock("gptoss"))
    assert (template.end, template.end_of_call) == ("<|return|>", "<|call|>")
    result = [{"role": "tool", "content": "yes"}, {"role": "assistant", "content": "Yes."}]
    [[calling, answer]] = sequences(stock("gptoss"), [*talk("x"), {**call(city="Rome"), "content": ""}, *result], TOOLS)
    assert calling.endswith('{"city": "Rome"}<|call|>') and answer.endswith("<|return|>")


def test_several_calls_of_a_turn():
    two = {**call(city="Rome"), "content": ""}
    two["tool_calls"] = two["tool_calls"] + call(city="Oslo")["tool_calls"]
    [[said]] = sequences(stock("qwen2_5"), [*talk("x"), two], TOOLS)
    assert said.count("<tool_call>") == 2
    # GPT-OSS's template writes the first alone, and the name of the second is the same.
    assert "does not write the call" in refused(stock("gptoss"), [*talk("x"), two], TOOLS)


# ---- What is left out ----


def test_what_stands_before_a_turn_and_is_left_out_is_named():
    system = [{"role": "developer", "content": "Be a hen."}]
    assert rendered(stock("qwen3"), [*system, *talk("how", "fine")]).left_out == "message 1 (developer)"
    chat = ChatTemplate(tokenizer_with(CHATML))
    assert rendered(chat, talk("how", "fine"), TOOLS).left_out == "the tools"
    assert rendered(stock("qwen3"), talk("how", "fine"), TOOLS).left_out == ""
    words = [*talk("x"), {**call(city="Rome"), "content": "Let me look."}]
    assert refused(stock("llama3_1"), words, TOOLS) == (
        "message 2: the chat template leaves out what it says before its call"
    )
    result = [*words[:1], {**words[1], "content": ""}, {"role": "tool", "content": "yes"}, *talk("", "Yes.")[1:]]
    hiding = (STOCK / "qwen2_5.jinja").read_text().replace("{{- message.content }}", "")
    assert "does not appear" in refused(ChatTemplate(tokenizer(), hiding, "x.jinja"), result, TOOLS)


# ---- Values for the template, begin and end tokens ----


def test_values_that_the_template_never_reads_are_named():
    with pytest.raises(UserInputError, match=r"never reads enable_thinkin; it reads enable_thinking\. "):
        stock("qwen3", enable_thinkin=False)


def test_begin_and_end_tokens_are_not_doubled():
    end = NoTemplate("</s>")
    assert [end.ended(text) for text in ("a", "a</s>", "a </s>\n")] == ["a</s>", "a</s>", "a </s>"]
    rows = RowWorker(beginning(), "text", "auto", Data(path="x.jsonl", max_length=64))
    [pieces] = rows.template.sequences(Passage("", "<s>Hi</s>")).sequences
    [encoded] = rows.encoder.encode([pieces])
    assert rows.encoder.tokenizer.decode(encoded.ids) == "<s>Hi</s>"
    assert rows._spelled("<s>Hi</s>") == {"not doubled"} and rows._spelled("<s>H</s>i</s>") == {
        "not doubled",
        "special",
    }
    chat = ChatTemplate(tokenizer_with(CHATML))
    assert rendered(chat, talk("how", "fine<|im_end|>")).marks == {"doubled"}


def test_a_template_file_without_the_begin_token(tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML)
    template = make_template(str(tmp_path / "own.jinja"), "messages", beginning())
    assert template.lacks_begin == "<s>"
    (tmp_path / "own.jinja").write_text("{{ bos_token }}" + CHATML)
    assert make_template(str(tmp_path / "own.jinja"), "messages", beginning()).lacks_begin is None


def test_every_special_token_of_a_tokenizer_is_known():
    plain = tokenizer_with("{% for m in messages %}[{{ m.role }}]{{ m.content }}<turn>{% endfor %}")
    plain.add_tokens(["<turn>", "<table>"])
    found = JinjaTemplate(ChatTemplate(plain)).special
    assert found.search("a <turn>") and found.search("<|call|>") and not found.search("<table>")


# ---- A thought in two places, and one without an end ----


def a_response(said, **others):
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": said, **others}]}
    [found] = RowWorker(stock("qwen3").tokenizer, "messages", QWEN3, Data(path="-.jsonl", max_length=999))(
        [Row(1, "line 1", row)]
    )
    return found.problem, found.reason, [sequence.ids.tolist() for sequence in found.sequences]


def test_a_thought_in_a_field_and_in_the_text_is_one():
    alone = a_response("4", reasoning_content="Add.")
    assert alone[0] is None
    for said in ("<think>\nAdd.\n</think>\n\n4", "<think>Add.</think>\n4", "<think>\n\n</think>\n\n4"):
        assert a_response(said, reasoning_content="Add.") == alone
    assert a_response("<think>\nAdd.\n</think>\n\n4") == alone
    problem, reason, _ = a_response("<think>\nCount.\n</think>\n\n4", reasoning_content="Add.")
    assert (problem, reason) == ("bad", "turn 2: its thought is given twice, and differently")


def test_a_thought_without_an_answer_is_no_response():
    cut = a_response("<think>\nAdd the")
    assert cut == ("empty", "turn 2: its thought has no </think>, so it holds no response", [])
    for said, others in (("<think>\nAdd.\n</think>\n", {}), ("", {"reasoning_content": "Add."})):
        assert a_response(said, **others)[:2] == ("empty", "turn 2: the response is blank")
    assert a_response("A thought begins with <think>.")[0] is None


# ---- A chat template by itself ----

PLAIN = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo."}]}
CALLING = [
    {"from": "human", "value": "Sunny?"},
    {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Rome"}})},
    {"from": "observation", "value": "yes"},
    {"from": "gpt", "value": "Yes."},
]
THOUGHT = [CALLING[0], {"from": "thought", "value": "Look."}, CALLING[3]]
BEYOND = {
    "calls": ({"conversations": CALLING}, "qwen3", "chat"),
    "tools": ({**PLAIN, "tools": json.dumps(TOOLS)}, "qwen3", "chat"),
    "no tools": ({**PLAIN, "tools": "[]"}, "qwen3", "vicuna"),
    "nothing of the kind": (PLAIN, "qwen3", "vicuna"),
    "a thought": ({"conversations": THOUGHT}, "qwen3", "chat"),
    "a column of thoughts": ({"question": "2+2?", "complex_cot": "Add.", "response": "4"}, "qwen3", "chat"),
    "calls as text": ({"conversations": json.dumps(CALLING)}, "qwen3", "chat"),
    "a template without calls": ({"conversations": CALLING}, "llama3", "vicuna"),
    "a template without thoughts": ({"conversations": THOUGHT}, "llama3", "vicuna"),
    "no template": ({"conversations": CALLING}, None, "vicuna"),
}


@pytest.mark.parametrize(("row", "chat", "expected"), BEYOND.values(), ids=BEYOND)
def test_rows_that_only_a_chat_template_can_write_get_it(tmp_path, row, chat, expected):
    found = with_template(tokenizer(), (STOCK / f"{chat}.jinja").read_text() if chat else None)
    data = prepared(tmp_path, [row], found)
    assert data.report["sources"][0]["prompt_template"] == expected
    assert len(data.train) == (expected == "chat" or row.get("tools") == "[]" or row is PLAIN)


def test_values_for_a_chat_template_need_one(tmp_path):
    found = with_template(tokenizer(), (STOCK / "qwen3.jinja").read_text())
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    assert len(prepared(tmp_path, [{"conversations": CALLING}], found, **given).train) == 1
    for row, stated, named in (
        (PLAIN, "auto", "vicuna"),
        ({"instruction": "Hi", "output": "Yo"}, "auto", "alpaca"),
        ({"prompt": "Hi", "completion": "Yo"}, "alpaca", "none"),
    ):
        problems = prepared(tmp_path, [row], found, prompt_template=stated, **given).report["problems"]
        assert [problem.partition(". ")[0] for problem in problems] == [
            f"data.chat_template_kwargs: no rows have a chat template, they get {named}"
        ]


def with_template(made, text):
    found = copy(made)
    found.chat_template = text
    return found


def prepared(folder, rows, tokenizer, **stated):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = Data(path=str(path), max_length=4096, max_dropped_fraction=1, **stated)
    return prepare_data(tokenizer, section, refuse=False, num_proc=1)
