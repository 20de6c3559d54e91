"""What a row means, the text around it, its tokens and labels: formats, templates, encoding, turns."""

from __future__ import annotations

import numpy as np
import pytest
from data_cases import tokenizer_of
from tiny import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qlora_neft.data.cut import cut_to_length
from qlora_neft.data.encode import Encoded, Encoder, joins_cleanly
from qlora_neft.data.examples import BadRow, Dialogue, EmptyRow, Instruction, Passage, Piece, content_hash
from qlora_neft.data.formats import row_reader, to_example
from qlora_neft.data.templates import (
    ALPACA_ENDINGS,
    AlpacaTemplate,
    NoTemplate,
    VicunaTemplate,
    alpaca_prompt,
    make_template,
    resolve_template,
)
from qlora_neft.data.turns import split_dialogue
from qlora_neft.errors import UserInputError
from qlora_neft.recipe.data import ALPACA_TEMPLATES

ALPACA = {"instruction": "Say 1", "input": "", "output": "1"}


def refusal(error, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def dialogue(*texts, system=None):
    """User and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Dialogue((*([{"role": "system", "content": system}] if system else []), *turns))


def shared(*pairs):
    return {"conversations": [{"from": who, "value": text} for who, text in pairs]}


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def trained_text(pieces):
    return [piece.text for piece in pieces if piece.trained]


# ---- Formats ----


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"output": "a", "instruction": "b", "extra": 1}, "alpaca"),
        ({"completion": "a", "prompt": "b"}, "prompt-completion"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        (shared(("human", "a")), "sharegpt"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "messages"),
        ({"text": "a"}, "text"),
    ],
)
def test_format_is_found_by_the_columns(row, format):
    assert row_reader([row]).format == format


def test_columns_that_fit_no_format_are_named_with_what_would_fit():
    message = refusal(UserInputError, row_reader, [{"verse": "a", "rhyme": "b"}])
    assert message.startswith("data.path: the columns rhyme, verse fit no format")
    assert "alpaca needs instruction and output; prompt-completion needs prompt and completion" in message
    # Good advice whatever the source is: columns of a dataset on the Hub cannot be renamed.
    assert message.endswith("Say what they are with data.columns={YOUR_COLUMN: instruction, YOUR_COLUMN: output}.")
    assert "(none)" in refusal(UserInputError, row_reader, [{}])


def test_a_format_that_the_columns_do_not_have_is_refused():
    message = refusal(UserInputError, row_reader, [ALPACA], "prompt-completion")
    assert message.startswith("data.format: prompt-completion needs the columns prompt and completion")


@pytest.mark.parametrize("row", [{"input": ""}, {"input": None}, {}], ids=["empty", "null", "missing"])
def test_no_input_is_no_input_however_it_is_written(row):
    example, _ = to_example({"instruction": "Go", "output": "ok", **row}, "alpaca")
    assert example == Instruction("Go", "", "ok")


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"instruction": "a", "output": None}, "alpaca", "output is missing"),
        ({"instruction": "a"}, "alpaca", "output is missing"),
        ({"instruction": "a", "output": 7}, "alpaca", "output is int '7'"),
        ({"instruction": ["a"], "output": "b"}, "alpaca", "instruction is list"),
        ({"instruction": "a", "output": "b", "input": {"c": 1}}, "alpaca", "input is dict"),
        ({"instruction": "a", "output": "half \ud800"}, "alpaca", "half of a surrogate pair"),
        ({"prompt": 1, "completion": "b"}, "prompt-completion", "prompt is int '1'"),
        ({"text": 2.5}, "text", "text is float '2.5'"),
        ({"messages": "hello"}, "messages", "messages is str 'hello', not a list of turns"),
        ({"messages": ["hello"]}, "messages", "messages, turn 1, is str 'hello'"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages", "turn 1: role is str 'bot', not one of"),
        ({"messages": [{"role": "user"}]}, "messages", "turn 1: content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "parts that are not text"),
        (shared(("human", "a"), ("alien", "b")), "sharegpt", "turn 2: from is str 'alien', not one of"),
        (shared(("human", 3)), "sharegpt", "turn 1: value is int '3'"),
        ({**shared(("human", "a"), ("gpt", "b")), "tools": "{"}, "sharegpt", "tools is text that is not JSON"),
    ],
)
def test_what_is_not_the_format_is_said(row, format, reason):
    message = refusal(BadRow, to_example, row, format)
    assert reason in message


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"instruction": "a", "output": " \n"}, "alpaca", "output is blank"),
        ({"instruction": " ", "output": "b"}, "alpaca", "instruction and input are blank"),
        ({"prompt": "a", "completion": ""}, "prompt-completion", "completion is blank"),
        ({"text": ""}, "text", "text is blank"),
        ({"conversations": []}, "sharegpt", "has no turns"),
        (shared(("human", "a")), "sharegpt", "has no response"),
        (shared(("gpt", "a")), "sharegpt", "has no response"),
        (shared(("human", "a"), ("gpt", " ")), "sharegpt", "turn 2: the response is blank"),
    ],
)
def test_rows_with_nothing_to_learn_are_told_apart(row, format, reason):
    with pytest.raises(EmptyRow) as caught:
        to_example(row, format)
    assert reason in str(caught.value)


def test_turns_that_train_nothing_are_left_out_and_counted():
    row = shared(("gpt", "hi"), ("human", "a"), ("gpt", "b"), ("human", "bye"))
    example, left_out = to_example(row, "sharegpt")
    assert (example, left_out) == (dialogue("a", "b"), 2)


def test_speakers_have_many_names_and_one_meaning():
    names = [("system", "s"), ("user", "a"), ("chatgpt", "b"), ("human", "c"), ("bing", "d")]
    example, _ = to_example(shared(*names), "sharegpt")
    assert example == dialogue("a", "b", "c", "d", system="s")


def test_messages_keep_tools_calls_and_text_parts_and_lose_nulls():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_calls": None},
            {"role": "assistant", "content": "done"},
        ],
        "tools": '[{"type": "function"}]',
    }
    example, left_out = to_example(row, "messages")
    assert example.messages == (
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "done"},
    )
    assert (example.tools, left_out) == (({"type": "function"},), 0)


def test_prompts_and_completions_may_be_messages():
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    assert to_example(row, "prompt-completion")[0] == dialogue("a", "b")
    # TRL trains none of a prompt's responses.
    row = {**row, "prompt": [*row["prompt"], {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]}
    example, _ = to_example(row, "prompt-completion")
    assert example.messages == dialogue("a", "c", "d", "b").messages
    assert example.trained_turns == (False, False, False, True)


def test_the_hash_is_of_what_a_row_says():
    same = [
        content_hash(to_example({**ALPACA, "input": value, "id": n}, "alpaca")[0]) for n, value in enumerate(("", None))
    ]
    assert same[0] == same[1]
    assert content_hash(Instruction("a", "b", "c")) != content_hash(Instruction("ab", "", "c"))
    assert content_hash(dialogue("a", "b")) != content_hash(dialogue("a", "b", system="s"))


# ---- Templates ----


def test_alpacas_prompt_is_stanfords_to_the_letter():
    # https://github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert alpaca_prompt("Add.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:"
    )


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        # https://github.com/neelsjain/NEFTune, conversation.py: roles "### Instruction:" and "### Response:", each
        # followed by a line break (SeparatorStyle.ADD_NEW_LINE_SINGLE); its dataset.py trains on Stanford's.
        ("alpaca-newline", "### Response:\n"),
        # https://github.com/artidoro/qlora, qlora.py, ALPACA_PROMPT_DICT
        ("alpaca-space", "### Response: "),
    ],
)
def test_other_endings_of_alpacas_prompt_are_their_authors_to_the_letter(name, ending):
    template = make_template(name, "alpaca", byte_tokenizer())
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\nAdd.\n\n{ending}"
    )
    assert template.prompt([{"role": "user", "content": "Add."}]) == alpaca_prompt("Add.", name=name) == without
    pieces = template.render(Instruction("Add.", "1 2", "3"))
    assert text_of(pieces) == alpaca_prompt("Add.", "1 2").removesuffix("### Response:") + ending + f"3{template.end}"
    assert resolve_template(name, "prompt-completion") == resolve_template("alpaca", "prompt-completion") == "none"


def test_a_recipe_may_name_every_ending():
    assert tuple(ALPACA_ENDINGS) == ALPACA_TEMPLATES


def test_alpacas_response_follows_at_once_and_ends_with_the_end_token():
    pieces = AlpacaTemplate("</s>").render(Instruction("Add.", "", "3"))
    assert text_of(pieces) == alpaca_prompt("Add.") + "3</s>"
    assert trained_text(pieces) == ["3</s>"]


def test_braces_in_a_text_are_text():
    pieces = AlpacaTemplate("</s>").render(Instruction("{input} {0} {", "{instruction}", "}"))
    assert "### Instruction:\n{input} {0} {\n" in text_of(pieces)
    assert "### Input:\n{instruction}\n" in text_of(pieces)


def test_a_single_exchange_fits_alpacas_prompt_and_a_conversation_does_not():
    template = AlpacaTemplate("</s>")
    assert template.render(dialogue("Add.", "3")) == template.render(Instruction("Add.", "", "3"))
    message = refusal(BadRow, template.render, dialogue("a", "b", "c", "d", "e", "f"))
    assert "(user, assistant, user, assistant, ...)" in message
    assert "set data.prompt_template: vicuna or chat" in message


def test_vicunas_text_is_fastchats_to_the_letter():
    # https://github.com/lm-sys/FastChat, fastchat/conversation.py, vicuna_v1.1 (SeparatorStyle.ADD_COLON_TWO)
    pieces = VicunaTemplate("</s>").render(dialogue("Hello!", "Hi!", "How are you?", "Good."))
    assert text_of(pieces) == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT: Good.</s>"
    )
    assert trained_text(pieces) == [" Hi!</s>", " Good.</s>"]


def test_generation_begins_where_vicunas_training_had_the_response():
    template = VicunaTemplate("</s>")
    pieces = template.render(dialogue("a", "b", "c", "d"))
    assert template.prompt(dialogue("a", "b", "c").messages) == text_of(pieces[:-1])
    assert template.prompt(dialogue("a").messages) == pieces[0].text


def test_a_system_message_replaces_vicunas():
    pieces = VicunaTemplate("</s>").render(dialogue("a", "b", system="Be brief."))
    assert text_of(pieces) == "Be brief. USER: a ASSISTANT: b</s>"


def test_vicunas_turns_alternate():
    twice = Dialogue(({"role": "user", "content": "a"},) * 2 + ({"role": "assistant", "content": "b"},))
    assert "turn 2 is user" in refusal(BadRow, VicunaTemplate("</s>").render, twice)


@pytest.mark.parametrize(
    ("name", "format", "kind"),
    [
        ("auto", "alpaca", AlpacaTemplate),
        ("auto", "sharegpt", VicunaTemplate),
        ("auto", "prompt-completion", NoTemplate),
        ("auto", "text", NoTemplate),
        ("alpaca", "prompt-completion", NoTemplate),
        ("vicuna", "prompt-completion", VicunaTemplate),
        ("vicuna", "alpaca", VicunaTemplate),
        ("vicuna", "text", NoTemplate),
    ],
)
def test_which_template_a_format_has(name, format, kind):
    assert isinstance(make_template(name, format, byte_tokenizer()), kind)


def test_text_that_comes_ready_stays_as_it_is():
    assert NoTemplate("</s>").render(Passage("a ", " b")) == [Piece("a ", False), Piece(" b</s>", True)]
    assert NoTemplate("</s>").render(Passage("", "b")) == [Piece("b</s>", True)]
    assert "needs a template" in refusal(BadRow, NoTemplate("</s>").render, dialogue("a", "b"))


def test_an_instruction_with_input_is_one_request_elsewhere():
    pieces = VicunaTemplate("</s>").render(Instruction("Add.", "1 2", "3"))
    assert "USER: Add.\n1 2 ASSISTANT:" in text_of(pieces)


def test_a_template_file_that_is_not_there_is_refused():
    message = refusal(UserInputError, make_template, "no.jinja", "messages", byte_tokenizer())
    assert message.startswith("data.prompt_template: 'no.jinja' cannot be read (No such file or directory).")


# ---- Tokens and labels ----


def with_special_tokens(template):
    """The byte tokenizer, adding special tokens as a template says (ids 257 begin, 258 end)."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 257), ("</s>", 258)]
    )
    return tokenizer


