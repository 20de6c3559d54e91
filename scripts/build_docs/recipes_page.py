"""The shipped recipes, line by line: values from the files, the purpose of each, and its source."""

from __future__ import annotations

import re

from qlora_neft import list_recipes, load_recipe
from qlora_neft.recipe.keys import fields_of, section_names
from qlora_neft.recipe.load import recipe_dir

from .recipe_lines import WHY

SHOWN = "llama2-7b-alpaca"  # the one that is read line by line
SOURCES = {"NEFTune": "https://arxiv.org/abs/2310.05914", "QLoRA": "https://arxiv.org/abs/2305.14314"}
LINE = re.compile(r"  (\w+): (.+?)(?:\s+# (.*))?")

INTRO = f"""# Recipes, line by line

```
qlora-neft ls
qlora-neft show {SHOWN}
qlora-neft cp {SHOWN} mine.yaml
qlora-neft diff {SHOWN} mine.yaml
```

A recipe states everything that is learned; nothing is inherited or hidden. Copy one, change it, `validate` it.
Below is `{SHOWN}`, each line with its purpose and source. *NEFTune* is
[arXiv:2310.05914]({SOURCES["NEFTune"]}), *QLoRA* [arXiv:2305.14314]({SOURCES["QLoRA"]}) and the code released
with it. Only NEFTune's Table 3 is QLoRA; its other results are full fine-tuning. All keys, including those no recipe
sets: [commands and keys](commands.md#recipe-keys).
"""

DIFFERENCES = """
## Where the others differ

Only what differs from the above. Quality, memory and speed of all but `demo` on this trainer: **not measured**.

| recipe | differs in |
|---|---|
"""

THIRTY = """
## Why the current models are trained differently

`qlora-neft ls` lists two groups: recipes with the papers' numbers, and recipes for current models. In the latter:

- **Rank 16, `lora_alpha` 32, all linear layers.** "LoRA Without Regret" (Thinking Machines, 2025) scales by 32 / r,
  under which the best rate hardly depends on the rank; the rank must hold what the rows teach, so raise it for
  many. The mixture divides it by the 8 experts a token passes through, as that text does.
- **The learning rate is a starting point**, QLoRA's 2e-4. Once it is tuned, nine variants of LoRA lie within 2% of
  each other ([arXiv:2602.04998](https://arxiv.org/abs/2602.04998)); [`qlora-neft tune`](tuning.md) finds it for your
  rows.
- **Noise only on bases**, at the paper's smallest alpha. Its evidence is on Llama 1 and 2 and OPT, with single
  answers; for models that follow instructions already, nothing is shown ([will it help?](does_it_help.md)).
- **Base or instruct.** A model that follows instructions keeps what it can and takes on your rows' manner; it gets
  its own chat template. A base learns both from rows of instruction and answer, with Alpaca's prompt. Each file
  says which it takes and how to take the other. Models that can think are told not to, since the rows hold no
  thoughts.
- **The data are stand-ins for yours**: [Dolly](https://huggingface.co/datasets/databricks/databricks-dolly-15k) (CC
  BY-SA 3.0) for bases, [Capybara](https://huggingface.co/datasets/trl-lib/Capybara) (Apache-2.0) for the others.
  Yours need one word: `data.path=my_rows.jsonl`; format, split and held-out share are the same for any rows.

None of the bases was loaded from the Hub here; their sizes are checked against the published ones.

## Why the 30B recipe is different

Twice the effective batch (32) and half the learning rate (1e-4), and dropout 0.05, as in QLoRA above 13B. The papers
agree: NEFTune's section on QLoRA says so, and QLoRA's Table 9 states 32 and 1e-4 for 33B. Batch 16, which QLoRA's
released script for 33B has, is that table's row for OASST1, another data set. A recipe that states `max_steps` and
doubles the batch would train on twice the tokens, so these state epochs.

## In the letter of the papers

Overrides may stand in a file, one a line, named by `@` and its path. Three ship with the package:

```
qlora-neft show llama2-7b-alpaca @qlora
qlora-neft diff llama2-7b-alpaca llama2-7b-alpaca @full
```

| | |
|---|---|
| `@qlora` | the 7B and 13B recipes on Alpaca in the letter of QLoRA: its two lengths, its prompt's ending, its mean |
| `@full` | every weight trained, as in NEFTune's tables other than Table 3 |
| `@full-70b` | the same for its 70B column |

[What differs from the papers and why](departures.md); [each table and figure with its command](tables_and_figures.md).
None of the three was measured with this trainer.

## Scale and rates of LoRA

- `lora.use_rslora: true` scales the update by `lora_alpha / sqrt(r)` instead of `lora_alpha / r` (rank-stabilized
  LoRA, [arXiv:2312.03732](https://arxiv.org/abs/2312.03732)). Divided by r, an update shrinks as the rank grows, and
  a high rank learns as slowly as if it were a low one. It is for ranks of 64 and more, and for comparing ranks at one
  learning rate; at r 16 it is four times the scale, so divide `lora_alpha` by sqrt(r) to keep the one you have.
- `train.loraplus_lr_ratio: 16` lets the matrices B learn at 16 times `learning_rate`, which is then that of A (LoRA+,
  [arXiv:2402.12354](https://arxiv.org/abs/2402.12354)). It is for tasks that a base is far from; halve
  `learning_rate` first, and tune both. 1 and null are the same run. The schedule scales both rates alike;
  `weight_decay` is multiplied by each matrix's own rate, as in the released code. LoRA on an embedding learns at
  `learning_rate`, A and B.

Neither is on in any recipe here: once the learning rate is tuned, variants of LoRA lie within 2% of each other
([arXiv:2602.04998](https://arxiv.org/abs/2602.04998)). What they gain with this trainer is not measured. Both are
part of what a run learns, so a resume with another value is refused. Merged models and GGUF files carry the scale; of
other tools [the table](serving.md#check) says which read it.

## Without NF4, and every weight

- `quantization=null` loads the base as it is, in bfloat16, float16 or float32 by the machine, and trains plain LoRA
  on it. `merge`, `check`, the card and `generate` go by that.
- `quantization=null lora=null` trains every weight of the model, as in NEFTune's own tables: in float32, with
  autocast, and with the same noise, batches and resumes. The output folder and each checkpoint hold a plain model in
  float32, which `AutoModelForCausalLM.from_pretrained` loads; the verbs for adapters say so and stop. Choose a lower
  `train.learning_rate` than LoRA's; the paper's is 5e-5. `lora=null` alone is refused: nothing in NF4 can be trained.
- `fit` with both says what it costs: 16 bytes a weight for weights, gradients and Adam's states, 2 for the copies a
  pass computes with, and activations. That estimate was not measured on a GPU, nor was such a training.

## Change one

```
qlora-neft cp qwen3-4b my-qwen.yaml
qlora-neft validate my-qwen.yaml data.path=my_rows.jsonl
qlora-neft preview my-qwen.yaml data.path=my_rows.jsonl
qlora-neft fit my-qwen.yaml --vram t4
```

- **Your data**: `data.path`; `data.format` and `data.prompt_template` may be `auto` ([data](data.md)). `preview` needs
  the base's tokenizer, from the Hub or a folder.
- **Your base**: `model.name_or_path`, any decoder that transformers loads; `revision` pins it.
- **alpha**: 5 is a cautious start. `qlora-neft sweep mine.yaml neftune.noise_alpha=0,5,10,15 --output-dir sweep`
  decides it for your data ([sweeps](sweeps.md)).
- **Smaller card**: leave `machine: {}` as it is; [which recipe for my GPU](which_recipe.md).
"""


