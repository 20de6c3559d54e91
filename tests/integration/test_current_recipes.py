"""Each recipe for a current model, previewed on rows with the columns of its data set and a stock chat template.

The bases are on the Hub: a byte tokenizer stands in for theirs, with the chat template that TRL ships for the family.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trl

from qlora_neft import load_recipe
from qlora_neft.fit.shipped import shipped_recipes
from qlora_neft.runner.preview import preview, to_json
from scripts.families.tokenizer import byte_tokenizer

STOCK = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {
    "gemma3": "gemma3.jinja",
    "llama3.2": "llama3.jinja",
    "phi4": "phi3.jinja",
    "qwen3-4b": "qwen3_instruct_2507.jinja",
    "qwen3-30b": "qwen3_instruct_2507.jinja",
    "qwen3": "qwen3.jinja",
    "smollm3": "qwen3.jinja",  # which has the same switch for thoughts
}
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")  # of a turn, by family
CURRENT = [one.name for one in shipped_recipes() if one.group == "current"]
ROWS = {
    "trl-lib/Capybara": {
        "source": "ours",
        "messages": [
            {"role": "user", "content": "Name a bird."},
            {"role": "assistant", "content": "A wren."},
            {"role": "user", "content": "And a fish?"},
            {"role": "assistant", "content": "A perch."},
        ],
        "num_turns": 2,
    },
    "HuggingFaceH4/no_robots": {
        "prompt": "Name a bird.",
        "prompt_id": "1",
        "messages": [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "A perch."}],
        "category": "Brainstorm",
    },
    "databricks/databricks-dolly-15k": {
        "instruction": "Name a fish of the pond.",
        "context": "In the pond live perch.",
        "response": "A perch.",
        "category": "closed_qa",
    },
}


def template_of(name):
    # The longest beginning is the most particular.
    found = max((start for start in TEMPLATES if name.startswith(start)), key=len, default=None)
    return None if found is None else (STOCK / TEMPLATES[found]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders with rows of each data set, numbered so that none repeats."""
    folder = tmp_path_factory.mktemp("current")
    for path, row in ROWS.items():
        lines = [json.dumps(row).replace("Name a", f"{number}: Name a") for number in range(100)]
        (folder / f"{path.replace('/', '-')}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", CURRENT)
def test_a_current_recipe_previews_rows_like_its_own(name, place):
    recipe = load_recipe(name)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template_of(name)
    if tokenizer.chat_template is not None:
        end = next(token for token in ENDS if token in tokenizer.chat_template)
        tokenizer.add_special_tokens({"eos_token": end})
    base = place / name
    tokenizer.save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    rows = place / f"{recipe.data.path.replace('/', '-')}.jsonl"
    own = ["data.eval_split=null", "data.eval_fraction=0.02"] if recipe.data.eval_split else []
    mine = load_recipe(name, [f"model.name_or_path={base}", f"data.path={rows}", *own])
    shown = to_json(preview(mine))
    assert shown["problems"] == []
    assert [line for line in shown["warnings"] if "columns not used" not in line] == []
    assert shown["train"]["rows"] == shown["train"]["ended"] == 98 and shown["eval"]["rows"] == 2
    assert shown["train"]["dropped"] == shown["train"]["truncated"] == 0