def merging_tokenizer(trims_offsets=False):
    """Byte-level BPE with a token ":=" and a token " b": both can reach across the beginning of a response."""
    from tokenizers import pre_tokenizers
    from tokenizers.processors import ByteLevel

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, ":=", "Ġb", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "="), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trims_offsets:
        tokenizer.post_processor = ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def sentencepiece_like():
    """A tokenizer that puts a space in front of every text, as Llama 2's does."""
    words = ["▁", "▁a", "▁b", "a", "b", ":", "=", "▁:", ":=", "<unk>", "</s>"]
    merges = [("▁", "a"), ("▁", "b"), ("▁", ":"), (":", "=")]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def encode(tokenizer, *pieces, adds_special_tokens=True):
    [encoded] = Encoder(tokenizer, adds_special_tokens=adds_special_tokens).encode(
        [[Piece(*piece) for piece in pieces]]
    )
    return encoded


def parts(tokenizer, encoded):
    """The untrained and the trained text."""
    return tokenizer.decode(encoded.ids[~encoded.trained]), tokenizer.decode(encoded.ids[encoded.trained])


def test_prompt_is_masked_and_response_and_end_are_trained():
    encoded = encode(byte_tokenizer(), ("abc", False), ("de</s>", True))
    assert parts(byte_tokenizer(), encoded) == ("abc", "de</s>")
    assert encoded.labels().tolist() == [-100] * 3 + encoded.ids[3:].tolist()
    assert encoded.num_trained() == 3


