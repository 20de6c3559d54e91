"""Every request of a push, every fault: the push ends with one commit, or with one message and nothing half done."""

import types

import pytest
from hub_server import HubServer

from qlora_neft.adapter.folder import find_adapter
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
# What one more attempt mends, but a second one does not: a server that has not heard of the new repository yet, the
# address of an upload whose time is over.
ONCE = {
    **{f"not yet, {name}": (name, {"status": 404}) for name in ("list", "ask", "commit")},
    "not yet, look": ("look", {"status": 404, "code": "RepoNotFound"}),
    "expired": ("put", {"status": 403, "message": "Request has expired"}),
    "expired at Google": ("put", {"status": 400, "message": "ExpiredToken"}),
}
# Success, and content that no client can use.
ODD = {"nothing": {}, "a list": [], "a text": "ok", "null in it": {"sha": None, "commitOid": None, "commitUrl": None}}
REFUSALS = dict.fromkeys((401, 402, 403, 404, 409, 413), UserInputError) | {400: RunFailed, 412: RunFailed}
# Without one that passes: after a 404 about a large file, one more attempt finds it in its place.
REFUSED = [(name, status) for name in REQUESTS for status in REFUSALS if (name, status) != ("verify", 404)]


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


# Every second pair in every run of the tests: each fault meets half of the requests, each request half of the faults.
PAIRS = [
    pytest.param(request_, fault, marks=() if (i + j) % 2 else pytest.mark.slow)
    for i, request_ in enumerate(REQUESTS)
    for j, fault in enumerate(PASSING)
]


@pytest.mark.parametrize(("request_", "fault"), PAIRS)
def test_a_fault_that_passes_ends_in_one_commit(hub, clock, folder, request_, fault):
    hub.fail(*REQUESTS[request_], **PASSING[fault])

    pushed = push(folder, clock)

    assert is_whole(hub, folder)
    assert pushed.commit == hub.repo("ann/x").at("main").oid and not pushed.was_up_to_date
    assert clock.now < 30


@pytest.mark.parametrize(("request_", "fault"), PAIRS)
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


@pytest.mark.parametrize(("request_", "status"), REFUSED)
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
    # The repository was made in this push, and an upload's address may have expired: one more attempt.
    is_tried_once_more = (status == 404 and request_ not in ("look", "make")) or (
        request_ == "put" and status in (400, 401, 403)
    )
    assert len(clock.waits) == is_tried_once_more


@pytest.mark.parametrize("fault", ONCE)
def test_what_one_more_attempt_mends(hub, clock, folder, fault):
    request_, more = ONCE[fault]
    lines = []
    if request_ == "look":  # not the first one, which finds that there is no repository yet
        hub.meanwhile(*MAKE, lambda: hub.fail(*LOOK, **more))
    else:
        hub.fail(*REQUESTS[request_], **more)
    pushed = push(folder, clock, lines)
    assert is_whole(hub, folder) and pushed.commit == hub.repo("ann/x").at("main").oid
    assert len(lines) == len(clock.waits) == 1 and clock.now < 2


@pytest.mark.parametrize("content", ODD)
@pytest.mark.parametrize("request_", ["look", "list", "batch", "commit"])
def test_an_answer_of_another_shape_is_tried_again(hub, clock, folder, request_, content):
    hub.fail(*REQUESTS[request_], status=200, content=ODD[content], lands="now")
    push(folder, clock)
    assert is_whole(hub, folder)


def test_an_answer_that_stays_of_another_shape_is_one_message(hub, clock, folder):
    hub.fail(*COMMIT, status=200, content={}, times=None)
    with pytest.raises(RunFailed, match="answers with something else than was asked for") as caught:
        push(folder, clock)
    assert COMMAND in str(caught.value) and is_untouched(hub)


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "100000"}, {"RateLimit": '"api";r=0;t=100000'}, {"Retry-After": "9" * 30}]
)
@pytest.mark.parametrize("request_", ["look", "list", "batch", "put", "commit"])
def test_a_wait_of_a_day_is_said_and_not_waited(hub, clock, folder, request_, headers):
    hub.fail(*REQUESTS[request_], status=429, headers=headers, times=None)
    with pytest.raises(RunFailed, match=r"asks to wait \d+ s"):
        push(folder, clock)
    assert clock.now == 0 and is_untouched(hub)


def test_a_wait_of_minutes_is_waited_and_said(hub, clock, folder):
    hub.fail(*BATCH, status=429, headers={"Retry-After": "120"})
    lines = []
    push(folder, clock, lines)
    assert is_whole(hub, folder) and clock.waits == [120] and "trying again in 120 s" in lines[0]


@pytest.mark.parametrize("request_", ["look", "list", "commit"])
def test_redirects_in_a_circle_end_at_once(hub, clock, folder, request_):
    circle = {"status": 307, "headers": {"Location": "/api/models/ann/x/round"}, "times": None}
    for method, pattern in (REQUESTS[request_], ("GET", "/round"), ("POST", "/round")):
        hub.fail(method, pattern, **circle)
    with pytest.raises(RunFailed, match="redirects in a circle"):
        push(folder, clock)
    assert clock.waits == [] and is_untouched(hub)


@pytest.mark.parametrize(
    "token",
    ["hf_a\N{EN DASH}b", "hf_a b", "hf_a\N{NO-BREAK SPACE}b", "hf_\N{CYRILLIC SMALL LETTER A}", "hf_a\nb"],
)
def test_a_token_that_cannot_be_sent_is_refused(hub, clock, folder, token):
    with pytest.raises(UserInputError, match="the token given holds a character that no token has") as caught:
        push(folder, clock, token=token)
    assert token not in str(caught.value) and hub.requests == []


# ---- Downloads ----


@pytest.fixture
def adapter_there(hub, folder, monkeypatch, tmp_path):
    hub.use(monkeypatch, TOKEN, tmp_path / "cache")
    return hub.add_repo("ann/x", folder)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 429, "headers": {"Retry-After": "100000"}}, "asks to wait 100000 s"),
        ({"status": 307, "headers": {"Location": "/api/models/ann/x/revision/main"}}, "redirects in a circle"),
        ({"status": 200, "content": {}}, ""),
    ],
)
def test_a_download_that_fails_is_one_message(hub, adapter_there, clock, fault, said):
    hub.fail("GET", "/revision/main|/resolve/", times=None, **fault)
    with pytest.raises(UserInputError) as caught:
        find_adapter("ann/x")
    message = str(caught.value)
    assert message.startswith("ann/x: no such folder, and the Hub gives no such model") and said in message
    assert clock.now < 60


@pytest.mark.parametrize("name", ["../../../evil.json", "a/../../evil.json", "/evil.json", "..\\evil.json"])
def test_file_names_that_lead_out_of_a_repository(hub, adapter_there, clock, name, tmp_path):
    adapter_there.add({name: b"{}"})
    with pytest.raises(UserInputError):
        find_adapter("ann/x")
    inside = tmp_path / "cache/models--ann--x"
    assert [path for path in tmp_path.rglob("evil*") if not path.is_relative_to(inside)] == []


def test_a_token_that_cannot_be_sent_is_refused_before_a_download(adapter_there, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_\N{EN DASH}")
    with pytest.raises(UserInputError, match="holds a character that no token has"):
        find_adapter("ann/x")
