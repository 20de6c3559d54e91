"""What the columns, speakers and keys of a row mean, as data sets have them, and what becomes of it as an example."""

from __future__ import annotations

import json

import pytest
from data_cases import tokenizer_of
from pydantic import ValidationError

from qlora_neft.data.examples import BadRow, Dialogue, EmptyRow, Instruction
from qlora_neft.data.formats import row_reader
from qlora_neft.data.gate import Tally, find_problems
from qlora_neft.data.sources import Row
from qlora_neft.data.worker import RowWorker
from qlora_neft.errors import UserInputError
from qlora_neft.generation.requests import requests_of_file
from qlora_neft.recipe.schema import Data

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
TALK = [USER, ANSWER]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
WEATHER = {"name": "weather", "description": "weather", "parameters": {"type": "object", "properties": {}}}


def read(row, **said):
    return row_reader([row], **said).read(row)


def example_of(row, **said):
    return read(row, **said).example


def refusal(error, row, **said):
    with pytest.raises(error) as caught:
        read(row, **said)
    return str(caught.value)


def said_by(example):
    return [(message["role"], message["content"]) for message in example.messages]


# ---- Whose turns are trained ----


@pytest.mark.parametrize("no", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss_mask": 0}, {"loss": False}])
def test_a_turn_says_whether_it_is_trained(no):
    row = {"messages": [USER, ANSWER | no, USER, ANSWER | {"weight": 1}]}
    found = example_of(row)
    assert found.trained_turns == (False, False, False, True)
    assert found.messages == (USER, ANSWER, USER, ANSWER)  # the marks are not part of what is said
    shared = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"} | no] * 2}
    shared["conversations"][3] = {"from": "gpt", "value": "c", "weight": None}  # as Parquet fills it in
    assert example_of(shared).trained_turns == (False, False, False, True)


@pytest.mark.parametrize(
    ("marks", "reason"),
    [
        ({"weight": 0.5}, "turn 2: weight is float '0.5', not 0 or 1"),
        ({"weight": 2}, "turn 2: weight is int '2'"),
        ({"train": "false"}, "turn 2: train is str 'false', not true or false"),
        ({"loss_mask": [1, 0]}, "turn 2: loss_mask is list"),
        ({"weight": 1, "train": False}, "turn 2: weight and train contradict each other"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": True}]}, "train_detail marks parts of a turn"),
    ],
)
def test_marks_that_say_nothing_clear_are_named(marks, reason):
    assert reason in refusal(BadRow, {"messages": [USER, ANSWER | marks]})


def test_a_row_without_a_trained_turn_has_nothing_to_learn():
    assert "no response that is trained" in refusal(EmptyRow, {"messages": [USER, ANSWER | {"weight": 0}]})


def test_a_mark_on_another_speaker_is_pointed_out():
    assert read({"messages": [USER | {"train": True}, ANSWER]}).marks == {"marked others"}
    assert read({"messages": [USER | {"train": False}, ANSWER]}).marks == {"spared others"}


@pytest.mark.parametrize(("train_on", "marked"), [("responses", "marked others"), ("all", "spared others")])
def test_a_mark_counts_against_what_the_recipe_does(train_on, marked):
    section = Data(path="-.jsonl", max_length=256, train_on=train_on)
    worker = RowWorker(tokenizer_of("bpe", None), "messages", "vicuna", section)
    rows = [{"messages": [USER | {"train": flag}, ANSWER]} for flag in (True, False)]
    found = [outcome.marks for outcome in worker([Row(1, "", row) for row in rows])]
    assert found == [{marked} if flag == (train_on == "responses") else set() for flag in (True, False)]


REMEDIES = {
    "bad": "ix or remove them",
    "empty": "emove them",
    "unfit": "emove them",
    "only end": "emove them",
    "duplicate": "emove them",
}


@pytest.mark.parametrize(("kind", "remedy"), REMEDIES.items(), ids=REMEDIES)
@pytest.mark.parametrize(
    ("paths", "key", "where"),
    [
        ({"path": "rows.jsonl"}, "data.path", ""),
        ({"path": "owner/name"}, "data.path", " in a copy (save the dataset to a file, and name it in data.path)"),
        (
            {"path": "owner/name", "mixture": [{"path": "rows.jsonl"}]},
            "data.path",
            " (of data from the Hub, in a copy: save it to a file, and name that instead)",
        ),
        ({"path": "owner/name", "eval_path": "held.jsonl"}, "data.eval_path", ""),
        (
            {"path": "rows.jsonl", "eval_path": "owner/name"},
            "data.eval_path: 'owner/name'",
            " in a copy (save the dataset to a file, and name it in data.eval_path)",
        ),
    ],
)
def test_what_can_be_done_about_rows_depends_on_where_they_are(kind, remedy, paths, key, where):
    tally = Tally(rows=2, sequences=1, ended=1)
    for number in (1, 2):
        tally.finding(kind).add(f"row {number}")
    [problem] = find_problems(tally, Data(**paths, max_length=64), key)
    assert problem.count(remedy) == 1 and problem.partition(remedy)[2].startswith((f"{where}.", f"{where}, or"))


def test_conversations_beside_messages_are_listed():
    both = read({"messages": TALK, "conversations": TALK})
    assert both.columns_not_read == {"conversations"}
    assert not read({"messages": TALK, "conversations": None}).columns_not_read
    assert not read({"messages": None, "conversations": TALK}, format="messages").columns_not_read


def test_turns_that_are_stored_field_by_field_are_read():
    """As `datasets` stores a sequence of objects, in Parquet too."""
    fields = {"role": ["user", "assistant"], "content": ["Hi", "Hello."], "name": None}
    assert example_of({"messages": fields}) == example_of({"messages": TALK})
    shared = {"from": ["human", "gpt"], "value": ["Hi", "Hello."]}
    assert said_by(example_of({"conversations": shared})) == [("user", "Hi"), ("assistant", "Hello.")]
    for bad in ({"role": ["user"], "content": ["Hi", "Hello."]}, {"role": "user"}, {"role": None}):
        assert "messages is dict" in refusal(BadRow, {"messages": bad})


# ---- Columns ----


SHAPES = {
    "dolly": ({"instruction": "Hi", "context": "you", "response": "Yo", "id": ""}, Instruction("Hi", "you", "Yo")),
    "gsm8k": ({"question": "Hi", "answer": "Yo"}, Instruction("Hi", "", "Yo")),
    "metamath": ({"query": "Hi", "response": "Yo", "type": "t"}, Instruction("Hi", "", "Yo")),
    "numina": ({"problem": "Hi", "solution": "Yo"}, Instruction("Hi", "", "Yo")),
    "magicoder": ({"instruction": "Hi", "response": "Yo"}, Instruction("Hi", "", "Yo")),
    "prompt and response": ({"prompt": "Hi", "response": "Yo"}, Instruction("Hi", "", "Yo")),
    "flan": ({"inputs": "Hi", "targets": "Yo"}, Instruction("Hi", "", "Yo")),
    "capitals": ({"Question": "Hi", "Answer": "Yo"}, Instruction("Hi", "", "Yo")),
    "spaces": ({" instruction": "Hi", "output ": "Yo"}, Instruction("Hi", "", "Yo")),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), SHAPES.values(), ids=SHAPES)
def test_the_columns_of_published_data_sets_are_known(row, expected):
    assert example_of(row) == expected


def test_openorcas_system_prompt_is_said():
    row = {"id": "1", "system_prompt": "Be a hen.", "question": "Hi", "response": "Cluck."}
    found = read(row)
    assert said_by(found.example) == [("system", "Be a hen."), ("user", "Hi"), ("assistant", "Cluck.")]
    assert found.columns_not_read == {"id"}
    assert example_of({**row, "system_prompt": ""}) == Instruction("Hi", "", "Cluck.")


def test_llama_factorys_history_and_system_are_said():
    row = {"instruction": "And", "input": "now?", "output": "Eight.", "system": "Hen.", "history": [["2?", "Four."]]}
    reader = row_reader([row])
    found = reader.read(row).example
    assert said_by(found) == [
        ("system", "Hen."), ("user", "2?"), ("assistant", "Four."), ("user", "And\nnow?"), ("assistant", "Eight."),
    ]  # fmt: skip
    assert found.trained is None  # LLaMA-Factory trains the history's responses too
    assert example_of({**row, "history": json.dumps(row["history"])}) == found  # a cell of a CSV file
    # Alpaca's own prompt has no place for it.
    assert (reader.template("auto"), reader.template("alpaca")) == ("vicuna", "alpaca")
    assert "not a list of pairs" in refusal(BadRow, {**row, "history": ["2?"]})


def test_a_thought_in_a_column_is_a_thought():
    found = example_of({"Question": "2+2?", "Complex_CoT": "Twice two.", "Response": "4"})
    assert found.messages[-1] == {"role": "assistant", "content": "4", "reasoning_content": "Twice two."}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "Hi", "completion": "Hello."},
        {"instruction": "Hi", "output": "Hello."},
    ],
)
def test_a_system_message_beside_the_conversation_counts(row, column):
    assert said_by(example_of({**row, column: "Hen."}))[0] == ("system", "Hen.")
    assert said_by(example_of(row, system_prompt="Fox."))[0] == ("system", "Fox.")
    assert said_by(example_of({**row, column: "Hen."}, system_prompt="Fox."))[0] == ("system", "Hen.")


