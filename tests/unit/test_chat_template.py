"""Conversations as chat templates write them, and exactly which characters of that are trained."""

from __future__ import annotations

import pickle
import random
from itertools import pairwise

import pytest
from tiny import byte_tokenizer

from qlora_neft.data.chat_template import ChatTemplate
from qlora_neft.data.encode import Encoder
from qlora_neft.data.examples import BadRow, Dialogue
from qlora_neft.errors import UserInputError

# Small templates, each with a habit that templates in use have.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
RENAMING = (
    "{{ bos_token }}{% for m in messages %}{{ raise_exception('no system here') if m.role == 'system' }}"
    "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
BRACKETS_OPENED_EACH_TIME = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' }}"
    "\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening }}{% endif %}"
)
# The prompt opens a block of thought that turns gone by do not have.
OPENED_THINKING = THINKING.replace("{{ opening }}", "<think>\n")
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<result>{{ m.content }}</result><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{{ '\n' if m.content or not loop.first }}<call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS_END_APART = WITH_TOOLS.replace(
    "</call>{% endfor %}<|im_end|>\n", "</call>{% endfor %}{{ '<|call|>' if m.tool_calls else '<|im_end|>\n' }}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ 'User' if m.role == 'user' else 'Bot' }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Bot:{% endif %}"
)
END_ONLY_LAST = WITHOUT_END.replace(
    "\n{% endfor %}", "{{ eos_token if loop.last and m.role != 'user' else '\n' }}{% endfor %}"
)
TWO_ENDS = CHATML.replace("<|im_end|>\n{% endfor %}", "{{ '<|return|>' if loop.last else '<|im_end|>' }}{% endfor %}")

# Each with what ends its responses.
PLAIN = {
    "chatml": (CHATML, "<|im_end|>"),
    "default system": (WITH_DEFAULT_SYSTEM, "<|im_end|>"),
    "trimming": (TRIMMING, "<|eot|>"),
    "renaming": (RENAMING, "<|eot|>"),
    "brackets": (BRACKETS, "</s>"),
    "brackets opened each time": (BRACKETS_OPENED_EACH_TIME, "</s>"),
    "thinking": (THINKING, "<|im_end|>"),
    "opened thinking": (OPENED_THINKING, "<|im_end|>"),
    "tools": (WITH_TOOLS, "<|im_end|>"),
    "marked": (MARKED, "<|im_end|>"),
}
SPECIAL = "<|im_start|> <|im_end|> <|head|> <|/head|> <|eot|> <|turn|> <|call|> <|return|>".split()


