"""A folder on the Hub in one commit: what is sent, kept, said and refused; and `hf` reads it back."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import contents
from hub_server import HubServer

from qlora_neft.errors import RunFailed, UserInputError
from qlora_neft.export.hub.failures import Patience
from qlora_neft.export.hub.push import push_folder

TOKEN, READ, BOB = "hf_annwritessecretly", "hf_annreadssecretly", "hf_bobwritessecretly"
COMMAND = "qlora-neft export out --repo-id ann/x"
HF = Path(sys.executable).with_name("hf")


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as hub:
        hub.add_user("ann", write=TOKEN, read=READ, orgs=("lab",))
        hub.add_user("bob", write=BOB)
        hub.use(monkeypatch, TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nAn adapter.\n")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "more" / "empty.txt").touch()
    return folder


@pytest.fixture
def push(folder):
    """Push the folder; what is said is in ``push.lines``."""

    def push(repo_id="ann/x", source=folder, **more):
        arguments = {"message": "An adapter", "say": push.lines.append, "resume_command": COMMAND, **more}
        return push_folder(source, repo_id, **arguments)

    push.lines = []
    return push


@pytest.fixture
def refusal(push):
    """The message of a push that is the user's to mend; it names the command and no token."""

    def refusal(*arguments, kind=UserInputError, **more):
        with pytest.raises(kind) as caught:
            push(*arguments, **more)
        message = str(caught.value)
        assert not any(token in message for token in (TOKEN, READ, BOB))
        return message

    return refusal


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- What is there afterwards ----


def test_one_commit_holds_the_folder(hub, folder, push):
    pushed = push()
    repo = hub.repo("ann/x")
    [commit] = repo.pushes()
    assert (pushed.commit, pushed.files, pushed.was_up_to_date) == (commit.oid, 3, False)
    assert (commit.title, repo.private, repo.files()) == ("An adapter", True, files_of(folder))
    assert pushed.url == f"{hub.url}/ann/x" and push.lines == []


def test_the_same_again_is_no_commit(hub, push):
    first, again = push(), push()
    assert again.was_up_to_date and again.commit == first.commit and len(hub.repo("ann/x").pushes()) == 1


def test_a_second_push_replaces_what_is_ours_and_keeps_the_rest(hub, folder, push):
    before = {"notes.md": b"mine", "loss.png": b"\0old", "README.md": b"old", "chat_template.jinja": b"old"}
    hub.add_repo("ann/x", private=True).add(before)
    push()
    assert hub.repo("ann/x").files() == {"notes.md": b"mine", **files_of(folder)}
    assert len(hub.repo("ann/x").pushes()) == 2


def test_only_what_differs_is_sent(hub, folder, push):
    push()
    hub.requests.clear()
    (folder / "README.md").write_text("---\nlicense: mit\n---\nBetter.\n")
    push()
    assert hub.sent("PUT", "") == [] and len(hub.repo("ann/x").pushes()) == 2


def test_a_public_repository_is_made_only_when_asked_for(hub, push):
    push("ann/y", private=False)
    assert not hub.repo("ann/y").private and push.lines == []


@pytest.mark.parametrize("is_private", [True, False])
def test_a_repository_that_is_there_keeps_its_visibility_and_that_is_said(hub, push, is_private):
    hub.add_repo("ann/x", private=is_private)
    push(private=not is_private)
    assert hub.repo("ann/x").private is is_private
    [line] = push.lines
    kind = "private" if is_private else "public"
    assert f"stays {kind}" in line and f"{hub.url}/ann/x/settings" in line


def test_a_branch_and_an_organization(hub, folder, push):
    pushed = push("lab/x", revision="try/1")
    repo = hub.repo("lab/x")
    assert repo.files("try/1") == files_of(folder) and repo.pushes("main") == []
    assert pushed.url == f"{hub.url}/lab/x/tree/try/1"


def test_hf_knows_us_and_reads_the_same_bytes_back(hub, folder, push, tmp_path):
    push()
    env = os.environ | hub.environment(TOKEN, tmp_path / "home")

    def hf(*arguments):
        return subprocess.run([HF, *arguments], env=env, capture_output=True, text=True, check=True).stdout

    assert "ann" in hf("auth", "whoami")
    hf("download", "ann/x", "--local-dir", str(tmp_path / "read"))
    shutil.rmtree(tmp_path / "read/.cache")
    (tmp_path / "read/.gitattributes").unlink()
    assert contents(tmp_path / "read") == contents(folder)
    hf("upload", "ann/by-hf", str(folder), "--private")
    assert hub.repo("ann/by-hf").files() == hub.repo("ann/x").files()


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, push, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    push()
    assert all(sent.headers["authorization"] == f"Bearer {TOKEN}" for sent in hub.requests if sent.origin == "api")
    at_storage = [sent for sent in hub.requests if sent.origin == "cdn"]
    assert at_storage and not any(TOKEN in str(sent.headers) or TOKEN.encode() in sent.body for sent in at_storage)
    files = b"".join(hub.repo("ann/x").files().values())
    said = "".join([*capfd.readouterr(), caplog.text, *push.lines])
    assert TOKEN not in said and TOKEN.encode() not in files


