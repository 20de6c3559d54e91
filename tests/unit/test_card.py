"""What a model card says, from records alone."""

import re

import pytest
from huggingface_hub import ModelCard

from qlora_neft.export.consumers import Facts, verdict_for
from qlora_neft.export.hub.card import card_data, render_card
from qlora_neft.export.hub.public import PublicBase, public_recipe, public_recipe_text
from qlora_neft.export.hub.records import Records, Training
from qlora_neft.export.hub.usage import snippets
from qlora_neft.recipe import load_recipe, recipe_of_record
from qlora_neft.recipe.schema import Quantization
from qlora_neft.run_folder.record import RunSummary

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["m.0.q_proj", "m.1.q_proj", "m.0.k_proj"]}
PART = {"rows": 52002, "tokens": 3_000_000, "trained_tokens": 900_000, "truncated": 7, "sha256": "ab" * 32}
FACTS = {
    "status": "done",
    "steps": 3251,
    "tokens_seen": 3_000_123,
    "trained_tokens_seen": 900_045,
    "before": {"clean_train_loss": 1.5, "held_out_loss": 1.6},
    "after": {"clean_train_loss": 1.25, "held_out_loss": 1.375, "exact_match": 0.25, "answers": 40},
    "hardware": {"device": "cuda:0", "name": "Tesla T4", "threads": 8, "platform": "Linux-1-secret-host"},
    "peak_memory": {"host_bytes": 2 * 2**30, "cuda_reserved_bytes": 11 * 2**30},
    "versions": {"torch": "2.11.0", "trl": "not installed"},
    "train_seconds": 7260.0,
    "data": {
        "train": PART,
        "eval": {**PART, "rows": 100},
        "sources": [{"path": "tatsu-lab/alpaca", "rows": 52002, "format": "alpaca", "prompt_template": "alpaca"}],
        "warnings": [],
    },
}


def made(*overrides, facts=FACTS, log=(), config=CONFIG, license=None, recipe="llama2-7b-alpaca", step=None):
    """A card, parsed, and the summary it was made from."""
    stated = load_recipe(recipe, overrides) if recipe else None
    base = PublicBase("meta-llama/Llama-2-7b-hf", COMMIT)
    training = Training(base, stated, Records(RunSummary.of(facts), list(log), step), "bfloat16", "float32")
    public = public_recipe(stated, base) if stated else None
    text = render_card(
        "ann/my-adapter",
        training,
        public,
        config,
        snippets("ann/my-adapter", base, config, Quantization(), None, None),
        license or {},
        has_curves=True,
        license_is_bases=True,
    )
    assert "Undefined" not in text and "None" not in text and "\n\n\n\n" not in text
    return ModelCard(text), training.summary()


def test_the_front_matter_is_what_the_hub_reads():
    card, _ = made("data.eval_fraction=0.02", license={"license": "other", "license_name": "llama2"})
    front = card.data.to_dict()
    assert front["library_name"] == "peft" and front["pipeline_tag"] == "text-generation"
    assert front["base_model"] == "meta-llama/Llama-2-7b-hf" and front["base_model_relation"] == "adapter"
    assert front["datasets"] == ["tatsu-lab/alpaca"] and "language" not in front
    assert front["license"] == "other" and front["license_name"] == "llama2"
    wanted = {"lora", "qlora", "neftune", "bitsandbytes", "nf4", "base_model:adapter:meta-llama/Llama-2-7b-hf"}
    assert wanted <= set(front["tags"])
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["loss"].metric_value == 1.375 and results["exact_match"].metric_value == 0.25
    assert results["loss"].dataset_type == "tatsu-lab/alpaca" and card.data.model_name == "my-adapter"


def test_the_receipt_has_every_number():
    log = [{"step": n, "neftune_norm": 2.0 + n, "neftune_noise_to_embedding": 0.5} for n in (0, 1)]
    card, summary = made(log=log)
    text = card.text
    assert summary["neftune"]["measured_norm"] == 2.5
    for fact in (
        f"commit `{COMMIT}`",
        "bfloat16, rounded from float32",
        "alpha 5, uniform",
        f"expected norm {5 / 3**0.5:.3f} per sequence (alpha / sqrt(3))",
        "norm 2.500, 0.5 of the embeddings' norm",
        "3,000,123, 900,045 of them trained",
        "| held-out loss (nats per token) | 1.6000 | 1.3750 |",
        "| exact answers, held out |  | 25.0% |",
        "learning rate 0.0002, constant",
        "3,251 of 16 sequences each, seed 0",
        "52,002 sequences",
        PART["sha256"],
        "Tesla T4 (cuda:0)",
        "11.00 GiB on the GPU, 2.00 GiB in the process",
        "2.0 h",
        "r 64, lora_alpha 16, dropout 0.1, on k_proj, q_proj; the update is scaled by 0.25 |",
        "qlora-neft train recipe.yaml",
    ):
        assert fact in text, fact
    assert "secret-host" not in text + str(summary) and "trl" not in text.split("versions")[1].split("\n")[0]


