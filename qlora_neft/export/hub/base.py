"""The base of an adapter as others can load it: a Hub id and a commit. A path of this machine is never published."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...adapter.folder import AdapterFolder
from ...errors import UserInputError, first_line
from ...files import read_json, sha256_of_file
from ...paths import kind_of, resolve_bundled
from ...run_folder.record import RunSummary
from .public import PublicBase, Published

LICENSE_KEYS = ("license", "license_name", "license_link")
COMMIT = re.compile(r"[0-9a-f]{40}")
# The download cache of huggingface_hub keeps models--OWNER--NAME/snapshots/COMMIT.
IN_CACHE = re.compile(r"models--(?P<id>.+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


def public_base(folder: AdapterFolder, base_id: str | None = None, base_revision: str | None = None) -> PublicBase:
    """Find the Hub id of the base and the commit it was trained on.

    A base in the Hub's download cache says itself what it is. Any other folder is recognized if its configuration names
    a model on the Hub whose weights have the same SHA-256.

    Args:
        folder: The adapter.
        base_id: ``--base-id``, in place of the recorded base.
        base_revision: ``--base-revision``, a commit in place of the recorded one.

    Returns:
        The base; without a commit if none is recorded and the Hub cannot be asked.

    Raises:
        UserInputError: If the base is local and of unknown origin, or an argument is malformed.
    """
    if base_revision is not None and not COMMIT.fullmatch(base_revision):
        raise UserInputError(f"--base-revision: must be a commit, 40 hexadecimal digits, got {base_revision!r}.")
    recorded = folder.own_base or folder.recorded_base
    if base_id is not None:
        _check_form(base_id)
    elif not recorded:
        raise UserInputError(f"{folder.source}: adapter_config.json names no base. Give its Hub id with --base-id.")
    elif kind_of(recorded) != "hub":
        found = _recognized(folder, recorded)
        return PublicBase(found.id, base_revision or found.commit)
    chosen = base_id or recorded
    assert chosen is not None, "without either the function has ended"
    # With another id given, the recorded commit would be one of a different repository.
    known = _commit_of_run(folder) if chosen == recorded else None
    return PublicBase(chosen, base_revision or known or _commit_on_hub(chosen, folder.recorded_revision))


@dataclass(frozen=True)
class BaseFacts:
    """Facts about a base model, as the Hub has them.

    Attributes:
        commit: The commit that a branch or tag stands for.
        license: ``license``, ``license_name``, ``license_link`` as its card has them; empty without one.
        is_missing: Whether the Hub shows no such model to the token in use.
        why_not: Why the Hub was not asked or gave no answer; None if it did.
    """

    commit: str | None = None
    license: dict[str, str] | None = None
    is_missing: bool = False
    why_not: str | None = None


def ask_about_base(base_id: str, revision: str | None) -> BaseFacts:
    """Ask the Hub once. Without a network, offline, or without access, ``why_not`` has the reason."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        info = HfApi().model_info(base_id, revision=revision)
    except OfflineModeIsEnabled:
        return BaseFacts(why_not="HF_HUB_OFFLINE is set")
    except (HTTPError, OSError) as error:  # the Hub's refusals, and the network's
        # GatedRepoError is a subclass, but a gated model exists.
        is_missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
        return BaseFacts(is_missing=is_missing, why_not=first_line(error))
    card = info.card_data
    license = {key: card[key] for key in LICENSE_KEYS if card and isinstance(card.get(key), str)}
    # The Hub allows a file name here, relative to the base's repository; beside the adapter it would lead nowhere.
    if "://" not in license.get("license_link", "://"):  # a file of the base's repository
        license["license_link"] = f"https://huggingface.co/{base_id}/blob/main/{license['license_link']}"
    return BaseFacts(info.sha, license)


def _commit_of_run(folder: AdapterFolder) -> str | None:
    """Return the commit that was trained on: as the run recorded it, else a revision that is a commit."""
    published = Published.of(folder.summary).base
    stated = RunSummary.of(folder.summary).base_commit or (published.revision if published else None)
    revision = folder.recorded_revision
    return stated or (revision if revision and COMMIT.fullmatch(revision) else None)


def _commit_on_hub(base_id: str, revision: str | None) -> str | None:
    return revision if revision and COMMIT.fullmatch(revision) else ask_about_base(base_id, revision).commit


def _check_form(base_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(base_id)
    except HFValidationError as error:
        raise UserInputError(f"--base-id: must be a Hub id (owner/name), got {base_id!r}.") from error
    if kind_of(base_id) != "hub":
        raise UserInputError(f"--base-id: must be a Hub id (owner/name), got the folder {base_id!r}.")


# ---- A local base ----


def _recognized(folder: AdapterFolder, recorded: str) -> PublicBase:
    """Return the model on the Hub that a local base is known to be."""
    # Cheapest evidence first: the cache's folder name, then the weights' hashes, which Git LFS knows without a
    # download.
    path = Path(resolve_bundled(recorded)).expanduser()
    cached = IN_CACHE.search(path.absolute().as_posix())
    if cached:
        return PublicBase(cached["id"].replace("--", "/"), cached["commit"])
    named = _name_in_config(path)
    if named and kind_of(named) == "hub" and _same_weights(path, _sha256_on_hub(named)):
        return PublicBase(named, ask_about_base(named, None).commit)
    hint = f" (its config.json names {named!r}; the weights there differ, or cannot be seen)" if named else ""
    raise UserInputError(
        f"{folder.source}: it was trained on the local base {recorded!r}{hint}, and the Hub needs one that others can "
        "load. Give its Hub id with --base-id owner/name."
    )


def _name_in_config(path: Path) -> str | None:
    try:
        return read_json(path / "config.json").get("_name_or_path") or None
    except (OSError, ValueError):
        return None


def _same_weights(path: Path, on_hub: dict[str, str]) -> bool:
    """Return whether every weight file of a folder is on the Hub, byte for byte."""
    files = sorted(path.glob("*.safetensors"))
    return bool(files) and all(sha256_of_file(file) == on_hub.get(file.name) for file in files)


def _sha256_on_hub(base_id: str) -> dict[str, str]:
    """Return the SHA-256 of a model's large files by name; empty if the Hub gives no answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(HfApi().list_repo_tree(base_id))
    except (HTTPError, OSError):
        return {}
    return {entry.path: entry.lfs.sha256 for entry in entries if isinstance(entry, RepoFile) and entry.lfs}
