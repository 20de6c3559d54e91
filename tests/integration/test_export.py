"""A trained adapter becomes a folder to publish: complete, the same each time, with nothing of the machine."""

import getpass
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import adapter, contents, cut_off, invoke, never_stopped, refused
from hub_server import HubServer
from hub_server.repositories import Blob
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.export.hub.base import public_base
from qlora_neft.recipe import load_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = ("--base-id", "ann/tiny-base", "--base-revision", COMMIT)
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "loss.png",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_summary.json",
}


@pytest.fixture
def run_dir(llama, tmp_path, monkeypatch):
    """A finished run in the current directory, as ``out``."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(never_stopped(llama), tmp_path / "out")


def exported(*arguments):
    """A dry run that succeeds: the card on stdout, and what was said."""
    code, stdout, stderr = invoke("export", "out", "--repo-id", "ann/tiny", "--dry-run", *arguments)
    assert code == 0, stderr
    return stdout, stderr


def test_a_dry_run_writes_the_folder_and_shows_the_card(run_dir):
    before = contents("out")
    card, said = exported(*BASE, "--license", "apache-2.0")
    folder = run_dir / "export"
    assert {path.name for path in folder.iterdir()} == FILES
    assert card == (folder / "README.md").read_text() and "nothing was pushed" in said and "private" in said
    assert {name: sha for name, sha in contents("out").items() if not name.startswith("export")} == before
    assert adapter(folder) == adapter("out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("ann/tiny-base", COMMIT)
    assert config["inference_mode"] is True and config["target_modules"] == sorted(config["target_modules"])
    recipe = load_recipe(folder / "recipe.yaml").to_dict()
    ran = load_recipe("out/recipe.yaml").to_dict()
    model = {"name_or_path": "ann/tiny-base", "revision": COMMIT}
    assert recipe.pop("model") == {**model, "adapter": None, "adapter_revision": None}
    assert recipe == {key: value for key, value in ran.items() if key != "model"}


def test_the_card_says_what_the_run_measured(run_dir):
    exported(*BASE, "--license", "apache-2.0")
    card, ran = ModelCard.load(run_dir / "export/README.md"), json.loads((run_dir / "summary.json").read_text())
    assert card.data.base_model == "ann/tiny-base" and card.data.license == "apache-2.0"
    [result] = card.data.eval_results
    assert result.metric_value == ran["after"]["held_out_loss"] and result.dataset_name == "held.jsonl"
    assert f"| {ran['before']['held_out_loss']:.4f} | {ran['after']['held_out_loss']:.4f} |" in card.text
    assert (
        f"{ran['tokens_seen']:,}" in card.text and ran["base_sha256"] in card.text and "2.887 per sequence" in card.text
    )
    summary = json.loads((run_dir / "export/training_summary.json").read_text())
    assert summary["base_sha256"] == ran["base_sha256"] and summary["after"] == ran["after"]
    assert summary["neftune"]["measured_norm"] == pytest.approx(5 / 3**0.5, rel=0.01)
    assert summary["data"]["train"]["sha256"] == ran["data"]["train"]["sha256"]
    assert ran["data"]["train"]["tokens_sha256"] == ran["identity"]["tokens"] and ran["identity"]["tokens"] in card.text


def test_nothing_of_the_machine_is_in_it(llama, run_dir, tmp_path, monkeypatch):
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["data"]["path"] = str(tmp_path / "secret_place" / "train.jsonl")
    recipe["machine"]["mirror_dir"] = str(tmp_path / "drive")
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["data"]["sources"][0]["path"] = recipe["data"]["path"]
    summary["data"]["warnings"] = [f"data.path: {recipe['data']['path']!r}: 2.0% of the tokens are trained."]
    summary["decisions"] = [f"mirror {tmp_path}: not everything could be copied"]
    (run_dir / "summary.json").write_text(json.dumps(summary))
    tokenizer = json.loads((run_dir / "tokenizer_config.json").read_text())
    (run_dir / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "name_or_path": str(llama)}))
    monkeypatch.setenv("HF_TOKEN", "not-a-real-token-1234")
    exported(*BASE)
    secrets = [str(tmp_path), str(llama), str(Path.home()) + "/", "secret_place", "drive", "not-a-real-token-1234"]
    secrets += [getpass.getuser()] if getpass.getuser() != "root" else []
    for path in (run_dir / "export").iterdir():
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path.name
    assert "train.jsonl" in (run_dir / "export/README.md").read_text()


def test_a_path_that_no_rule_foresaw_stops_the_export(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps({**summary, "precision": f"see {run_dir}/notes"}))
    code, _, stderr = invoke("export", "out", "--repo-id", "ann/tiny", "--dry-run", *BASE)
    assert code == 1 and "would publish the path" in stderr and not (run_dir / "export").exists()


def test_a_token_in_a_file_is_refused(run_dir, monkeypatch):
    config = json.loads((run_dir / "tokenizer_config.json").read_text())
    (run_dir / "tokenizer_config.json").write_text(json.dumps({**config, "token": "hf_" + "a1" * 17}))
    message = refused("export", "out", "--repo-id", "ann/tiny", "--dry-run", *BASE)
    assert "tokenizer_config.json" in message and "access token" in message and "a1a1" not in message
    (run_dir / "tokenizer_config.json").write_text(json.dumps({**config, "note": "my-own-password"}))
    monkeypatch.setenv("HF_TOKEN", "my-own-password")
    assert "access token" in refused("export", "out", "--repo-id", "ann/tiny", "--dry-run", *BASE)


DRY_RUN = ("export", "out", "--repo-id", "ann/tiny", "--dry-run", *BASE)


@pytest.mark.parametrize("name", ["vocab.txt", "chat_template.jinja", "adapter_config.json", "summary.json"])
def test_a_link_out_of_the_folder_is_not_followed(run_dir, tmp_path, name):
    """A key's text was published as the vocabulary of an adapter that somebody else had packed."""
    secret = tmp_path / "elsewhere" / name
    secret.parent.mkdir()
    secret.write_bytes((run_dir / name).read_bytes() if (run_dir / name).exists() else b"KEY")
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(Path("..") / "elsewhere" / name)
    message = refused(*DRY_RUN)
    assert message.startswith(f"out: {name} is a link that leads out of the folder") and "KEY" not in message
    assert not (run_dir / "export").exists()
    for verb in (("merge", "out", "merged", "--no-proof"), ("gguf", "out", "adapter.gguf")):
        assert "leads out of the folder" in refused(*verb)


