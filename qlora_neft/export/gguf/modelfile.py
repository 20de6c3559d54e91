"""A Modelfile: how Ollama should prompt a model as it was trained, and decode as NEFTune's authors do.

A chat template is Jinja, and Ollama's templates are Go's. It is translated by experiment: conversations with marked
contents show what the template writes around each role. The translation is used only if it reproduces the template's
text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...adapter.folder import CONFIG, AdapterFolder, find_adapter
from ...adapter.load import tokenizer_of_adapter
from ...adapter.prompts import Prompts, prompts_of
from ...base.config import load_tokenizer
from ...data.examples import BadRow
from ...data.templates import ALPACA_ENDINGS, VICUNA_SYSTEM, alpaca_prompt
from ...errors import UserInputError
from ...files import read_record_if_there, write_text
from ..merge.report import REPORT

# Greedy with this penalty, over the whole text: arXiv:2310.05914, appendix.
PARAMETERS = ("PARAMETER temperature 0", "PARAMETER repeat_penalty 1.2", "PARAMETER repeat_last_n -1")
TEMPLATES = (*ALPACA_ENDINGS, "vicuna", "chat", "none")
_ROLES = ("system", "user", "assistant")
_NO_TEMPLATE = "its chat template has no equal in Ollama's language: write TEMPLATE by hand, or use llama-server."


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile.

    Attributes:
        text: Its content.
        notes: Facts its reader must know.
    """

    text: str
    notes: list[str]


def modelfile_of_adapter(folder: AdapterFolder, gguf: Path, base: str) -> Modelfile:
    """Return the Modelfile of a LoRA GGUF on a base.

    Args:
        folder: The adapter.
        gguf: The file, in the Modelfile's folder.
        base: Ollama's name of the base: a GGUF file or a model's name.
    """
    tokenizer = tokenizer_of_adapter(folder)
    prompts = prompts_of(folder, tokenizer)
    return _modelfile([f"FROM {base}", f"ADAPTER ./{gguf.name}"], prompts, tokenizer)


def modelfile_of_model(model_dir: Path, gguf: Path, prompt_template: str | None = None) -> Modelfile:
    """Return the Modelfile of a model's GGUF.

    Args:
        model_dir: The model's folder.
        gguf: The file, in the Modelfile's folder.
        prompt_template: One of `TEMPLATES`. Default: that of the merged adapter's run if it is still there, else the
            tokenizer's chat template.

    Raises:
        UserInputError: If nothing says which prompt the model was trained with.
    """
    tokenizer = load_tokenizer(str(model_dir))
    if prompt_template is not None and prompt_template not in TEMPLATES:
        raise UserInputError(f"--prompt-template: must be one of {', '.join(TEMPLATES)}, got {prompt_template!r}.")
    prompts = _prompts_of_model(model_dir, tokenizer, prompt_template)
    return _modelfile([f"FROM ./{gguf.name}"], prompts, tokenizer)


def write_modelfile(modelfile: Modelfile, path: Path) -> None:
    """Write a Modelfile where there is none yet.

    Raises:
        UserInputError: If there is one.
    """
    check_no_modelfile(path)
    write_text(path, modelfile.text)


def check_no_modelfile(path: Path) -> None:
    """Refuse to overwrite a Modelfile.

    Raises:
        UserInputError: If there is one.
    """
    if path.exists():
        raise UserInputError(f"--modelfile: {str(path)!r} exists already. Remove it, or write to another folder.")


