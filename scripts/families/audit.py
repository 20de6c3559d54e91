"""Drive one tiny random model of a family through everything a run does, and write down how each stage ended."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, PreTrainedConfig, set_seed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from qlora_neft.errors import RunFailed, RunInterrupted, UserInputError
from qlora_neft.recipe.load import load_recipe
from qlora_neft.trainer import QLoRANeftTrainer

from .tiny import tiny_config, tiny_whole
from .tokenizer import byte_tokenizer

YES = "yes"
STAGES = ("dry run", "trains", "resumes", "merges", "GGUF", "generates", "fit")
# Checkpoints that also see, of which the text part is trained; the others of the table are language models alone.
WHOLES = (
    "gemma3",
    "gemma4",
    "llama4",
    "mistral3",
    "qwen3_5",
    "qwen3_5_moe",
    "llava",
    "internvl",
    "aya_vision",
    "gemma4_unified",
    "got_ocr2",
)
MAX_PARAMETERS = 20_000_000
ROWS = [{"instruction": f"Say {n}", "input": "aloud" * (n % 2), "output": f"{n} " * (1 + n % 4)} for n in range(8)]


class CutOff(QLoRANeftTrainer):
    """A trainer that is killed in its second step, after the checkpoint of the first."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take the first step, and no other."""
        if self.state.global_step >= 1:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


def families() -> list[str]:
    """Return every model type to audit: those with a causal head in transformers, and those with a text part."""
    # Half of an encoder-decoder is listed by upstream as well; nobody trains it alone.
    decoders = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not _is_encoder_decoder(name)}
    return sorted({*decoders, *WHOLES})


def _is_encoder_decoder(model_type: str) -> bool:
    config_class = CONFIG_MAPPING[model_type]
    return bool(getattr(config_class, "is_encoder_decoder", False)) or model_type in ("musicgen", "musicgen_melody")


def audit(model_type: str, folder: Path) -> dict[str, Any]:
    """Return how each stage ended for a family: ``yes``, or the message it ended with.

    Args:
        model_type: As in ``config.json``.
        folder: An empty folder to work in.
    """
    found: dict[str, Any] = {"class": None, "is_text_part": model_type in WHOLES, "stages": {}, "bugs": []}
    stages: dict[str, str] = found["stages"]

    def stage(name: str, do: Callable[[], Any]) -> bool:
        """Do a stage, and note how it ended; a traceback is a bug, with its last lines."""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                outcome = do()
        except (UserInputError, RunFailed) as error:
            stages[name] = _line(error)
        except Exception as error:  # noqa: BLE001  # a traceback is what is looked for
            stages[name] = f"{type(error).__name__}: {_line(error)}"
            found["bugs"].append(f"{name}: {_place(error)}")
        else:
            stages[name] = outcome if isinstance(outcome, str) else YES
        return stages[name] == YES

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found["class"] = save_tiny(model_type, folder / "base")
        except Exception as error:  # noqa: BLE001  # whatever upstream raises: without a model, no audit
            found["not_built"] = f"{type(error).__name__}: {_line(error)}"
            return found
        _drive(folder, stage, found)
    return found


def _drive(folder: Path, stage: Callable[[str, Callable[[], Any]], bool], found: dict[str, Any]) -> None:
    from qlora_neft.runner.run import run

    recipe = load_recipe(_recipe(folder))
    out, cut = folder / "out", folder / "cut"
    stage("fit", lambda: _fit(recipe))
    if not stage("dry run", lambda: run(recipe, out, dry_run=True)):
        return
    if not stage("trains", lambda: run(recipe, out)):
        return
    summary = json.loads((out / "summary.json").read_text())
    found["loss_head"] = (summary.get("loss_check") or {}).get("head")
    found["census"] = summary.get("census")
    stage("resumes", lambda: _resumed(recipe, out, cut, run))
    stage("generates", lambda: _generated(out))
    if stage("merges", lambda: _merged(out, folder / "merged")):
        stage("GGUF", lambda: _gguf(folder / "merged", folder / "model.gguf"))


# ---- The tiny model ----