def test_two_system_messages_contradict_each_other():
    talk = [{"role": "system", "content": "Hen."}, *TALK]
    assert len(example_of({"messages": talk, "system": "Hen. "}).messages) == 3
    row = {"messages": talk, "system": "Fox."}
    assert "data.columns={system: null} leaves the column out" in refusal(BadRow, row)
    assert example_of(row, columns={"system": None}).messages[0]["content"] == "Hen."


def test_the_users_columns_are_what_they_say():
    row = {"ask": {"text": "Hi"}, "replies": [{"body": "No"}, {"body": "Yo"}], "a.b": "there", "id": 3}
    columns = {"ask.text": "instruction", "replies.1.body": "output", "a.b": "input", "id": None}
    found = read(row, columns=columns)
    assert (found.example, found.columns_not_read) == (Instruction("Hi", "there", "Yo"), frozenset())
    # One named by the user, the other by its shape; and one that would be read otherwise.
    assert example_of({"question": "Hi", "reply": "Yo"}, columns={"question": "instruction", "reply": "output"})
    swapped = {"instruction": "Yo", "output": "Hi"}
    assert example_of(swapped, columns={"instruction": "output", "output": "instruction"}) == Instruction(
        "Hi", "", "Yo"
    )
    assert example_of({"dialog": TALK}, columns={"dialog": "messages"}).messages == tuple(TALK)
    message = refusal(UserInputError, row, columns={"asks": "instruction"})
    assert message == "data.columns: 'asks' is no column of data.path, which has a.b, ask, id, replies."