def _prompts_of_model(model_dir: Path, tokenizer: PreTrainedTokenizerBase, stated: str | None) -> Prompts:
    # The merge's report names the prompt; of earlier versions the adapter, whose run names it.
    report = read_record_if_there(model_dir / REPORT, "Remove it, and give --prompt-template.") or {}
    if stated is None and report.get("prompt_template") in TEMPLATES:
        given = report.get("chat_template_kwargs"), report.get("system_prompt")
        return Prompts(tokenizer, report["prompt_template"], *given)
    adapter = report.get("adapter")
    if isinstance(adapter, str) and (Path(adapter) / CONFIG).is_file():
        return prompts_of(find_adapter(adapter), tokenizer, stated)
    if stated is not None or tokenizer.chat_template:
        return Prompts(tokenizer, stated or "chat")
    raise UserInputError(
        f"--modelfile: nothing in {str(model_dir)!r} says which prompt the model was trained with. "
        f"Give --prompt-template: {', '.join(TEMPLATES)}."
    )


def _modelfile(head: Sequence[str], prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> Modelfile:
    template = go_template(prompts, tokenizer)
    stops = tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids))
    lines = [*head]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    # Ollama ends at the GGUF's end token by itself; a chat template may end its turns with another.
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    notes = [] if template is not None else [_NO_TEMPLATE]
    if prompts.system is not None:
        if _quotable(prompts.system) is None:
            notes.append('its system message holds """, which a Modelfile cannot: send it with each request.')
        else:
            lines.append(f'SYSTEM """{prompts.system}"""')
    if _gets_another_begin_token(prompts, tokenizer):
        notes.append(
            f"its chat template does not write {tokenizer.bos_token}, but Ollama and llama.cpp put one before it."
        )
    return Modelfile("\n".join([*lines, *PARAMETERS]) + "\n", notes)


