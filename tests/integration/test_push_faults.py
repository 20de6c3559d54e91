"""Every request of a push, every fault: the push ends with one commit, or with one message and nothing half done."""

import types

import pytest
from hub_server import HubServer

from qlora_neft.errors import RunFailed, UserInputError
from qlora_neft.export.hub.failures import Patience
from qlora_neft.export.hub.push import push_folder

TOKEN, COMMAND = "hf_annwritessecretly", "qlora-neft export out --repo-id ann/x"
LOOK, LIST, MAKE = ("GET", r"/revision/main|/models/ann/x$"), ("GET", "/tree/"), ("POST", "/repos/create")
CARD, ASK, BATCH = ("POST", "/validate-yaml"), ("POST", "/preupload/"), ("POST", "/lfs/objects/batch")
PUT, VERIFY, COMMIT = ("PUT", "/ann/x/"), ("POST", "/lfs/objects/verify"), ("POST", "/commit/main")
REQUESTS = {
    "look": LOOK,
    "list": LIST,
    "make": MAKE,
    "card": CARD,
    "ask": ASK,
    "batch": BATCH,
    "put": PUT,
    "verify": VERIFY,
    "commit": COMMIT,
}
PASSING = {
    "408": {"status": 408},
    "429": {"status": 429, "headers": {"RateLimit": '"api";r=0;t=3'}},
    "500": {"status": 500},
    "502 page": {"status": 502, "html": True},
    "503": {"status": 503, "headers": {"Retry-After": "7"}},
    "504": {"status": 504},
    "dropped": {"drop": True},
    "landed, 504": {"status": 504, "lands": "now"},
    "landed, dropped": {"drop": True, "lands": "now"},
    "lands later, 504": {"status": 504, "lands": "late"},
}
REFUSALS = dict.fromkeys((401, 402, 403, 404, 409, 413), UserInputError) | {400: RunFailed, 412: RunFailed}


class Clock:
    """Time that passes only by waiting, for the push and for upstream's own retries."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds

    @property
    def patience(self):
        return Patience(sleep=self.sleep, clock=lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=clock.sleep))
    return clock


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as hub:
        hub.add_user("ann", write=TOKEN, read="hf_annreads")
        hub.use(monkeypatch, TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\nAn adapter.\n")
    (folder / "adapter_config.json").write_text("{}\n")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


def push(folder, clock, lines=None, **more):
    say = (lines if lines is not None else []).append
    arguments = {"message": "An adapter", "say": say, "resume_command": COMMAND, "patience": clock.patience}
    return push_folder(folder, "ann/x", **{**arguments, **more})


def is_whole(hub, folder):
    """One commit beyond the Hub's own first one, with all files."""
    there = hub.repo("ann/x")
    assert [commit.title for commit in there.pushes()] == ["An adapter"]
    assert there.files() == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert there.private
    return True


def is_untouched(hub):
    """No repository, or one with the Hub's own first commit alone."""
    return "ann/x" not in hub.repos or hub.repo("ann/x").pushes() == []


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_fault_that_passes_ends_in_one_commit(hub, clock, folder, request_, fault):
    hub.fail(*REQUESTS[request_], **PASSING[fault])

    pushed = push(folder, clock)

    assert is_whole(hub, folder)
    assert pushed.commit == hub.repo("ann/x").at("main").oid and not pushed.was_up_to_date
    assert clock.now < 30


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_fault_that_stays_ends_in_one_message_or_one_commit(hub, clock, folder, request_, fault):
    hub.fail(*REQUESTS[request_], times=None, **PASSING[fault])
    lines = []

    try:
        push(folder, clock, lines)
    except RunFailed as failed:
        message = str(failed)
        assert COMMAND in message and "attempts in" in message and message.count("\n") == 1
        assert TOKEN not in message
    else:  # what landed is found by the next attempt: a commit, or a large file that was put and not verified
        assert PASSING[fault].get("lands") or request_ == "verify"
    landed = "lands" in PASSING[fault] and request_ == "commit"
    assert is_whole(hub, folder) if landed else is_untouched(hub) or is_whole(hub, folder)
    assert clock.now < 600 and len(lines) < 6


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_refusal_is_told_at_once_and_not_tried_again(hub, clock, folder, request_, status):
    hub.fail(*REQUESTS[request_], status=status, times=None, message="so says the test")

    with pytest.raises((UserInputError, RunFailed)) as caught:
        push(folder, clock)

    message = str(caught.value)
    invalid_card = request_ == "card" and status == 400
    assert type(caught.value) is (UserInputError if invalid_card else REFUSALS[status]), message
    assert COMMAND in message and TOKEN not in message and message.count("\n") == 1
    assert "so says the test" in message or status == 401
    assert is_untouched(hub)
    assert clock.waits == []