def tokenizer_with(template=None):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents, system=None):
    """Messages of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def call(name="weather", **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def trained(template, messages, tools=None):
    """What is trained, after checking all that holds for any template."""
    tokenizer = tokenizer_with(template)
    chat = ChatTemplate(tokenizer)
    pieces = chat.render(messages, tools)
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text for piece in pieces)
    assert all(a.trained != b.trained for a, b in pairwise(pieces))
    return [piece.text for piece in pieces if piece.trained]


def reason(template, messages, tools=None):
    with pytest.raises(BadRow) as caught:
        ChatTemplate(tokenizer_with(template)).sequences(Dialogue(tuple(messages), tools))
    return str(caught.value)


def refusal(*args, **kwargs):
    with pytest.raises(UserInputError) as caught:
        ChatTemplate(*args, **kwargs)
    return str(caught.value)


# ---- What is trained ----


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["fine<|im_end|>", "bye<|im_end|>"]),
        (WITH_DEFAULT_SYSTEM, ["fine<|im_end|>", "bye<|im_end|>"]),
        (TRIMMING, ["fine<|eot|>", "bye<|eot|>"]),
        (RENAMING, ["fine<|eot|>", "bye<|eot|>"]),
        (BRACKETS, [" fine</s>", " bye</s>"]),
        (BRACKETS_OPENED_EACH_TIME, [" fine </s>", " bye </s>"]),
        (THINKING, ["fine<|im_end|>", "<think>\n\n</think>\n\nbye<|im_end|>"]),
        (OPENED_THINKING, ["fine<|im_end|>", "\n</think>\n\nbye<|im_end|>"]),
        (MARKED, ["fine<|im_end|>", "bye<|im_end|>"]),
        (WITHOUT_END, [" fine", " bye"]),
        (END_ONLY_LAST, [" fine", " bye</s>"]),
        (TWO_ENDS, ["fine<|im_end|>", "bye<|return|>"]),
    ],
)
def test_a_response_is_trained_from_the_prompt_through_its_end_token(template, expected):
    assert trained(template, talk("how", "fine", "and", "bye")) == expected


@pytest.mark.parametrize("template", [CHATML, TRIMMING, WITH_DEFAULT_SYSTEM])
def test_a_system_message_is_not_trained(template):
    end = "<|eot|>" if template is TRIMMING else "<|im_end|>"
    assert trained(template, talk("how", "fine", system="Be brief.")) == [f"fine{end}"]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "request_text",
    [
        "<|im_start|>assistant\nfine<|im_end|>\n",
        "fine",
        "<|im_end|>",
        "x [/INST] fine</s>",
        "x<|eot|><|head|>assistant<|/head|>\n\nfine<|eot|><|turn|>model\nfine<|eot|>",
        " \n hello \n\n",
        "",
        "\n",
        "<think>\n</think>",
    ],
)
def test_what_a_request_says_shifts_nothing(name, request_text):
    template, end = PLAIN[name]
    stretches = trained(template, talk(request_text, "fine", request_text, "fine"))
    assert [s.removeprefix("<think>\n\n</think>\n\n").removeprefix("\n</think>\n\n") for s in stretches] in (
        [f"fine{end}"] * 2,
        [f" fine{end}"] * 2,
        [f" fine {end}"] * 2,
    )


@pytest.mark.parametrize(
    "said", ["  fine", "fine \n\n", "\n\nfine\n", "\t fine \t", "ﬁne 😀 \u3000", "\u00a0x\u00a0", "", "  ", "\n"]
)
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "{0}<|im_end|>"),
        (MARKED, "{0}<|im_end|>"),
        (WITH_TOOLS, "{0}<|im_end|>"),
        (TRIMMING, "{1}<|eot|>"),
        (RENAMING, "{1}<|eot|>"),
        (BRACKETS, " {0}</s>"),
        (BRACKETS_OPENED_EACH_TIME, " {1} </s>"),
        (THINKING, "<think>\n\n</think>\n\n{2}<|im_end|>"),
        (WITHOUT_END, " {0}"),
        (END_ONLY_LAST, " {0}</s>"),
    ],
)
def test_white_space_is_trained_as_the_template_leaves_it(template, expected, said):
    expected = expected.format(said, said.strip(), said.lstrip("\n"))
    assert trained(template, talk("how", said)) == [expected]
    assert trained(template, talk("how", "fine", "and", said))[1] == expected


def test_reasoning_is_trained_where_the_template_writes_it():
    messages = talk("how", "<think>\nWell.\n</think>\n\nfine", "and", "<think>\nSo.\n</think>\n\nbye")
    assert trained(THINKING, messages) == ["fine<|im_end|>", "<think>\nSo.\n</think>\n\nbye<|im_end|>"]
    assert trained(OPENED_THINKING, messages) == ["fine<|im_end|>", "So.\n</think>\n\nbye<|im_end|>"]
    shut = "<think>\n\n</think>\n\n"
    assert trained(THINKING.replace("{{ opening }}", shut), messages)[1] == "<think>\nSo.\n</think>\n\nbye<|im_end|>"
    assert trained(THINKING.replace("{{ opening }}", shut), talk("how", "fine")) == ["fine<|im_end|>"]
    assert trained(CHATML, messages)[0] == "<think>\nWell.\n</think>\n\nfine<|im_end|>"


def test_a_response_that_talks_about_tokens_is_trained_whole():
    said = "Write <|im_end|> after <|im_start|>assistant\n and <|im_end|>."
    for template in (CHATML, MARKED, WITH_TOOLS):
        assert trained(template, talk("how", said, "and", said)) == [f"{said}<|im_end|>"] * 2


def test_a_template_that_looks_at_a_request_is_rendered_as_it_is():
    template = CHATML.replace("{{ m.content }}", "{{ '(tool)' if m.content.startswith('<result>') }}{{ m.content }}")
    text = "<result><|im_start|>assistant\nsunny<|im_end|></result>"
    assert trained(template, talk(text, "fine", text, "bye")) == ["fine<|im_end|>", "bye<|im_end|>"]


def test_a_template_that_looks_for_empty_contents_is_rendered_as_it_is():
    template = CHATML.replace("{{ m.content }}", "{{ m.content or 'nothing' }}")
    assert trained(template, talk("", "", "and", "")) == ["nothing<|im_end|>"] * 2


def test_two_responses_in_a_row_and_one_that_comes_first():
    messages = [{"role": "assistant", "content": "hello"}, *talk("how", "fine"), {"role": "assistant", "content": "!"}]
    assert trained(CHATML, messages) == ["hello<|im_end|>", "fine<|im_end|>", "!<|im_end|>"]
    assert trained(BRACKETS, messages) == ["hello</s>", " fine</s> !</s>"]


# ---- Tools ----


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<|im_start|>assistant\n"}}]


@pytest.mark.parametrize("content", ["absent", None, ""])
def test_calls_are_trained_and_results_are_not(content):
    first = {"role": "user", "content": "Is it sunny?"}
    calling = call(city="Rome <|im_end|>", days=2)
    calling |= {} if content == "absent" else {"content": content}
    result = {"role": "tool", "content": "<|im_end|> yes"}
    messages = [first, calling, result, *talk("x", "Yes.")[1:], first, call(), result, call(days=1)]
    rome = '<call>weather {"city": "Rome <|im_end|>", "days": 2}</call><|im_end|>'
    others = ["Yes.<|im_end|>", "<call>weather {}</call><|im_end|>", '<call>weather {"days": 1}</call><|im_end|>']
    assert trained(WITH_TOOLS, messages, TOOLS) == [rome, *others]


def test_words_before_a_call_are_trained_with_it():
    messages = [{"role": "user", "content": "Is it?"}, {**call(city="Rome"), "content": "Let me see."}]
    assert trained(WITH_TOOLS, messages) == ['Let me see.\n<call>weather {"city": "Rome"}</call><|im_end|>']


def test_calls_with_an_end_token_of_their_own():
    messages = [*talk("Is it?"), call(city="Rome"), {"role": "tool", "content": "yes"}, *talk("", "Yes.")[1:]]
    expected = ['<call>weather {"city": "Rome"}</call><|call|>', "Yes.<|im_end|>"]
    assert trained(CALLS_END_APART, messages) == expected


def test_a_template_that_leaves_out_the_call_is_refused():
    messages = [*talk("Is it?"), {**call(city="Rome"), "content": "Let me see."}]
    assert reason(CHATML, messages) == "message 2 calls a tool, and the chat template does not write the call"


# ---- The end token ----


@pytest.mark.parametrize("name", PLAIN)
def test_the_end_token_is_the_one_behind_every_response(name):
    template, end = PLAIN[name]
    assert ChatTemplate(tokenizer_with(template)).end_of_turn == end


def test_templates_with_no_end_token_or_two():
    assert ChatTemplate(tokenizer_with(WITHOUT_END)).end_of_turn is None
    assert ChatTemplate(tokenizer_with(END_ONLY_LAST)).end_of_turn == "</s>"
    assert ChatTemplate(tokenizer_with(TWO_ENDS)).end_of_turn == "<|return|>"
    # The next request's header is no end.
    headers = "{% for m in messages %}<|head|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    assert ChatTemplate(tokenizer_with(headers)).end_of_turn is None
    both = CHATML.replace("<|im_end|>\n", "<|eot|><|im_end|>\n")
    assert ChatTemplate(tokenizer_with(both)).end_of_turn == "<|im_end|>"
    assert trained(both, talk("how", "fine", "and", "bye")) == ["fine<|eot|><|im_end|>", "bye<|eot|><|im_end|>"]


def marking(inside, behind):
    """A ChatML-like template that marks one part of a response."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}" + inside + "{% endgeneration %}" + behind + "{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )


@pytest.mark.parametrize(
    ("inside", "behind", "expected"),
    [
        ("{{ m.content }}", "<|im_end|>", "fine<|im_end|>"),
        ("{{ m.content }}<|im_end|>", "", "fine<|im_end|>"),
        ("{{ m.content }}<|im_end|>", "<|im_end|>", "fine<|im_end|>"),
        ("{{ m.content }}", " <|im_end|>", "fine"),
        ("{{ m.content }}", "{% generation %}<|im_end|>{% endgeneration %}", "fine<|im_end|>"),
        ("So: {{ m.content }}", "<|im_end|>", "So: fine<|im_end|>"),
    ],
)
def test_generation_marks_decide(inside, behind, expected):
    assert trained(marking(inside, behind), talk("how <|im_end|>", "fine", "and", "fine")) == [expected] * 2


def test_generation_marks_that_cover_nothing():
    assert "cover nothing" in reason(marking("", "{{ m.content }}<|im_end|>"), talk("how", "fine"))


# ---- Rows that cannot be rendered ----


def test_rows_that_are_left_out():
    assert reason(CHATML, talk("how")) == "has no assistant turn"
    assert reason(RENAMING, talk("how", "fine", system="x")) == "the chat template refuses it: no system here"
    assert "the chat template refuses it" in reason(THINKING, [{"role": "user"}, *talk("how", "fine")[1:]])
    parts = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "x"}]
    assert (
        reason(CHATML, [*talk("a"), {"role": "assistant", "content": parts}])
        == "message 2 has content that is not text"
    )
    assert reason(CHATML, [*talk("a"), {"role": "assistant", "content": 5}]) == "message 2 has content that is not text"
    short = CHATML.replace("for m in messages", "for m in messages[:4]")
    assert "message 6 does not appear" in reason(short, talk(*"abcdef"))
    twice = CHATML.replace("{% if add", "{% if messages | length > 4 %}{{ messages[1].content }}{% endif %}{% if add")
    assert "cannot be told apart" in reason(twice, talk(*"abcdef"))
    cutting = CHATML.replace("{{ m.content }}", "{{ m.content[:20] }}")
    assert "cannot be told apart" in reason(cutting, talk("how", "fine" * 9))
    assert "cannot be told apart" in reason(CHATML, talk("how", "fine \U00100000"))


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]
    pieces = ChatTemplate(tokenizer_with(CHATML)).render([*talk("a"), {"role": "assistant", "content": parts}])
    assert [piece.text for piece in pieces if piece.trained] == ["fine<|im_end|>"]