@pytest.mark.parametrize(
    ("stated", "fragment"),
    [
        ({"columns": {"question": "instructions"}}, "got question: instructions. Did you mean instruction?"),
        ({"columns": {"instruction": "question"}}, "Did you mean question: instruction?"),
        ({"columns": {"a": "output", "b": "output"}}, "two columns are output"),
        ({"roles": {"bot": "gpt"}}, "a speaker is one of system, developer, user"),
    ],
)
def test_columns_and_roles_that_nothing_is_are_refused_with_the_recipe(stated, fragment):
    with pytest.raises(ValidationError, match="") as caught:
        Data(path="rows.jsonl", max_length=64, **stated)
    assert fragment in str(caught.value)


def test_what_nobody_reads_is_told_and_empty_columns_are_not():
    row = {"messages": [USER | {"id": "a"}, ANSWER | {"id": "b", "ts": None}], "id": 1, "note": "", "tags": []}
    found = read(row)
    assert (found.columns_not_read, found.extra_keys) == ({"id"}, {"id"})


# ---- Who speaks, and what ----


def test_speakers_have_the_users_names():
    row = {"messages": [{"role": "customer", "content": "Hi"}, {"role": "Assistant", "content": "Hello."}]}
    assert "data.roles says what others mean" in refusal(BadRow, row)
    assert example_of(row, roles={"customer": "user"}).messages == tuple(TALK)


@pytest.mark.parametrize("as_text", [False, True])
def test_messages_may_be_text(as_text):
    row = {"messages": json.dumps(TALK) if as_text else TALK}
    assert example_of(row).messages == tuple(TALK)


