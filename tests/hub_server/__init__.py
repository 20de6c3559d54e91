"""A stand-in for the Hugging Face Hub on the loopback interface, which the real client and `hf` cannot tell from it.

It keeps accounts, repositories and their whole history in memory, serves large files from a second origin, checks model
cards strictly, and fails on request. Protocol: what huggingface_hub 1.27 to 2.4 sends, without Xet.

    @pytest.fixture
    def hub(monkeypatch):
        with HubServer() as hub:
            hub.add_user("ann", write="hf_annwrite", read="hf_annread")
            hub.use(monkeypatch, "hf_annwrite")  # the client in this process now speaks to it
            yield hub

    def test_a_push(hub):
        hub.fail("POST", "/commit/", status=503)  # once
        subprocess.run(["hf", "upload", "ann/x", "folder"], env=os.environ | hub.environment("hf_annwrite"), check=True)
        assert [commit.title for commit in hub.repo("ann/x").pushes()] == ["Upload folder using huggingface_hub"]
        assert hub.repo("ann/x").files()["config.json"] == b"{}"
        assert not any("authorization" in request.headers for request in hub.requests if request.origin == "cdn")
"""

from .repositories import Commit, Repository
from .server import HubServer
from .wire import Request

__all__ = ["Commit", "HubServer", "Repository", "Request"]
