"""The stand-in for the Hub is as strict as the Hub: who may do what, what a card may say, how errors are told."""

import hashlib
import subprocess

import pytest
from hub_server import HubServer
from hub_server.card import problems_of
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WRITE, READ, BOB = "hf_annwrites", "hf_annreads", "hf_bobwrites"
LARGE = bytes(range(256)) * 500


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as hub:
        hub.add_user("ann", write=WRITE, read=READ, orgs=("lab",))
        hub.add_user("bob", write=BOB)
        hub.use(monkeypatch, WRITE)
        hub.add_repo("ann/private", private=True).add({"a.txt": b"a", "b/c.safetensors": LARGE})
        hub.add_repo("ann/public").add({"a.txt": b"a"})
        yield hub


def api(token):
    return HfApi(token=token if token is not None else False)


def status(call, *arguments, **named):
    """0 if it works; else the status the client was answered with."""
    try:
        call(*arguments, **named)
    except HfHubHTTPError as error:
        return error.response.status_code
    return 0


@pytest.mark.parametrize(
    ("token", "read_private", "read_public", "write_private", "write_public", "create_ann", "create_lab"),
    [
        (WRITE, 0, 0, 0, 0, 0, 0),
        (READ, 0, 0, 403, 403, 403, 403),
        (BOB, 404, 0, 404, 403, 403, 403),
        (None, 401, 0, 401, 401, 401, 401),
        ("hf_nobodys", 401, 401, 401, 401, 401, 401),
    ],
)
def test_who_may_do_what(hub, token, read_private, read_public, write_private, write_public, create_ann, create_lab):
    found = api(token)
    for repo_id, may_read, may_write in (
        ("ann/private", read_private, write_private),
        ("ann/public", read_public, write_public),
    ):
        assert status(found.repo_info, repo_id) == may_read
        assert status(lambda name=repo_id: list(found.list_repo_tree(name))) == may_read
        operations = [CommitOperationAdd("new.txt", b"new")]
        assert status(found.create_commit, repo_id, operations, commit_message="m") == may_write
        assert status(found.create_branch, repo_id, branch="b") == may_write
    assert status(found.create_repo, "ann/another") == create_ann
    assert status(found.create_repo, "lab/another") == create_lab


def test_errors_are_told_as_the_client_knows_them(hub):
    with pytest.raises(RepositoryNotFoundError):
        api(BOB).repo_info("ann/private")
    with pytest.raises(RepositoryNotFoundError):
        api(None).repo_info("ann/private")
    with pytest.raises(RevisionNotFoundError):
        api(WRITE).repo_info("ann/private", revision="absent")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("ann/private", "absent.txt", token=WRITE, local_dir="unused")
    hub.repo("ann/public").is_gated = True
    with pytest.raises(GatedRepoError):
        api(BOB).repo_info("ann/public")
    hub.fail("GET", "/revision/", status=503, times=None)
    with pytest.raises(LocalEntryNotFoundError):  # the client's word for a Hub it cannot reach
        snapshot_download("ann/private", cache_dir="unused")


def test_a_name_that_is_there_is_answered_with_its_url(hub):
    assert api(WRITE).create_repo("ann/public", exist_ok=True) == f"{hub.url}/ann/public"
    assert status(api(WRITE).create_repo, "ann/public") == 409


def test_hashes_are_those_of_git(hub, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a")
    wanted = subprocess.run(["git", "hash-object", tmp_path / "a.txt"], capture_output=True, text=True, check=True)
    small, large = api(WRITE).get_paths_info("ann/private", ["a.txt", "b/c.safetensors"])
    assert small.blob_id == wanted.stdout.strip() and small.lfs is None
    assert large.lfs.sha256 == hashlib.sha256(LARGE).hexdigest() and large.size == len(LARGE)
    (tmp_path / "pointer").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{large.lfs.sha256}\nsize {len(LARGE)}\n"
    )
    wanted = subprocess.run(["git", "hash-object", tmp_path / "pointer"], capture_output=True, text=True, check=True)
    assert large.blob_id == wanted.stdout.strip()


def test_listings_come_in_pages(hub):
    hub.page_size = 2
    listed = [entry.path for entry in api(WRITE).list_repo_tree("ann/private", recursive=True)]
    assert listed == [".gitattributes", "a.txt", "b", "b/c.safetensors"]
    assert [entry.path for entry in api(WRITE).list_repo_tree("ann/private")] == [".gitattributes", "a.txt", "b"]
    assert [entry.path for entry in api(WRITE).list_repo_tree("ann/private", "b")] == ["b/c.safetensors"]
    assert len(hub.sent("GET", "/tree/")) == 2 + 2 + 1