def text() -> str:
    """Return the page."""
    sections = "".join(_section(name) for name in section_names() if name in _lines())
    others = "".join(f"| `{name}` | {_differences(name)} |\n" for name in list_recipes() if name != SHOWN)
    return f"{INTRO}{sections}{DIFFERENCES}{others}{THIRTY}"


def _lines() -> dict[str, list[tuple[str, str, str]]]:
    """Return key, value and comment of every line of the shown recipe, by section."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for line in (recipe_dir() / f"{SHOWN}.yaml").read_text(encoding="utf-8").splitlines():
        if section := re.match(r"(\w+):", line):
            found[section[1]] = []
        elif key := LINE.fullmatch(line):
            found[next(reversed(found))].append((key[1], key[2], key[3] or ""))
    return found


def _section(name: str) -> str:
    if not _lines()[name]:
        return f"\n## machine\n\n{WHY['machine']}\n"
    rows = "".join(
        f"| `{key}: {value}` | {WHY[f'{name}.{key}']} | {_source(comment)} |\n"
        for key, value, comment in _lines()[name]
    )
    return f"\n## {name}\n\n| line | what it is for | source |\n|---|---|---|\n{rows}"


def _source(comment: str) -> str:
    """Return the source in brackets after a line; without one the value is our own choice or has no alternative."""
    named = re.search(r"\[([^\]]+)\]", comment)
    return named[1] if named else ""


def _differences(name: str) -> str:
    ours, shown = load_recipe(name), load_recipe(SHOWN)
    found = []
    for section in section_names():
        for key in fields_of(section):
            values = [getattr(getattr(recipe, section), key) for recipe in (ours, shown)]
            if values[0] != values[1]:
                found.append(f"`{section}.{key}={values[0]}`")
    return ", ".join(found)
