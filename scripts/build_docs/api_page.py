"""The reference of the Python names, as directives that mkdocstrings fills from the docstrings."""

from __future__ import annotations

INTRO = """# Python

Generated from the docstrings. `from qlora_neft import ...` provides the first group, and imports torch only when a
name needs it.
"""

NAMES = {
    "Train": (
        "qlora_neft.runner.run.run",
        "qlora_neft.recipe.load_recipe",
        "qlora_neft.recipe.list_recipes",
        "qlora_neft.recipe.Recipe",
        "qlora_neft.errors.RecipeError",
        "qlora_neft.trainer.QLoRANeftConfig",
        "qlora_neft.trainer.QLoRANeftTrainer",
    ),
    "The parts of a run": (
        "qlora_neft.noise.neftune.NEFTuneNoise",
        "qlora_neft.noise.neftune.noisy_embeddings",
        "qlora_neft.noise.neftune.noise_scale",
        "qlora_neft.noise.neftune.expected_norm",
        "qlora_neft.base.nf4.load_nf4_base",
        "qlora_neft.data.prepare.prepare_data",
        "qlora_neft.fit.report.plan_recipe",
        "qlora_neft.fit.report.fit_report",
        "qlora_neft.fit.report.FitReport",
    ),
    "What was trained": (
        "qlora_neft.adapter.folder.find_adapter",
        "qlora_neft.adapter.load.load_trained",
        "qlora_neft.adapter.load.Trained",
        "qlora_neft.generation.decode.Decoding",
        "qlora_neft.generation.generate.generate",
        "qlora_neft.generation.generate.Reply",
        "qlora_neft.generation.chat.Chat",
    ),
    "Hand it over": (
        "qlora_neft.export.merge.plan.plan_merge",
        "qlora_neft.export.merge.merge.merge_adapter",
        "qlora_neft.export.gguf.lora.write_lora_gguf",
        "qlora_neft.export.gguf.model.write_model_gguf",
    ),
    "Errors": (
        "qlora_neft.errors.UserInputError",
        "qlora_neft.errors.RunFailed",
        "qlora_neft.errors.RunInterrupted",
    ),
}


def text() -> str:
    """Return the page."""
    groups = ("".join(f"\n::: {name}\n" for name in names) for names in NAMES.values())
    return INTRO + "".join(f"\n## {title}\n{group}" for title, group in zip(NAMES, groups, strict=True))