@pytest.mark.parametrize(
    ("template", "begins"), [("$A", False), ("<s> $A", True), ("$A </s>", False), ("<s> $A </s>", True)]
)
def test_one_end_token_stands_at_the_end_whatever_the_tokenizer_adds(template, begins):
    tokenizer = with_special_tokens(template)
    encoded = encode(tokenizer, ("ab", False), ("cd</s>", True))
    assert tokenizer.decode(encoded.ids) == "<s>" * begins + "abcd</s>"
    assert (~encoded.trained).sum() == 2 + begins


def test_a_chat_template_writes_its_own_begin_token():
    encoded = encode(with_special_tokens("<s> $A </s>"), ("<s>ab", False), ("cd</s>", True), adds_special_tokens=False)
    assert encoded.ids[0] == 257 and encoded.ids[1] != 257 and len(encoded.ids) == 6


@pytest.mark.parametrize("trims_offsets", [False, True])
@pytest.mark.parametrize(("prompt", "response"), [("a:", "=a"), ("a ", "b")], ids=["merge", "leading space"])
def test_a_token_across_the_beginning_of_a_response_is_cut_there(prompt, response, trims_offsets):
    tokenizer = merging_tokenizer(trims_offsets)
    whole = tokenizer(prompt + response)["input_ids"]
    assert len(whole) < len(tokenizer(prompt)["input_ids"]) + len(tokenizer(response)["input_ids"])
    encoded = encode(tokenizer, (prompt, False), (response + "</s>", True))
    assert encoded.crossed == "cut apart"
    # What generation will be given is what training had.
    assert encoded.ids[~encoded.trained].tolist() == tokenizer(prompt)["input_ids"]
    assert parts(tokenizer, encoded) == (prompt, response + "</s>")


