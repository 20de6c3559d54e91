"""An adapter goes to the Hub and comes back: the real client and `hf` in their own processes, against the stand-in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import adapter, environment, never_stopped
from hub_server import HubServer
from huggingface_hub import ModelCard
from tiny import save_tiny_model

WORKER = Path(__file__).with_name("export_worker.py")
# A card's programs meet bitsandbytes as it is: on CPUs with AVX512-BF16 it fails where a layer's width is no multiple
# of its block of 64 (see `keep_nf4_layout`).
WHOLE_BLOCKS = {"intermediate_size": 128}
TOKEN = "hf_annwrite0123456789abcdef"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny base uploaded with `hf`, and an adapter trained on a local copy of it: the Hub and what the user saw."""
    work = tmp_path_factory.mktemp("published")
    base = save_tiny_model(work / "base", **WHOLE_BLOCKS)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": "ann/tiny-base"}))
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\nA base.\n")
    run_dir = shutil.copytree(never_stopped(base), work / "out")
    for rows in (work / "never_stopped").glob("*.jsonl"):
        shutil.copy(rows, work)
    with HubServer() as hub:
        hub.add_user("ann", write=TOKEN)
        variables = environment(**hub.environment(TOKEN, work / "home"))
        hf = Path(sys.executable).with_name("hf")
        subprocess.run([hf, "upload", "ann/tiny-base", base, "--private"], env=variables, check=True)
        worker = [sys.executable, WORKER, "out", "ann/tiny", work / "found.json"]
        subprocess.run(worker, env=variables, cwd=work, check=True)
        yield hub, json.loads((work / "found.json").read_text()), run_dir


def test_one_private_repository_in_one_commit(published):
    hub, found, run_dir = published
    code, _, said = found["export"]
    repo = hub.repo("ann/tiny")
    assert code == 0 and repo.private and len(repo.pushes()) == 1
    assert repo.at("main").oid in said and TOKEN not in said
    local = {path.name: path.read_bytes() for path in (run_dir / "export").iterdir()}
    assert repo.files() == local and local["adapter_model.safetensors"] == adapter(run_dir)
    assert not any("training_args" in name or "optimizer" in name for name in local)
    assert all(TOKEN.encode() not in content for content in local.values())


def test_the_base_is_recognised_and_pinned(published):
    hub, found, _ = published
    commit = hub.repo("ann/tiny-base").at("main").oid
    config = json.loads(hub.repo("ann/tiny").files()["adapter_config.json"])
    assert [config["base_model_name_or_path"], config["revision"]] == ["ann/tiny-base", commit] == found["base"]


def test_the_license_is_that_of_the_base(published):
    card = ModelCard(published[0].repo("ann/tiny").files()["README.md"].decode())
    assert (card.data.license, card.data.license_name) == ("other", "mine") and "mine, that of the base" in card.text
    assert card.data.license_link == "https://huggingface.co/ann/tiny-base/blob/main/LICENSE"


def test_a_second_export_makes_no_commit(published):
    code, _, said = published[1]["again"]
    assert code == 0 and "up to date" in said and len(published[0].repo("ann/tiny").pushes()) == 1


def test_it_comes_back_bit_for_bit(published):
    _, found, _ = published
    assert found["peft"] and found["by_id"]
    (code, here), (code_of_id, there) = found["answers"]
    assert code == code_of_id == 0 and here == there and here.strip()


def test_the_published_recipe_trains_the_same_adapter(published):
    _, found, run_dir = published
    assert found["rerun"] == 0 and adapter(run_dir.parent / "rerun") == adapter(run_dir)


def test_the_programs_of_the_card_run_and_agree(published):
    by_peft, by_transformers = published[1]["snippets"]
    assert by_peft == by_transformers and by_peft.strip()
