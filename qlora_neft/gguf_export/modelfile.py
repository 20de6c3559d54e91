"""A Modelfile: how Ollama shall prompt a model as it was trained, and decode as NEFTune's authors do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.templates import VICUNA_SYSTEM, alpaca_prompt
from ..errors import UserInputError
from ..tokenizer import load_tokenizer
from ..trained import AdapterFolder, Prompts, find_adapter
from ..trained.folder import CONFIG
from ..trained.prompts import template_of
from ..trained.tokenizer import tokenizer_of_adapter
from .chat_to_go import chat_to_go

# Greedy with this penalty, over the whole text: arXiv:2310.05914, appendix.
PARAMETERS = ("PARAMETER temperature 0", "PARAMETER repeat_penalty 1.2", "PARAMETER repeat_last_n -1")
TEMPLATES = ("alpaca", "vicuna", "chat", "none")
_NO_TEMPLATE = "its chat template cannot be said in Ollama's language: write TEMPLATE by hand, or use llama-server."


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile's text, and what its reader has to know."""

    text: str
    notes: list[str]


def modelfile_of_adapter(folder: AdapterFolder, gguf: Path, base: str) -> Modelfile:
    """For a LoRA GGUF on a base.

    Args:
        folder: The adapter.
        gguf: The file, in the Modelfile's folder.
        base: What Ollama calls the base: a GGUF file or a model's name.
    """
    tokenizer = tokenizer_of_adapter(folder)
    prompts = Prompts(tokenizer, template_of(folder.recipe, folder.summary, tokenizer))
    return _modelfile([f"FROM {base}", f"ADAPTER ./{gguf.name}"], prompts, tokenizer)


def modelfile_of_model(model_dir: Path, gguf: Path, prompt_template: str | None = None) -> Modelfile:
    """For a model's GGUF.

    Args:
        model_dir: The model's folder.
        gguf: The file, in the Modelfile's folder.
        prompt_template: One of `TEMPLATES`; default: that of the merged adapter's run where it is still there, else the
            tokenizer's chat template.

    Raises:
        UserInputError: If nothing says which prompt the model was trained with.
    """
    tokenizer = load_tokenizer(str(model_dir))
    if prompt_template is not None and prompt_template not in TEMPLATES:
        raise UserInputError(f"--prompt-template: must be one of {', '.join(TEMPLATES)}, got {prompt_template!r}.")
    prompts = Prompts(tokenizer, prompt_template or _template_of_model(model_dir, tokenizer))
    return _modelfile([f"FROM ./{gguf.name}"], prompts, tokenizer)


def _template_of_model(model_dir: Path, tokenizer: Any) -> str:
    report = model_dir / "merge_report.json"
    adapter = json.loads(report.read_text(encoding="utf-8")).get("adapter") if report.is_file() else None
    if adapter is not None and (Path(adapter) / CONFIG).is_file():
        folder = find_adapter(adapter)
        return template_of(folder.recipe, folder.summary, tokenizer)
    if tokenizer.chat_template:
        return "chat"
    raise UserInputError(
        f"--modelfile: nothing in {str(model_dir)!r} says which prompt the model was trained with. "
        f"Give --prompt-template: {', '.join(TEMPLATES)}."
    )


def write_modelfile(modelfile: Modelfile, path: Path) -> None:
    """Write it, if there is none yet.

    Raises:
        UserInputError: If there is.
    """
    check_no_modelfile(path)
    path.write_text(modelfile.text, encoding="utf-8")


def check_no_modelfile(path: Path) -> None:
    """Refuse to write over one.

    Raises:
        UserInputError: If there is one.
    """
    if path.exists():
        raise UserInputError(f"--modelfile: {str(path)!r} exists already. Remove it, or write to another folder.")


def _modelfile(head: Sequence[str], prompts: Prompts, tokenizer: Any) -> Modelfile:
    template = go_template(prompts, tokenizer)
    stops = tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids))
    lines = [*head]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    notes = [] if template is not None else [_NO_TEMPLATE]
    if _gets_another_begin_token(prompts, tokenizer):
        notes.append(f"its chat template writes no {tokenizer.bos_token}, and Ollama and llama.cpp put one before it.")
    return Modelfile("\n".join([*lines, *PARAMETERS]) + "\n", notes)


def _gets_another_begin_token(prompts: Prompts, tokenizer: Any) -> bool:
    """Whether a prompt has no begin token in training, and one where the tokenizer's own habit decides."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] == tokenizer.bos_token_id != prompts.ids([{"role": "user", "content": "a"}])[0]


def go_template(prompts: Prompts, tokenizer: Any) -> str | None:
    """A prompt template in Ollama's language (Go's text/template), None if it cannot be said there.

    The begin token is left away: Ollama puts it, as the GGUF says.
    """
    if prompts.name == "alpaca":
        return _quotable(alpaca_prompt("{{ .Prompt }}") + "{{ .Response }}")
    if prompts.name == "vicuna":
        answer = "{{ .Content }}" + prompts.template.end
        return _quotable(
            f"{{{{ if .System }}}}{{{{ .System }}}}{{{{ else }}}}{VICUNA_SYSTEM}{{{{ end }}}} "
            '{{ range .Messages }}{{ if eq .Role "user" }}USER: {{ .Content }} ASSISTANT:'
            '{{ else if eq .Role "assistant" }} ' + answer + "{{ end }}{{ end }}"
        )
    if prompts.name == "none":
        return "{{ .Prompt }}{{ .Response }}"
    return _quotable(chat_to_go(prompts, tokenizer))


def _quotable(template: str | None) -> str | None:
    """None for text that would end the quotes of a Modelfile."""
    return None if template is None or '"""' in template else template