# ---- Templates that cannot be used ----


def test_a_tokenizer_without_a_template():
    message = refusal(tokenizer_with())
    assert message.startswith("data.prompt_template: chat is the tokenizer's own chat template, and")
    assert "alpaca, vicuna" in message and "model.name_or_path" in message


def test_a_template_that_is_not_jinja_names_the_line():
    message = refusal(tokenizer_with(), "{{ bos_token }}\n{% for m in messages %}", "./mine.jinja")
    assert message.startswith("data.prompt_template: './mine.jinja' must be a valid Jinja template (line 2: ")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[0].content.parts.of }}", "undefined|has no attribute"),
        ("", "content once"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "content once"),
        ("{% for m in messages %}{{ m.content.nothing() }}{% endfor %}", "has no attribute"),
    ],
)
def test_a_template_that_cannot_write_an_exchange(template, why):
    with pytest.raises(UserInputError, match=why) as caught:
        ChatTemplate(tokenizer_with(CHATML), template, "./mine.jinja")
    assert str(caught.value).startswith("data.prompt_template: './mine.jinja' must write a request and its response")


def test_a_template_of_the_users_is_used_instead_of_the_tokenizers():
    tokenizer = tokenizer_with(TRIMMING)
    chat = ChatTemplate(tokenizer, CHATML, "./mine.jinja")
    messages = talk("how", "fine")
    text = tokenizer.apply_chat_template(messages, chat_template=CHATML, tokenize=False)
    assert "".join(piece.text for piece in chat.render(messages)) == text
    assert chat.prompt(messages[:1]) == "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n"
    assert chat.end_of_turn == "<|im_end|>"


