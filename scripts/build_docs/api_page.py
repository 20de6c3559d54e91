"""The reference of the Python names, as directives that mkdocstrings fills from the docstrings."""

from __future__ import annotations

INTRO = """# Python

Made from the docstrings. `from qlora_neft import ...` gives the first group without importing torch before it is
needed.
"""

NAMES = {
    "Train": (
        "qlora_neft.run.run",
        "qlora_neft.recipe.load_recipe",
        "qlora_neft.recipe.list_recipes",
        "qlora_neft.recipe.Recipe",
        "qlora_neft.errors.RecipeError",
        "qlora_neft.trainer.QLoRANeftConfig",
        "qlora_neft.trainer.QLoRANeftTrainer",
    ),
    "The parts of a run": (
        "qlora_neft.neftune.NEFTuneNoise",
        "qlora_neft.neftune.noisy_embeddings",
        "qlora_neft.neftune.noise_scale",
        "qlora_neft.neftune.expected_norm",
        "qlora_neft.quantization.load_nf4_base",
        "qlora_neft.data.prepare.prepare_data",
        "qlora_neft.fit.report.fit_report",
    ),
    "What was trained": (
        "qlora_neft.trained.folder.find_adapter",
        "qlora_neft.trained.load.load_trained",
        "qlora_neft.trained.load.Trained",
        "qlora_neft.decoding.Decoding",
        "qlora_neft.talk.generate.generate",
        "qlora_neft.talk.generate.Reply",
        "qlora_neft.talk.chat.Chat",
    ),
    "Hand it over": (
        "qlora_neft.merging.plan.plan_merge",
        "qlora_neft.merging.merge.merge_adapter",
        "qlora_neft.gguf_export.lora.write_lora_gguf",
        "qlora_neft.gguf_export.model.write_model_gguf",
    ),
    "Errors": (
        "qlora_neft.errors.UserInputError",
        "qlora_neft.errors.RunFailed",
        "qlora_neft.errors.RunInterrupted",
    ),
}


def text() -> str:
    """The page."""
    groups = ("".join(f"\n::: {name}\n" for name in names) for names in NAMES.values())
    return INTRO + "".join(f"\n## {title}\n{group}" for title, group in zip(NAMES, groups, strict=True))
