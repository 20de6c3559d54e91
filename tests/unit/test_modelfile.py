"""Prompts in Ollama's template language are those of training, written out by a reader of the parts of it in use."""

import json
import re

import pytest
from tiny import byte_tokenizer

from qlora_neft.adapter.prompts import Prompts
from qlora_neft.export.gguf.modelfile import go_template, modelfile_of_model

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = {
    "chatml": CHATML,
    "with a default": "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}" + CHATML,
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}
NOT_TURN_BY_TURN = {
    "numbered": "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}</s>{% endfor %}assistant:",
    "system in the request": (
        "{% set first = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ first if loop.index < 3 }}{{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
CONVERSATIONS = [
    [("user", "one\ntwo")],
    [("user", "a"), ("assistant", "b"), ("user", "{c}")],
    [("system", "Be brief."), ("user", "q")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")],
]


def prompts_of(name, chat=None):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"]})
    tokenizer.chat_template = chat
    return Prompts(tokenizer, name), tokenizer


def rendered(template, messages):
    """What Go's text/template writes, of the actions our templates have."""
    system = "".join(content for role, content in messages if role == "system")
    values = {"System": system, "Prompt": messages[-1][1], "Response": ""}
    loop = re.fullmatch(r"(?s)(.*)\{\{ range \.Messages \}\}(.*\{\{ end \}\})\{\{ end \}\}(.*)", template)
    if loop is None:
        return written(template, values)
    turns = (written(loop[2], {**values, "Role": role, "Content": content}) for role, content in messages)
    return written(loop[1], values) + "".join(turns) + written(loop[3], values)


def written(template, values):
    text, state = "", "shown"  # or "waiting" for a branch that holds, or "done" with one
    for part in re.split(r"(\{\{.*?\}\})", template):
        action = part.removeprefix("{{").removesuffix("}}").strip()
        if part.startswith("{{") and action == "end":
            state = "shown"
        elif part.startswith("{{") and action.startswith("else") and state != "waiting":
            state = "done"
        elif part.startswith("{{") and action.startswith(("if ", "else")):
            state = "shown" if condition(action, values) else "waiting"
        elif state == "shown":
            text += values[action.removeprefix(".")] if part.startswith("{{") else part
    return text


def condition(action, values):
    action = action.removeprefix("else").strip().removeprefix("if ").strip()
    if not action:
        return True
    if match := re.fullmatch(r'eq \.Role "(\w+)"', action):
        return values["Role"] == match[1]
    negated = action.startswith("not ")
    return bool(values[action.removeprefix("not ").removeprefix(".")]) != negated


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda m: "".join(role[0] for role, _ in m))
@pytest.mark.parametrize("name", ["vicuna", *CHATS])
def test_a_conversation_is_prompted_as_in_training(name, messages):
    prompts, tokenizer = prompts_of("chat" if name in CHATS else name, CHATS.get(name))
    if name == "gemma" and messages[0][0] == "system":
        pytest.skip("this template refuses system messages")
    expected = prompts.text([{"role": role, "content": content} for role, content in messages])
    assert rendered(go_template(prompts, tokenizer), messages) == expected.removeprefix(tokenizer.bos_token)


@pytest.mark.parametrize("name", ["alpaca", "alpaca-newline", "alpaca-space"])
def test_alpacas_request_is_prompted_as_in_training(name):
    prompts, tokenizer = prompts_of(name)
    expected = prompts.text([{"role": "user", "content": "Name {three} colours"}])
    assert rendered(go_template(prompts, tokenizer), [("user", "Name {three} colours")]) == expected


@pytest.mark.parametrize("name", NOT_TURN_BY_TURN)
def test_a_template_that_is_not_turn_by_turn_is_left_out(name):
    assert go_template(*prompts_of("chat", NOT_TURN_BY_TURN[name])) is None


REPORTS = {
    "alpaca": ({"prompt_template": "alpaca"}, "### Response:{{ .Response }}"),
    "with a system message": (
        {"prompt_template": "vicuna", "system_prompt": "Answer as a hen."},
        'SYSTEM """Answer as a hen."""\n',
    ),
    "values of a chat template": ({"prompt_template": "chat", "chat_template_kwargs": {"mood": "glad"}}, "glad:"),
}


@pytest.mark.parametrize(("report", "says"), REPORTS.values(), ids=REPORTS)
def test_a_merged_model_is_prompted_as_its_report_says(tmp_path, report, says):
    found = merged_modelfile(tmp_path, report)
    assert found.text.startswith("FROM ./model.gguf\nTEMPLATE ") and says in found.text and not found.notes
    assert ("SYSTEM" in found.text) == ("system_prompt" in report)


def test_a_system_message_that_ends_the_quotes_is_left_to_the_requests(tmp_path):
    found = merged_modelfile(tmp_path, {"prompt_template": "vicuna", "system_prompt": 'Say """.'})
    assert "SYSTEM" not in found.text and "send it with each request" in found.notes[0]


def merged_modelfile(folder, report):
    """Of a model whose adapter is gone."""
    prompts_of("chat", CHATML + "{{ mood }}:")[1].save_pretrained(folder)
    (folder / "merge_report.json").write_text(json.dumps({"adapter": "gone", **report}))
    return modelfile_of_model(folder, folder / "model.gguf")