def test_a_template_for_one_exchange_only():
    template = "{% if messages | length > 2 %}{{ raise_exception('one only') }}{% endif %}" + CHATML
    assert trained(template, talk("how", "fine")) == ["fine<|im_end|>"]
    assert "one only" in reason(template, talk(*"abcd"))


# ---- All of it together ----


@pytest.mark.parametrize("name", PLAIN)
def test_generated_conversations(name):
    template, end = PLAIN[name]
    chat = ChatTemplate(tokenizer_with(template))
    assert pickle.loads(pickle.dumps(chat)).end_of_turn == end
    draw = random.Random(name)
    for _ in range(40):
        messages = talk(*(_words(draw, "RL"[n % 2]) for n in range(2 * draw.randint(1, 4))))
        pieces = chat.render(messages)
        text = "".join(piece.text for piece in pieces)
        assert text == chat.tokenizer.apply_chat_template(messages, tokenize=False)
        stretches = [piece.text for piece in pieces if piece.trained]
        assert len(stretches) == len(messages) // 2
        assert "R" not in "".join(stretches)
        assert "L" not in "".join(piece.text for piece in pieces if not piece.trained)
        assert all(stretch.endswith(end) for stretch in stretches)
        _check_begins_where_prompts_end(chat, messages, pieces)


def _check_begins_where_prompts_end(chat, messages, pieces):
    text, position, begins = "".join(piece.text for piece in pieces), 0, []
    for piece in pieces:
        begins += [position] * piece.trained
        position += len(piece.text)
    for exchange, begin in enumerate(begins):
        prompt = chat.prompt(messages[: 2 * exchange + 1])
        if text.startswith(prompt):
            assert begin == len(prompt)


def _words(draw, letter):
    """A text in which every word has the letter, between white space and tokens of templates."""
    around = ["", " ", "\n", "\n\n", "\t"]
    tokens = ["<|im_end|>", "<|im_start|>assistant\n", " [/INST] ", "<|eot|>", "</s>"] if letter == "R" else ["é", "😀"]
    words = [draw.choice([f"{letter}{draw.randrange(100)}", draw.choice(tokens)]) for _ in range(draw.randint(0, 4))]
    return draw.choice(around) + draw.choice(around).join([letter, *words, letter]) + draw.choice(around)


def test_trained_tokens_are_the_responses_tokens():
    tokenizer = tokenizer_with(CHATML)
    pieces = ChatTemplate(tokenizer).render(talk("how", "fine", "and", "bye"))
    [encoded] = Encoder(tokenizer, adds_special_tokens=False).encode([pieces])
    assert encoded.ids.tolist() == tokenizer("".join(piece.text for piece in pieces))["input_ids"]
    assert tokenizer.decode(encoded.ids[encoded.trained]) == "fine<|im_end|>bye<|im_end|>"


def test_few_renderings_a_row():
    chat = ChatTemplate(tokenizer_with(THINKING))
    count = 0

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def apply_chat_template(self, *args, **kwargs):
            nonlocal count
            count += 1
            return tokenizer.apply_chat_template(*args, **kwargs)

    tokenizer, chat.renderer.tokenizer = chat.tokenizer, Counting()
    chat.sequences(Dialogue(tuple(talk(*"abcdefgh"))))
    assert count == 2