def test_a_space_that_belongs_to_the_response_is_not_cut():
    tokenizer = merging_tokenizer(trims_offsets=True)
    encoded = encode(tokenizer, ("a:", False), (" b</s>", True))
    assert encoded.crossed is None
    assert parts(tokenizer, encoded) == ("a:", " b</s>")


def test_sentencepiece_text_is_tokenized_whole_as_neftunes_code_does():
    tokenizer = sentencepiece_like()
    assert not joins_cleanly(tokenizer) and joins_cleanly(byte_tokenizer())
    encoded = encode(tokenizer, ("a:", False), ("b</s>", True))
    assert encoded.ids.tolist() == tokenizer("a:b</s>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(encoded.ids[encoded.trained].tolist()) == ["b", "</s>"]


def test_sentencepiece_text_is_cut_without_a_space_between_its_parts():
    tokenizer = sentencepiece_like()
    encoded = encode(tokenizer, ("a:", False), ("=b</s>", True))
    assert tokenizer.convert_ids_to_tokens(encoded.ids.tolist()) == ["▁a", ":", "=", "b", "</s>"]
    assert encoded.trained.tolist() == [False, False, True, True, True]
    assert encoded.crossed == "cut apart"


# Prompt and response, the response's tokens, and whether a space that ends the prompt became the response's.
SPACED = [
    ("a: ", "b", ["▁b"], True),  # one letter, and the token that holds it begins in the prompt
    ("a:", " b", ["▁b"], False),
    ("a:  ", "b", ["▁", "▁b"], True),
    ("a: ", "é", ["▁", "<0xC3>", "<0xA9>"], True),  # spelled in bytes, behind a token that is the space alone
    ("a:", "b", ["b"], False),
    ("a", "b", ["b"], False),
    ("  ", "b", ["▁", "▁", "▁b"], True),
]


@pytest.mark.parametrize(("prompt", "response", "trained", "moved"), SPACED)
@pytest.mark.parametrize("is_slow", [False, True], ids=["offsets", "no offsets"])
def test_a_space_that_ends_the_prompt_is_trained_and_not_part_of_generations_prompt(
    prompt, response, trained, moved, is_slow
):
    tokenizer = tokenizer_of("sentencepiece", None)
    encoder = Encoder(without_offsets(tokenizer) if is_slow else tokenizer, adds_special_tokens=True)
    [encoded] = encoder.encode([[Piece(prompt, False), Piece(f"{response}</s>", True)]])
    assert tokenizer.convert_ids_to_tokens(encoded.ids[encoded.trained].tolist()) == [*trained, "</s>"]
    assert encoded.crossed == ("space" if moved else None)
    if prompt.strip():  # what generation is given is what stands before the response in training
        assert encoder.prompt_ids([Piece(prompt, False)]) == encoded.ids[~encoded.trained].tolist()


def test_an_earlier_response_keeps_its_spaces_when_the_next_takes_those_before_it():
    tokenizer = tokenizer_of("sentencepiece", None)
    pieces = [Piece("a: ", False), Piece("b ", True), Piece(" ", False), Piece("b</s>", True)]
    [encoded] = Encoder(tokenizer, adds_special_tokens=False).encode([pieces])
    assert tokenizer.decode(encoded.ids[~encoded.trained]) == " a:"


def test_every_response_of_a_conversation_is_trained_with_its_end():
    tokenizer = with_special_tokens("<s> $A")
    pieces = VicunaTemplate("</s>").render(dialogue("ab", "cd", "ef", "gh"))
    [encoded] = Encoder(tokenizer, adds_special_tokens=True).encode([pieces])
    assert tokenizer.decode(encoded.ids[encoded.trained]) == " cd</s> gh</s>"


def test_a_tokenizer_without_offsets_tokenizes_piece_by_piece():
    fast = with_special_tokens("<s> $A </s>")
    slow = without_offsets(fast)
    pieces = (("ab", False), ("cd</s>", True))
    assert encode(slow, *pieces).ids.tolist() == encode(fast, *pieces).ids.tolist()
    assert encode(slow, *pieces).trained.tolist() == encode(fast, *pieces).trained.tolist()


def without_offsets(fast):
    """A tokenizer as the slow ones of transformers are."""

    class Slow:
        is_fast, eos_token, eos_token_id = False, fast.eos_token, fast.eos_token_id
        bos_token, bos_token_id = fast.bos_token, fast.bos_token_id
        decode = staticmethod(fast.decode)

        def __call__(self, text, add_special_tokens=True, **_):
            return {"input_ids": fast(text, add_special_tokens=add_special_tokens)["input_ids"]}

    return Slow()


# ---- Cutting and splitting ----


def sequence(pattern):
    """``p`` for prompt, ``r`` for response, ``e`` for its end token (258)."""
    ids = np.array([258 if letter == "e" else 65 + i for i, letter in enumerate(pattern)], dtype=np.int32)
    return Encoded(ids, np.array([letter != "p" for letter in pattern]))


@pytest.mark.parametrize(
    ("pattern", "keep_end_token", "expected", "lost"),
    [
        ("ppprre", True, "ppprre", False),
        ("ppprrrrrre", True, "ppprrrre", True),
        ("ppprrrrrre", False, "ppprrrrr", True),
        ("ppppppre", True, "ppppppre", False),
        ("pppppppre", True, "", True),  # one place, and it would be the end token's: nothing of the response
        ("pppppppre", False, "pppppppr", True),
        ("pppppppprre", True, "", True),
        ("pprepppprre", True, "ppre", True),  # nothing of a request whose response is cut away
        ("pprepprrre", True, "ppreppre", True),
        ("ppprreppp", True, "ppprrepp", False),  # what follows the last response trains nothing
    ],
)
def test_cutting_keeps_the_end_and_loses_nothing_in_silence(pattern, keep_end_token, expected, lost):
    cut, was_lost = cut_to_length(sequence(pattern), 8, keep_end_token=keep_end_token)
    shown = "".join("e" if i == 258 else "r" if t else "p" for i, t in zip(cut.ids, cut.trained, strict=True))
    assert (shown, was_lost) == (expected, lost)
    assert len(cut.ids) <= 8


def measure(piece):
    return sum(len(message["content"]) for message in piece.messages)


def test_conversations_are_split_on_turn_boundaries_into_what_fits():
    long = dialogue("aaa", "bbb", "cc", "dd", "eeeee", "fffff", "g", "h", system="ss")
    pieces = split_dialogue(long, 12, measure)
    assert [[m["content"] for m in piece.messages] for piece in pieces] == [
        ["ss", "aaa", "bbb", "cc", "dd"],
        ["ss", "eeeee", "fffff"],
        ["ss", "g", "h"],
    ]


def test_an_exchange_that_fits_nowhere_is_a_piece_of_its_own():
    pieces = split_dialogue(dialogue("a", "b", "c" * 50, "d", "e", "f"), 12, measure)
    assert [len(piece.messages) for piece in pieces] == [2, 2, 2]


def test_a_tools_result_stays_with_its_call():
    messages = [
        {"role": "user", "content": "a" * 9},
        {"role": "assistant", "content": "", "tool_calls": [{}]},
        {"role": "tool", "content": "b" * 9},
        {"role": "assistant", "content": "c" * 9},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    pieces = split_dialogue(Dialogue(tuple(messages)), 12, measure)
    assert [len(piece.messages) for piece in pieces] == [4, 2]