def test_a_commit_is_one_step_from_a_known_place(hub):
    repo, ann = hub.repo("ann/public"), api(WRITE)
    head = repo.at("main").oid
    made = ann.create_commit("ann/public", [CommitOperationAdd("x", b"x")], commit_message="x", parent_commit=head)
    assert repo.at("main").oid == made.oid and repo.at("main").parent == head
    more = [CommitOperationAdd("y", b"y")]
    assert status(ann.create_commit, "ann/public", more, commit_message="y", parent_commit=head) == 412
    wrong = [CommitOperationAdd("z", b"z"), CommitOperationDelete("absent")]
    assert status(ann.create_commit, "ann/public", wrong, commit_message="z") == 404
    assert repo.files() == {"a.txt": b"a", "x": b"x"}


def test_large_files_lie_at_the_second_origin_which_gets_no_token(hub, tmp_path):
    folder = snapshot_download("ann/private", local_dir=tmp_path)
    assert (tmp_path / "b/c.safetensors").read_bytes() == LARGE and folder == str(tmp_path)
    at_storage = [request for request in hub.requests if request.origin == "cdn"]
    others = [request for request in hub.requests if request.origin == "api"]
    assert at_storage and all("authorization" not in request.headers for request in at_storage)
    assert all(request.headers["authorization"] == f"Bearer {WRITE}" for request in others)


def test_a_download_that_is_dropped_goes_on_where_it_was(hub, tmp_path):
    hub.fail("GET", "/ann/private/[0-9a-f]{64}", drop=True)
    snapshot_download("ann/private", local_dir=tmp_path)
    assert (tmp_path / "b/c.safetensors").read_bytes() == LARGE


@pytest.mark.parametrize("lands", ["now", "late", None])
def test_a_commit_may_land_and_be_answered_otherwise(hub, lands):
    repo, ann = hub.repo("ann/public"), api(WRITE)
    hub.fail("POST", "/commit/", status=504, lands=lands)
    assert status(ann.create_commit, "ann/public", [CommitOperationAdd("x", b"x")], commit_message="x") == 504
    assert len(repo.pushes()) == (2 if lands == "now" else 1)
    ann.create_commit("ann/public", [CommitOperationAdd("y", b"y")], commit_message="y")
    assert [commit.title for commit in repo.pushes()[1:]] == (["y"] if lands is None else ["x", "y"])


@pytest.mark.parametrize(
    ("front", "problem"),
    [
        ("base_model: ann/base\nlicense: mit\ntags: [a]\nlibrary_name: peft", None),
        ("base_model: [ann/base]\nbase_model_relation: adapter\ndatasets: [tatsu-lab/alpaca]", None),
        ("license: other\nlicense_name: mine\nlicense_link: LICENSE", None),
        ("base_model: /home/ann/base", '"base_model"'),
        ("base_model: ./base", '"base_model"'),
        ("base_model: bundled:demo/base", '"base_model"'),
        ("datasets: [data/rows/train.jsonl]", '"datasets"'),
        ("license: license", '"license"'),
        ("license: llama-2", '"license"'),
        ("base_model_relation: lora", '"base_model_relation"'),
        ("tags: adapter", '"tags"'),
        ("pipeline_tag: [text-generation]", '"pipeline_tag"'),
        ("a: [1", "Invalid YAML"),
        ("model-index: {name: x}", "must be an array"),
        ("model-index: [{results: []}]", '"model-index[0].name"'),
        ("model-index: [{name: x, results: [{task: {type: t}, metrics: [{type: a, value: 1}]}]}]", "dataset.type"),
        (
            "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: [{type: a}]}]}]",
            "metrics[0].value",
        ),
    ],
)
def test_cards_are_read_strictly(front, problem):
    errors, warnings = problems_of(f"---\n{front}\n---\n# A model\n")
    assert warnings == [] and (errors == [] if problem is None else problem in errors[0])


def test_an_invalid_card_is_never_committed(hub):
    card = CommitOperationAdd("README.md", b"---\nbase_model: /home/ann/base\n---\n")
    with pytest.raises(ValueError, match="base_model"):
        api(WRITE).create_commit("ann/public", [card], commit_message="x")
    assert len(hub.repo("ann/public").pushes()) == 1


def test_what_the_stand_in_does_not_know_is_not_there(hub):
    assert status(api(WRITE).get_repo_discussions("ann/public").__next__) == 404