def _gets_another_begin_token(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts a begin token before a prompt that had none in training."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] == tokenizer.bos_token_id != prompts.ids([{"role": "user", "content": "a"}])[0]


# ---- Templates in Ollama's language ----


def go_template(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a prompt template in Ollama's language (Go's text/template), None if it cannot be expressed in it.

    The begin token is omitted: Ollama puts it there, as the GGUF says.
    """
    # One request: Alpaca's prompt has no place for earlier turns.
    if prompts.name in ALPACA_ENDINGS:
        return _quotable(alpaca_prompt("{{ .Prompt }}", name=prompts.name) + "{{ .Response }}")
    if prompts.name == "vicuna":
        answer = "{{ .Content }}" + (prompts.template.end or "")
        return _quotable(
            f"{{{{ if .System }}}}{{{{ .System }}}}{{{{ else }}}}{VICUNA_SYSTEM}{{{{ end }}}} "
            '{{ range .Messages }}{{ if eq .Role "user" }}USER: {{ .Content }} ASSISTANT:'
            '{{ else if eq .Role "assistant" }} ' + answer + "{{ end }}{{ end }}"
        )
    if prompts.name == "none":
        return "{{ .Prompt }}{{ .Response }}"
    return _quotable(_chat_to_go(prompts, tokenizer))


def _quotable(template: str | None) -> str | None:
    """Return None for text that would end the quotes of a Modelfile."""
    return None if template is None or '"""' in template else template


@dataclass(frozen=True)
class _Pieces:
    """The text that a chat template writes around contents.

    Attributes:
        default: Before a conversation without a system message.
        around: By role, the text before and after a content; without ``system`` if the template refuses one.
        opening: Before a response.
    """

    default: str
    around: dict[str, tuple[str, str]]
    opening: str

    def write(self, messages: Sequence[tuple[str, str]]) -> str:
        """Write a conversation that waits for a response."""
        head = "" if messages[0][0] == "system" else self.default
        turns = (self.around[role][0] + content + self.around[role][1] for role, content in messages)
        return head + "".join(turns) + self.opening


def _chat_to_go(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Translate a chat template, None if that is not possible. The begin token at its start is omitted."""
    pieces = _pieces(prompts)
    if pieces is None:
        return None
    bos = tokenizer.bos_token or ""
    # Ollama puts the begin token before every prompt by itself.
    default, around = pieces.default.removeprefix(bos), dict(pieces.around)
    if "system" in around:
        around["system"] = (around["system"][0].removeprefix(bos), around["system"][1])
    written = "".join([default, pieces.opening, *map("".join, around.values())])
    # Go would take "{{" for an action; a begin token left inside would be doubled by the one Ollama adds.
    if "{{" in written or (bos and bos in written):
        return None
    head = "{{ if not .System }}" + default + "{{ end }}" if default else ""
    cases = "".join(
        f'{{{{ {"else " * (number > 0)}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}'
        for number, (role, (before, behind)) in enumerate(around.items())
    )
    return head + "{{ range .Messages }}" + cases + "{{ end }}{{ end }}" + pieces.opening


def _pieces(prompts: Prompts) -> _Pieces | None:
    """Return the first way to cut the template's text into pieces that give it again, None if there is none."""
    # u: a request; uau: request, answer, request; su: system message and request.
    one, two, system = (_ask(prompts, roles) for roles in ("u", "uau", "su"))
    if one is None or two is None:
        return None
    start, end = one  # default and the request's header; what ends the request, and the opening
    for opening, before_answer, behind_user in _ends(end, two[1]):
        for default, before_user, behind_answer in _starts(start, two[2], prompts.template.end):
            around = {"user": (before_user, behind_user), "assistant": (before_answer, behind_answer)}
            if system is not None and system[1].endswith(before_user):
                around = {"system": (system[0], system[1].removesuffix(before_user)), **around}
            found = _Pieces(default, around, opening)
            if _is_faithful(found, prompts):
                return found
    return None


def _ends(end: str, to_answer: str) -> Iterator[tuple[str, str, str]]:
    """Yield ways to cut the text after the last request, given the text before an answer."""
    # The longest end of a request first: a shorter one would put part of it into the opening.
    for cut in range(len(end), -1, -1):
        if to_answer.startswith(end[:cut]):
            yield end[cut:], to_answer[cut:], end[:cut]


def _starts(start: str, to_request: str, end_of_turn: str | None) -> Iterator[tuple[str, str, str]]:
    """Yield ways to cut the text before the first request, given the text between an answer and the next request."""
    ways = [
        (start[:cut], start[cut:], to_request.removesuffix(start[cut:]))
        for cut in range(len(start) + 1)
        if to_request.endswith(start[cut:])
    ]
    # False sorts first: ways that leave the end of turn with the answer, where Ollama must write it.
    yield from sorted(ways, key=lambda way: end_of_turn is not None and end_of_turn not in way[2])


def _ask(prompts: Prompts, roles: str) -> list[str] | None:
    """Return the text around the marked contents of a conversation, None if the template refuses it."""
    contents = [f"content{number}of" for number in range(len(roles))]
    text = _written(prompts, [(_role(letter), content) for letter, content in zip(roles, contents, strict=True)])
    if text is None:
        return None
    pieces = []
    for content in contents:
        # A template that repeats or drops a content cannot be cut into pieces around it.
        if text.count(content) != 1:
            return None
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text]


def _role(letter: str) -> str:
    return next(role for role in _ROLES if role.startswith(letter))


def _written(prompts: Prompts, messages: Sequence[tuple[str, str]]) -> str | None:
    with suppress(BadRow, UserInputError):
        return prompts.text([{"role": role, "content": content} for role, content in messages])
    return None


def _is_faithful(pieces: _Pieces, prompts: Prompts) -> bool:
    """Return whether the pieces give what the template gives, for conversations of several lengths and contents."""
    # Longer than the conversations that were asked about, and with a line break: templates may strip contents, or treat
    # the first or last turn differently.
    for roles in ("u", "uau", "uauau", "su", "suau"):
        if roles.startswith("s") and "system" not in pieces.around:
            continue
        messages = [(_role(letter), f"{letter}{number}: one\ntwo") for number, letter in enumerate(roles)]
        if pieces.write(messages) != _written(prompts, messages):
            return False
    return True