# ---- What is refused, and what is said ----


@pytest.mark.parametrize(
    ("token", "repo_id", "said"),
    [
        (None, "ann/x", "no token for the Hub. Log in with `hf auth login`"),
        ("hf_nobodys", "ann/x", "does not accept the token of the environment variable HF_TOKEN"),
        (READ, "ann/x", "may not write there (Forbidden: you must use a write token"),
        (READ, "ann/there", "may not write there"),
        (TOKEN, "bob/x", 'the namespace "bob"'),
        (TOKEN, "bob/public", "may not write there (Forbidden: you have no right to write to bob/public)"),
        (TOKEN, "bob/private", 'the namespace "bob"'),
        (TOKEN, "x", "must be owner/name"),
        (TOKEN, "ann/x y", "not a name for a repository"),
    ],
)
def test_who_may_not_push_is_told_why(hub, monkeypatch, refusal, token, repo_id, said):
    for name, private in (("ann/there", True), ("bob/public", False), ("bob/private", True)):
        hub.add_repo(name, private=private)
    hub.use(monkeypatch, token)
    message = refusal(repo_id)
    assert said in message and all(repo.pushes() == [] for repo in hub.repos.values()) and len(hub.repos) == 3


def test_the_source_of_a_bad_token_is_named(hub, monkeypatch, refusal, tmp_path):
    assert "does not accept the token given" in refusal(token="hf_nobodys")
    (tmp_path / "token").write_text("hf_nobodys")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")
    assert f"the token that `hf auth login` stored in {tmp_path}/token" in refusal()


def test_an_invalid_card_is_told_in_the_words_of_the_hub(hub, folder, refusal):
    (folder / "README.md").write_text("---\nbase_model: /home/ann/base\nlicense: mine\n---\n")
    message = refusal()
    assert "'/home/ann/base' is not valid" in message and "got 'mine'" in message and COMMAND in message
    assert hub.repo("ann/x").pushes() == []


@pytest.mark.parametrize(
    ("status", "words", "said"),
    [
        (403, "Private repository storage limit reached, please upgrade your plan", "no room left"),
        (413, "Payload too large", "larger than the Hub accepts"),
    ],
)
def test_no_room_and_too_large_are_told_apart(hub, refusal, status, words, said):
    hub.fail("POST", "/lfs/objects/batch", status=status, message=words)
    message = refusal()
    assert said in message and words in message and COMMAND in message


def test_offline_mode_is_named(hub, monkeypatch, refusal):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal() and hub.requests == []


def test_an_empty_folder_is_refused(hub, tmp_path, refusal):
    (tmp_path / "nothing").mkdir()
    assert "holds no file" in refusal(source=tmp_path / "nothing") and hub.requests == []


# ---- A network that is not there, slow, or crowded ----


def fast(**more):
    return Patience(**{"sleep": lambda _: None, "attempts": 3, **more})


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_network_is_told_after_a_few_attempts(hub, monkeypatch, push, refusal, endpoint):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    message = refusal(kind=RunFailed, patience=fast())
    assert f"no connection to {endpoint}" in message and "3 attempts" in message and COMMAND in message
    assert len(push.lines) == 2 and all("trying again in" in line for line in push.lines)


def test_a_server_that_never_answers_is_not_waited_for(hub, push):
    hub.fail("POST", "/commit/", stall=3, drop=True)
    push(patience=fast(answer=0.3))
    assert len(hub.repo("ann/x").pushes()) == 1


def test_the_wish_of_the_server_is_granted_within_the_limit(hub, push, refusal):
    waits = []
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "60"})
    push(patience=fast(sleep=waits.append))
    assert waits == [60]
    hub.fail("POST", "/repos/create", status=429, headers={"Retry-After": "3600"})
    message = refusal("ann/y", kind=RunFailed, patience=fast(sleep=waits.append))
    assert "asks to wait 3600 s" in message and waits == [60]


def test_someone_elses_commit_in_between_is_never_overwritten(hub, push, refusal):
    repo = hub.add_repo("ann/x", private=True)
    hub.meanwhile("POST", "/preupload/", lambda: repo.add({"theirs": b"1"}))
    message = refusal(kind=RunFailed)
    assert "someone else changed it" in message and COMMAND in message
    assert [commit.title for commit in repo.pushes()] == ["before the test"]


def test_a_file_that_did_not_arrive_is_named(hub, folder, refusal):
    hub.add_repo("ann/x", private=True).add({".gitignore": b"*.txt"})
    message = refusal(kind=RunFailed)
    assert "more/empty.txt is missing in the repository after the push" in message and ".gitignore" in message
