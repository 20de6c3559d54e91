"""eval flips: recipes, runs and models of every make; only the embedding is read."""

import json
import shutil

import pytest
import torch
from command_line import STEPS, invoke, never_stopped, refused
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, VOCABULARY, WIDTH, save_tiny_model
from transformers import AutoModelForCausalLM

from qlora_neft import load_recipe
from qlora_neft.base.checkpoint import read_embedding
from qlora_neft.base.model_files import INDEX, SINGLE
from qlora_neft.errors import UserInputError
from qlora_neft.evaluation.embeddings.flips import token_flips
from qlora_neft.evaluation.embeddings.table import EmbeddingTable


def measured(*arguments):
    code, stdout, stderr = invoke("eval", "flips", *arguments, "--device", "cpu", "--json")
    assert code == 0, stderr
    return json.loads(stdout)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_embedding_read_is_the_models(architecture_dir, architecture):
    folder = str(architecture_dir(architecture))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").get_input_embeddings().weight
    found = read_embedding(folder)
    assert found.shape == (VOCABULARY, WIDTH) and torch.equal(found, expected)


def test_of_shards_only_one_is_read(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    wanted = files["model.embed_tokens.weight"]
    others = {name for name in files.values() if name != wanted}
    assert others
    for name in others:
        (tmp_path / name).write_bytes(b"not to be read")
    assert torch.equal(read_embedding(str(tmp_path)), model.get_input_embeddings().weight)


def test_older_names_are_understood(llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / SINGLE)
    expected = tensors["model.embed_tokens.weight"]
    save_file({key.removeprefix("model."): value for key, value in tensors.items()}, tmp_path / SINGLE)
    assert torch.equal(read_embedding(str(tmp_path)), expected)
    left = {key: value for key, value in tensors.items() if "embed" not in key}
    save_file(left, tmp_path / SINGLE)
    with pytest.raises(UserInputError, match=r"one input embedding, model\.embed_tokens\.weight; it holds none"):
        read_embedding(str(tmp_path))
    (tmp_path / SINGLE).write_bytes(b"short")
    with pytest.raises(UserInputError, match=r"model\.safetensors cannot be read"):
        read_embedding(str(tmp_path))
    (tmp_path / SINGLE).unlink()
    with pytest.raises(UserInputError, match=r"holds no model\.safetensors"):
        read_embedding(str(tmp_path))


def test_a_runs_rows_are_measured_with_their_own_lengths(llama, monkeypatch):
    out = never_stopped(llama)
    monkeypatch.chdir(out.parent)
    report = measured("out", "--alpha", "20,5", "--rows", "9")
    assert [(entry["over"], entry["alpha"]) for entry in report["flips"]] == [("data", 5), ("data", 20)]
    assert report["sequences"] == 9 and report["model"] == str(llama)

    recipe = load_recipe("out/recipe.yaml")
    from qlora_neft.base.config import load_tokenizer
    from qlora_neft.runner.build import data_of

    train = data_of(recipe, load_tokenizer(str(llama))).train
    whole = measured("out", "--alpha", "20", "--rows", "500")["flips"][0]
    assert whole["tokens"] == sum(map(len, train["input_ids"]))
    assert whole["length"] in range(min(map(len, train["input_ids"])), 251)
    # Not the order that the sample has: what no order changes
    assert whole["noise_to_embedding"] == pytest.approx(
        token_flips(EmbeddingTable(read_embedding(str(llama))), [torch.tensor(r) for r in train["input_ids"]], [20.0])[
            0
        ].noise_to_embedding,
        rel=0.01,
    )
    assert measured("out", "--alpha", "20", "--rows", "500")["flips"][0] == whole  # the seed is the recipe's
    assert measured(f"out/checkpoint-{STEPS}", "--alpha", "20", "--rows", "500")["flips"][0] == whole


def test_noise_flips_more_with_alpha_and_less_with_length(llama):
    report = measured(str(llama), "--alpha", "0,5,50", "--length", "20,200")
    assert {entry["over"] for entry in report["flips"]} == {"vocabulary"}
    share = {(entry["length"], entry["alpha"]): entry["share"] for entry in report["flips"]}
    assert share[20, 0] == share[200, 0] == 0
    assert share[20, 50] > share[200, 50] > 0 and share[20, 50] > share[20, 5]
    clean, *noisy = report["singular_values"]
    assert clean["length"] is None and [entry["alpha"] for entry in noisy] == [5, 50]
    assert {entry["length"] for entry in noisy} == {20} and len(clean["cosine"]) == WIDTH
    assert sum(clean["cosine"]) == pytest.approx(VOCABULARY - 1, rel=1e-4)  # the row of <pad> is zero
    assert all(a > b for a, b in zip(noisy[1]["inner_product"], clean["inner_product"], strict=True))


def test_a_recipe_the_tables_and_the_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("demo", "data.split=train[:20]", "--length", "64", "--device", "cpu", "--picture", "noise.png")
    code, stdout, stderr = invoke("eval", "flips", *arguments)
    assert code == 0 and "written: noise.png" in stderr
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")
    lines = stdout.splitlines()
    assert "data: 20 rows" in stdout and any("vocabulary" in line and " 64 " in line for line in lines)
    assert any("alpha 15, L 64" in line for line in lines) and "flipped most often at alpha 15" in stdout
    assert max(map(len, lines[:-1])) <= 80


def test_weights_without_a_tokenizer_name_tokens_by_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    worst = measured("./model", "--alpha", "90", "--length", "10")["flips"][0]
    assert worst["pairs"] and all(
        pair["text"] == [str(pair["token"]), str(pair["nearest"])] and pair["token"] != pair["nearest"]
        for pair in worst["pairs"]
    )


def test_wrong_input_is_told(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def message(*arguments):
        return refused("eval", "flips", *arguments)

    assert "--alpha: must be numbers of 0 or more" in message("demo", "--alpha", "5,x")
    assert "got '-1'" in message("demo", "--alpha=-1")
    assert "--alpha" in message("demo", "--alpha", "nan")
    assert "--length: must be whole numbers of 1 or more" in message("demo", "--length", "0")
    assert "--device" in message("demo", "--device", "abacus")
    assert "unknown recipe. Did you mean demo?" in message("demos")
    assert "no recipe to change" in message(str(llama), "lora.r=8")
    assert "no such file" in message("recipes/none.yaml")
    assert "no adapter" in message(str(tmp_path))
    assert "nobody/nothing" in message("nobody/nothing")
    assert "bundled:none" in message("bundled:none")


def test_the_old_name_still_works(llama):
    arguments = (str(llama), "--alpha", "5", "--device", "cpu", "--json")
    assert invoke("eval", "noise", *arguments) == invoke("eval", "flips", *arguments)