def test_text_that_pandas_wrote_is_told_apart():
    assert "Python's spelling of a list" in refusal(BadRow, {"messages": str(TALK)})


def test_sharegpts_calls_are_calls():
    turns = [("human", "Sunny?"), ("gpt", "Let me look."), ("function_call", json.dumps(CALL["function"])),
             ("observation", "yes"), ("gpt", "Yes.")]  # fmt: skip
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": json.dumps([WEATHER])}
    found = example_of(row)
    assert found.messages == (
        {"role": "user", "content": "Sunny?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "Yes."},
    )
    assert found.tools == ({"type": "function", "function": WEATHER},)
    row["conversations"][1:3] = [{"from": "function_call", "value": json.dumps([CALL["function"]] * 2)}]
    assert example_of(row).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL] * 2}


@pytest.mark.parametrize(
    "turns",
    [
        [ANSWER | {"reasoning_content": "Hm."}],
        [ANSWER | {"thinking": "Hm.", "reasoning": None}],
        [ANSWER | {"reasoning": "Hm."}],
        [
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello."}],
            }
        ],
        [{"from": "gpt", "value": "Hello.", "reasoning": "Hm."}],
        [{"from": "thought", "value": "Hm."}, {"from": "gpt", "value": "Hello."}],
    ],
)
def test_a_thought_has_one_name(turns):
    messages = example_of({"messages": [USER, *turns]}).messages
    assert messages == (USER, {**ANSWER, "reasoning_content": "Hm."})


def test_thoughts_that_differ_or_lead_nowhere_are_named():
    twice = {"messages": [USER, ANSWER | {"reasoning": "Hm.", "thinking": "Oh."}]}
    assert "its thought is given twice" in refusal(BadRow, twice)
    assert "no response after it" in refusal(BadRow, {"messages": [*TALK, {"role": "thought", "content": "Hm."}]})


# ---- Calls ----


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}, "type": None}],
        [{"name": "weather", "arguments": {"city": "Rome", "hour": None}}],
        json.dumps([CALL]),
        CALL,
    ],
)
def test_a_call_is_one_object_however_it_is_written(calls):
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}]}
    assert example_of(row).messages[1]["tool_calls"] == [CALL]


def test_openais_older_calls_are_calls():
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    turns = [USER, {"role": "assistant", "content": None, "function_call": call}]
    turns += [{"role": "function", "name": "weather", "content": "yes"}, ANSWER]
    found = example_of({"messages": turns, "functions": [WEATHER]})
    assert found.messages[1]["tool_calls"] == [CALL]
    assert found.messages[2] == {"role": "tool", "content": "yes", "name": "weather"}
    assert found.tools == ({"type": "function", "function": WEATHER},)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            {"name": "weather", "arguments": "{city: Rome}"},
            "turn 2: the arguments of weather are text that is not JSON",
        ),
        (
            {"name": "weather", "arguments": '"Rome"'},
            "turn 2: the arguments of weather are str 'Rome', not a JSON object",
        ),
        ({"arguments": "{}"}, "turn 2: the call has no name"),
        (7, "turn 2: the call is int '7'"),
    ],
)
def test_calls_that_are_none_are_named(call, reason):
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert reason in refusal(BadRow, row)


def test_arguments_stand_in_the_order_their_function_requires():
    schema = {"type": "object", "properties": {"day": {}, "city": {}, "hour": {}}, "required": ["hour", "city"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    call = {"name": "f", "arguments": {"day": 1.0, "city": "Rome", "hour": 6}}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": tools}
    found = example_of(row)
    arguments = found.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert json.dumps(arguments) == '{"hour": 6, "city": "Rome", "day": 1}'
    assert list(found.tools[0]["function"]["parameters"]["properties"]) == ["hour", "city", "day"]
    assert isinstance(found, Dialogue)


# ---- Asked, not trained ----


def test_rows_are_asked_as_they_are_trained(tmp_path):
    rows = [
        {"instruction": "And now?", "output": "Eight.", "system": "Hen.", "history": [["2?", "Four."]]},
        {"messages": json.dumps([USER, ANSWER | {"weight": 0}])},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(CALL)}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, *others = requests_of_file(str(tmp_path / "rows.jsonl"))
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant", "user"]
    assert [request.messages for request in others] == [(USER,), (USER,)]