def test_other_files_are_not_published(run_dir):
    for name in ("notes.md", "id_rsa", "tokenizer.json.bak", ".env", "optimizer.pt", "loss.svg"):
        (run_dir / name).write_text("hunter2")
    (run_dir / "vocab.json").write_text(json.dumps({"/root": 0, "/content": 1}))  # tokens, not places
    exported(*BASE)
    assert not [path.name for path in (run_dir / "export").iterdir() if b"hunter2" in path.read_bytes()]
    (run_dir / "vocab.txt").write_text("the password is\nhunter2\n")
    message = refused(*DRY_RUN)
    assert "vocab.txt: has the name of a tokenizer's file" in message and "hunter2" not in message


def test_paths_of_this_machine_are_named_before_a_push(run_dir):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}\n{# see /home/wendy/t.jinja #}"
    (run_dir / "chat_template.jinja").write_text(template)
    message = refused(*DRY_RUN)
    assert "would be published" in message and "chat_template.jinja:2: '/home/wendy/t.jinja'" in message
    assert not (run_dir / "export").exists()
    code, _, stderr = invoke("merge", "out", "merged", "--no-proof")
    assert code == 0 and "chat_template.jinja, line 2, names '/home/wendy/t.jinja'" in stderr
    assert json.loads(Path("merged/merge_report.json").read_text())["adapter"] == "out"


def test_the_same_run_gives_the_same_bytes(run_dir):
    exported(*BASE)
    first = contents("out/export")
    exported(*BASE, "--output", "again")
    assert contents("again") == first
    exported(*BASE)  # in place of an export that nobody touched
    assert contents("out/export") == first
    (run_dir / "export/README.md").write_text("better words")
    message = refused("export", "out", "--repo-id", "ann/tiny", "--dry-run", *BASE)
    assert "was changed since" in message and "README.md" in message


def test_the_weights_may_be_rounded(run_dir):
    exported(*BASE, "--dtype", "bfloat16")
    rounded, trained = (load_file(Path("out", place, "adapter_model.safetensors")) for place in ("export", "."))
    assert rounded.keys() == trained.keys()
    assert all(torch.equal(rounded[name], trained[name].bfloat16()) for name in trained)
    assert "bfloat16, rounded from float32" in (run_dir / "export/README.md").read_text()
    exported(*BASE, "--dtype", "float32", "--output", "plain")
    assert adapter("plain") == adapter("out")


def test_a_checkpoint_is_exported_beside_itself(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cut_off(llama) / "out", "out")
    before = contents("out/checkpoint-12")
    code, card, _ = invoke("export", "out/checkpoint-12", "--repo-id", "ann/tiny", "--dry-run", *BASE)
    assert code == 0 and "a checkpoint after step 12" in card and contents("out/checkpoint-12") == before
    folder = Path("out/export-checkpoint-12")
    assert {path.name for path in folder.iterdir()} == FILES and adapter(folder) == adapter("out/checkpoint-12")
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary["checkpoint_step"] == 12 and summary["tokens_seen"] > 0 and "after" not in summary
    # The signal came in step 12, whose measurements are left out: they may outlast the grace period.
    assert set(summary["latest"]) == {"clean_train_loss", "held_out_loss"} and "(step 8)" in card


def test_a_template_of_the_users_is_published_as_the_tokenizers(run_dir):
    (run_dir / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}></s>{% endfor %}")
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["data"]["prompt_template"] = "/private/mine.jinja"
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["data"]["sources"][0]["prompt_template"] = "/private/mine.jinja"
    (run_dir / "summary.json").write_text(json.dumps(summary))
    card, _ = exported(*BASE)
    assert "tokenizer.apply_chat_template(" in card and "add_special_tokens=False" in card
    assert "hf download ann/tiny recipe.yaml chat_template.jinja" in card
    published = {path.name: path.read_bytes() for path in (run_dir / "export").iterdir()}
    assert published.keys() == FILES | {"chat_template.jinja"}
    assert not [name for name, content in published.items() if b"/private" in content]
    assert load_recipe(run_dir / "export/recipe.yaml").data.prompt_template == "chat_template.jinja"


def test_an_adapter_of_another_program(run_dir):
    Path("theirs").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(run_dir / name, "theirs")
    code, card, _ = invoke("export", "theirs", "--repo-id", "ann/tiny", "--dry-run", *BASE)
    assert code == 0 and "no record of how it was trained" in card and 'from_pretrained("ann/tiny-base")' in card
    wanted = {"README.md", "adapter_config.json", "adapter_model.safetensors", "training_summary.json"}
    assert {path.name for path in Path("theirs/export").iterdir()} == wanted


def test_what_cannot_be_published_is_refused(llama, run_dir, tmp_path):
    def message(*arguments, source="out", repo_id="ann/tiny"):
        return refused("export", source, "--repo-id", repo_id, "--dry-run", *arguments)

    assert "local base" in message() and "--base-id owner/name" in message()
    for repo_id in ("tiny", "a/b/c", "ann/ti ny", "/tmp/x", "ann/.."):
        assert "--repo-id: must be owner/name" in message(*BASE, repo_id=repo_id)
    assert "40 hexadecimal digits" in message("--base-id", "ann/base", "--base-revision", "main")
    assert "--base-id: must be a Hub id" in message("--base-id", str(llama))
    assert "--license" in message(*BASE, "--license", "My License")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("years of work")
    assert "nothing in it may be lost" in message(*BASE, "--output", "full")
    assert "is not a folder" in message(*BASE, "--output", "full/thesis.txt")
    assert "cannot be written" in message(*BASE, "--output", "full/thesis.txt/x")
    shutil.copytree(cut_off(llama) / "out", "unfinished")
    assert "not finished" in message(*BASE, source="unfinished")
    Path("out/adapter_model.safetensors").write_bytes(b"cut off")
    assert "cannot be read" in message(*BASE)


def test_the_base_is_found_by_its_place_in_the_cache(run_dir, tmp_path):
    cached = tmp_path / "hub" / "models--ann--tiny-base" / "snapshots" / COMMIT
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["model"]["name_or_path"] = str(cached)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert public_base(find_adapter(run_dir)) == ("ann/tiny-base", COMMIT)


def test_a_base_on_the_hub_is_pinned_to_the_commit_of_the_training(run_dir):
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["model"]["name_or_path"] = "ann/tiny-base"
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert public_base(find_adapter(run_dir)) == ("ann/tiny-base", None)  # not recorded, and the Hub is not asked
    _, said = exported()
    assert "not known and not pinned" in said and "--license" in said
    assert "its commit is not known" in (run_dir / "export/README.md").read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps({**summary, "base_commit": COMMIT}))
    assert public_base(find_adapter(run_dir)) == ("ann/tiny-base", COMMIT)
    assert public_base(find_adapter(run_dir), None, "f" * 40) == ("ann/tiny-base", "f" * 40)