def test_scale_and_rates_are_said():
    overrides = "lora.use_rslora=true", "train.loraplus_lr_ratio=16"
    text = made(*overrides, config={**CONFIG, "use_rslora": True})[0].text
    assert "; the update is scaled by 2, lora_alpha / sqrt(r): use_rslora |" in text  # 16 / sqrt(64)
    assert "learning rate 0.0002, times 16 for the matrices B (LoRA+), constant" in text
    assert "scaled by" not in made(config={**CONFIG, "alpha_pattern": {"q_proj": 3}})[0].text


def test_without_noise_nothing_says_neftune_but_that_there_was_none():
    card, _ = made("neftune.noise_alpha=0")
    assert "neftune" not in card.data.tags and "| NEFTune | none |" in card.text and "2310.05914" not in card.text


def test_what_is_not_on_record_is_left_out():
    card, _ = made(facts={})
    for word in ("tokens seen", "hardware", "peak memory", "training time", "versions", "Before and after", "SHA-256"):
        assert word not in card.text
    assert card.data.eval_results is None and "Nothing was measured" in card.text
    assert "not known; see the base" in card.text and "license" not in card.data.to_dict()


def test_an_adapter_of_another_program_gets_a_short_card():
    card, summary = made(facts={}, recipe=None)
    assert "no record of how it was trained" in card.text and "How it was trained" not in card.text
    assert not {"qlora", "neftune", "nf4", "qlora_neft"} & set(card.data.tags)
    assert set(summary) == {"summary_version", "base", "adapter"}


def test_a_checkpoint_says_its_step():
    facts = {"before": {"held_out_loss": 1.6}, "latest": {"held_out_loss": {"step": 30, "value": 1.5}}, "steps": 35}
    card, summary = made(facts=facts, step=35)
    assert summary["checkpoint_step"] == 35 and "a checkpoint after step 35" in card.text
    assert "| 1.6000 | 1.5000 (step 30) |" in card.text
    assert card.data.eval_results[0].metric_value == 1.5


@pytest.mark.parametrize(
    ("path", "published", "on_hub"),
    [
        ("tatsu-lab/alpaca", "tatsu-lab/alpaca", True),
        ("bundled:demo/train.jsonl", "bundled:demo/train.jsonl", False),
        ("/home/ann/private/rows.jsonl", "rows.jsonl", False),
        ("data/rows.jsonl", "rows.jsonl", False),
        ("~/corpora/*.parquet", "*.parquet", False),
        ("C:\\Users\\ann\\rows.csv", "rows.csv", False),
    ],
)
def test_of_a_local_path_the_name_alone_is_published(path, published, on_hub, tmp_path):
    values = load_recipe("llama2-7b-alpaca").to_dict()
    values["data"] |= {"path": path, "mixture": [{"path": path, "prompt_template": "/home/ann/mine.jinja"}]}
    values["machine"]["mirror_dir"] = "/mnt/drive/ann"
    stated = recipe_of_record(values)
    public = public_recipe(stated, PublicBase("a/b", COMMIT))
    text = public_recipe_text(public)
    assert public.data.path == published and public.data.mixture[0].path == published
    assert public.data.mixture[0].prompt_template == "chat_template.jinja"
    assert "ann" not in text and "mirror_dir" not in text
    (tmp_path / "recipe.yaml").write_text(text)
    again = load_recipe(tmp_path / "recipe.yaml")
    assert (again.model.name_or_path, again.model.revision) == ("a/b", COMMIT)
    training = Training(PublicBase("a/b", None), stated, Records(RunSummary(), []), "float32", "float32")
    tagged = card_data("ann/x", training, public, {}).datasets
    assert (tagged == [path]) == on_hub and (tagged is None) != on_hub


def vllm(**config):
    """The card's command for vLLM, in a list that is empty without one."""
    found = snippets("ann/x", PublicBase("a/b", COMMIT), {**CONFIG, **config}, Quantization(), None, None)
    return [snippet.code for snippet in found if snippet.title == "vLLM"]


def test_vllm_is_given_the_rank_and_left_out_where_it_cannot():
    assert "--max-lora-rank 64" in vllm()[0] and f"--revision {COMMIT}" in vllm()[0]
    assert "--max-lora-rank 32" in vllm(r=24)[0]


def test_card_and_check_give_vllm_the_same_flag_for_every_rank():
    def flags(command):
        return [] if command is None else re.findall(r"--max-lora-rank \d+", command)

    for rank in range(1, 1025):
        facts = Facts("ann/x", {**CONFIG, "r": rank}, "a/b", None, {"q_proj": rank}, (), ("F32",), None)
        checked, on_card = verdict_for("vllm", facts).command, [*vllm(r=rank), None][0]
        assert (checked is None) == (on_card is None) == (rank > 512), rank
        assert flags(checked) == flags(on_card) and bool(flags(checked)) == (16 < rank <= 512), rank


def test_the_card_advises_no_merge_that_is_refused():
    def titles(**config):
        found = snippets("ann/x", PublicBase("a/b", COMMIT), {**CONFIG, **config}, Quantization(), None, None)
        return {snippet.title.split(",")[0]: snippet.note for snippet in found}

    assert "The adapter alone" in titles()["GGUF"] and "Merged into a plain 16-bit model" in titles()
    assert "The adapter alone" not in titles(modules_to_save=["lm_head"])["GGUF"]
    assert not {"GGUF", "Merged into a plain 16-bit model"} & titles(use_dora=True).keys()