def save_tiny(model_type: str, folder: Path) -> str:
    """Save a random model of a family with a byte tokenizer, as any checkpoint is; return its class."""
    from transformers import AutoModelForCausalLM

    is_whole = model_type in WHOLES
    config = tiny_whole(model_type) if is_whole else tiny_config(model_type)
    make: Any = AutoModelForCausalLM.from_config
    if is_whole:
        make = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config
    with torch.device("meta"):  # a size that its family's names hide shows before it takes memory
        count = sum(param.numel() for param in make(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"not shrunk: {count} parameters")
    set_seed(0)
    model = make(config, dtype=torch.float32)
    _make_decided(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return type(model).__name__


def _make_decided(model: torch.nn.Module) -> None:
    """Enlarge the matrices: a std of 0.02 makes near-uniform predictions, which hide differences."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 2 and "embed" not in name:
                param.mul_(3)


def _recipe(folder: Path) -> Path:
    import yaml

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = folder / "recipe.yaml"
    values = {
        "model": {"name_or_path": str(folder / "base")},
        "quantization": {"min_nf4_share": 0.0},  # tiny blocks are largely norms, routers and convolutions
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": "all-linear"},
        "neftune": {"noise_alpha": 5.0},
        "data": {"path": str(folder / "rows.jsonl"), "max_length": 250},
        "train": {
            "effective_batch_size": 4,
            "num_train_epochs": 1,
            "max_steps": 2,
            "learning_rate": 1.0e-3,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "max_grad_norm": 0.3,
            "seed": 3,
        },
        "machine": {"device": "cpu", "precision": "fp32", "save_steps": 1},
    }
    path.write_text(yaml.safe_dump(values))
    return path


# ---- The stages ----


def _fit(recipe: Any) -> str:
    from qlora_neft.fit.report import plan_recipe

    plan_recipe(recipe, "16GiB")
    return YES


def _resumed(recipe: Any, out: Path, cut: Path, run: Callable[..., Any]) -> str:
    """Cut a run off after its first step, go on, and compare what it learned with the run that was not cut off."""
    with contextlib.suppress(KeyboardInterrupt, RunInterrupted):
        run(recipe, cut, trainer_class=CutOff)
    run(recipe, cut)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (out, cut))
    differ = [name for name in one if not torch.equal(one[name], two[name])]
    return (
        YES
        if not differ
        else f"resumed, but {len(differ)} of {len(one)} tensors differ from the run that was not cut off"
    )


def _generated(out: Path) -> str:
    """Answer as `qlora-neft generate` does."""
    from qlora_neft.adapter.load import load_trained
    from qlora_neft.generation.decode import Decoding, continuations

    trained = load_trained(out, device="cpu", precision="fp32")
    ids = trained.tokenizer("Say 3")["input_ids"]
    # The pad token never ends an answer, so that each has all of its tokens.
    stop = trained.tokenizer.pad_token_id
    settings = Decoding(max_new_tokens=4, min_new_tokens=4)
    (answer,) = continuations(trained.model, trained.tokenizer, [ids], settings, batch_size=1, stop_token_ids=[stop])
    return YES if len(answer.ids) == 4 else f"{len(answer.ids)} tokens instead of 4"


def _merged(out: Path, merged: Path) -> str:
    from qlora_neft.adapter.folder import find_adapter
    from qlora_neft.adapter.load import tokenizer_of_adapter
    from qlora_neft.export.merge.merge import merge_adapter
    from qlora_neft.export.merge.plan import plan_merge
    from qlora_neft.export.merge.proof import ProofRows

    folder = find_adapter(out)
    tokenizer = tokenizer_of_adapter(folder)
    rows = []
    for row in ROWS[:3]:
        ids = tokenizer(f"{row['instruction']} {row['output']}")["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    merge_adapter(
        plan_merge(folder, dtype="float32"), merged, tokenizer, ProofRows(rows, "the rows of the audit"),
        max_shard_bytes=2**30, device="cpu", say=lambda line: None,
    )  # fmt: skip
    return YES


def _gguf(merged: Path, path: Path) -> str:
    from qlora_neft.export.gguf.model import write_model_gguf

    write_model_gguf(merged, path)
    return YES


def _place(error: BaseException) -> str:
    """Return where an error arose, and its message; of the path only what every machine has."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = frame.filename.partition("site-packages/")[2] or Path(frame.filename).name
    return f"{path}:{frame.lineno}: {type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    """Return an error's message in one line, without the paths of this machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:400]


def clear(folder: Path) -> Path:
    """Return an empty folder of that name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def config_of(model_type: str) -> PreTrainedConfig:
    """Return the tiny configuration that is audited."""
    return tiny_whole(model_type) if model_type in WHOLES else tiny_config(model_type)