def test_of_a_repository_only_files_of_known_names_are_fetched(run_dir, tmp_path, monkeypatch, capfd):
    """The bars of a download print names as they are, and a terminal would obey this one."""
    with HubServer() as hub:
        hub.use(monkeypatch, None, cache=tmp_path / "cache")
        theirs = {"\x1b]0;owned\x07.json": b"{}", "more.json": b"{}", "deep/config.json": b"{}"}
        known = ("adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "summary.json", "tokenizer.json")
        hub.add_repo("ann/x").add({name: (run_dir / name).read_bytes() for name in known} | theirs)
        folder = find_adapter("ann/x")
    assert {path.name for path in folder.path.iterdir()} == set(known)
    assert "owned" not in "".join(capfd.readouterr())


def test_a_base_the_hub_does_not_show_is_refused(run_dir, monkeypatch):
    with HubServer() as hub:
        hub.add_user("ann", write="hf_annwrite0123456789abcdef")
        hub.use(monkeypatch, "hf_annwrite0123456789abcdef")
        message = refused("export", "out", "--repo-id", "ann/tiny", "--base-id", "ann/typo")
        assert "--base-id: the Hub shows no model 'ann/typo'" in message and "ann/tiny" not in hub.repos
        hub.add_repo("ann/base").commit("main", "weights", "", "ann", {})
        code, _, said = invoke("export", "out", "--repo-id", "ann/tiny", "--base-id", "ann/base", "--revision", "dev")
        assert code == 0 and "its card names none" in said
        config = json.loads(hub.repo("ann/tiny").files("dev")["adapter_config.json"])
        assert config["revision"] == hub.repo("ann/base").at("main").oid and not hub.repo("ann/tiny").files("main")


def test_a_local_base_with_other_weights_than_its_namesake_is_not_taken_for_it(llama, run_dir, tmp_path, monkeypatch):
    base = shutil.copytree(llama, tmp_path / "tuned")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": "ann/base"}))
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["model"]["name_or_path"] = str(base)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with HubServer() as hub:
        hub.use(monkeypatch, None)
        weights = {"model.safetensors": Blob((base / "model.safetensors").read_bytes()[:-1] + b"\1", is_lfs=True)}
        hub.add_repo("ann/base").commit("main", "weights", "", "ann", weights)
        message = refused("export", "out", "--repo-id", "ann/tiny", "--dry-run")
        assert "names 'ann/base'" in message and "--base-id" in message
