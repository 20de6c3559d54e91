"""A finished run is found, loaded and prompted as it was trained."""

import json
import re
import shutil
import types

import pytest
import torch
from command_line import adapter, cut_off, never_stopped

from qlora_neft.adapter.folder import CONFIG, find_adapter
from qlora_neft.adapter.load import load_trained, with_adapter
from qlora_neft.data.templates import alpaca_prompt
from qlora_neft.errors import UserInputError
from qlora_neft.export.consumers import facts_of
from qlora_neft.export.gguf.lora import write_lora_gguf
from qlora_neft.export.hub.folder import stored_dtype
from qlora_neft.export.merge.plan import plan_merge
from qlora_neft.generation.decode import Decoding, generate_ids


@pytest.fixture(scope="module")
def trained(llama):
    return load_trained(never_stopped(llama), device="cpu", precision="fp32")


def test_the_records_of_the_run_are_found(llama, trained):
    assert trained.folder.base == str(llama) and trained.folder.recipe.data.max_length == 250
    assert trained.folder.summary["status"] == "done"
    assert trained.prompts.name == "alpaca" and trained.prompts.stop_token_ids == (258,)
    assert trained.prompts.text([{"role": "user", "content": "Repeat 1"}]) == alpaca_prompt("Repeat 1")


def test_the_prompt_is_the_one_of_training(trained):
    ids = trained.prompts.ids([{"role": "user", "content": "Repeat 1"}])
    assert ids == [*alpaca_prompt("Repeat 1").encode()] or trained.tokenizer.decode(ids) == alpaca_prompt("Repeat 1")


def test_the_adapter_is_the_one_on_disk(llama, trained):
    from safetensors.torch import load

    stored = load(adapter(never_stopped(llama)))
    loaded = {n: p for n, p in trained.model.named_parameters() if "lora_" in n}
    assert len(loaded) == len(stored)
    for name, tensor in stored.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)


def test_the_base_alone_answers_differently(trained):
    ids = torch.tensor([trained.prompts.ids([{"role": "user", "content": "Repeat 1"}])])
    with torch.no_grad():
        tuned = trained.model(input_ids=ids).logits
        with trained.base_alone():
            base = trained.model(input_ids=ids).logits
        again = trained.model(input_ids=ids).logits
    assert torch.equal(tuned, again) and not torch.allclose(tuned, base)


def test_answers_do_not_depend_on_their_batch(trained):
    prompts = [trained.prompts.ids([{"role": "user", "content": f"Repeat {n}" * n}]) for n in range(1, 5)]
    decoding = Decoding(max_new_tokens=12)
    options = {"stop_token_ids": trained.prompts.stop_token_ids}
    together = dict(generate_ids(trained.model, trained.tokenizer, prompts, decoding, batch_size=4, **options))
    alone = dict(generate_ids(trained.model, trained.tokenizer, prompts, decoding, batch_size=1, **options))
    assert together == alone and len(together) == 4


def test_a_checkpoint_has_the_recipe_of_its_run(llama):
    [newest] = (cut_off(llama) / "out").glob("checkpoint-12")
    folder = find_adapter(newest)
    assert folder.recipe.lora.r == 4 and folder.base == str(llama)


def test_folders_without_an_adapter_are_refused(llama, tmp_path):
    def message(source):
        with pytest.raises(UserInputError) as caught:
            find_adapter(source)
        return str(caught.value)

    assert "checkpoint-12" in message(cut_off(llama) / "out")
    assert "a model and no adapter" in message(llama)
    assert "no such folder" in message(tmp_path / "none")
    assert "no such folder, and the Hub" in message("nobody/nothing")
    out = shutil.copytree(never_stopped(llama), tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert "LoRA" in message(out)
    (out / "adapter_config.json").write_text("{")
    assert "cannot be read" in message(out)


def test_a_base_it_was_not_trained_on_is_refused(llama, architecture_dir):
    with pytest.raises(UserInputError, match="does not fit the base"):
        load_trained(never_stopped(llama), base=str(architecture_dir("phi")), device="cpu", precision="fp32")


def test_a_base_that_is_not_there_is_named_as_the_caller_knows_it(llama, tmp_path):
    with pytest.raises(UserInputError, match=r"^--base: no folder at '/none/such'"):
        load_trained(never_stopped(llama), base="/none/such", device="cpu", precision="fp32")
    out = shutil.copytree(never_stopped(llama), tmp_path / "out")
    (out / "recipe.yaml").unlink()
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/moved/away"}))
    with pytest.raises(UserInputError, match=f"^{out}: its base: no folder at '/moved/away'.*--base.$"):
        load_trained(out, device="cpu", precision="fp32")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("init_lora_weights", "pissa", "sets init_lora_weights: 'pissa', which changes the base as it is loaded"),
        ("init_lora_weights", "pissa_niter_4", "sets init_lora_weights: 'pissa_niter_4'"),
        ("init_lora_weights", "olora", "sets init_lora_weights: 'olora'"),
        ("init_lora_weights", "corda", "sets init_lora_weights: 'corda'"),
        ("megatron_config", {"a": 1}, "sets megatron_config, which is not loaded here"),
    ],
)
def test_what_would_run_as_it_is_loaded_is_refused(llama, tmp_path, monkeypatch, key, value, said):
    for name in (CONFIG, "adapter_model.safetensors"):
        shutil.copyfile(never_stopped(llama) / name, tmp_path / name)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, key: value, "megatron_core": "os"}))
    monkeypatch.setattr("qlora_neft.adapter.load.base_of_adapter", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(UserInputError, match=re.escape(said)):
        load_trained(tmp_path)
    base = types.SimpleNamespace()  # for a run that goes on from an adapter, whose base is there already
    with pytest.raises(UserInputError, match=re.escape(said)):
        with_adapter(base, find_adapter(tmp_path))


def test_damaged_weights_are_not_mistaken_for_those_of_another_base(llama, tmp_path):
    out = shutil.copytree(never_stopped(llama), tmp_path / "out")
    weights = (out / "adapter_model.safetensors").read_bytes()
    (out / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    for read in (
        lambda: load_trained(out, device="cpu", precision="fp32"),
        lambda: write_lora_gguf(find_adapter(out), tmp_path / "a.gguf"),
        lambda: plan_merge(find_adapter(out)),
        lambda: stored_dtype(out / "adapter_model.safetensors"),
        lambda: facts_of(find_adapter(out)),
    ):
        with pytest.raises(UserInputError, match=r"adapter_model.safetensors:? cannot be read .*Copy or download it"):
            read()
    assert not (tmp_path / "a.gguf").exists()
