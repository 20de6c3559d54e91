"""The base of an adapter as others can load it: a Hub id and a commit. A path of this machine is never published."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ...adapter.folder import AdapterFolder
from ...errors import UserInputError
from ...files import sha256_of_file
from ...paths import kind_of, resolve_bundled

LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseFacts:
    """What a base model's page says.

    Attributes:
        commit: That a branch or tag stands for.
        license: ``license``, ``license_name``, ``license_link`` as its card has them; empty without one.
        is_missing: Whether the Hub shows no such model to the token in use.
        why_not: Why the Hub was not asked or gave no answer; None if it did.
    """

    commit: str | None = None
    license: dict[str, str] | None = None
    is_missing: bool = False
    why_not: str | None = None


def ask_about_base(base_id: str, revision: str | None) -> BaseFacts:
    """Ask the Hub once; without a network, offline, or without access the reason is in ``why_not``."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        info = HfApi().model_info(base_id, revision=revision)
    except OfflineModeIsEnabled:
        return BaseFacts(why_not="HF_HUB_OFFLINE is set")
    except (HTTPError, OSError) as error:  # the Hub's refusals, and the network's
        first_line = str(error).strip().splitlines()[:1] or [type(error).__name__]
        is_missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
        return BaseFacts(is_missing=is_missing, why_not=first_line[0])
    card = info.card_data
    license = {key: card[key] for key in LICENSE_KEYS if card and isinstance(card.get(key), str)}
    if "://" not in license.get("license_link", "://"):  # a file of the base's repository
        license["license_link"] = f"https://huggingface.co/{base_id}/blob/main/{license['license_link']}"
    return BaseFacts(info.sha, license)


def sha256_on_hub(base_id: str, revision: str | None) -> dict[str, str]:
    """SHA-256 of the large files of a model by name; empty if the Hub gives no answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        entries = list(HfApi().list_repo_tree(base_id, revision=revision))
    except (HTTPError, OSError):
        return {}
    return {entry.path: entry.lfs.sha256 for entry in entries if getattr(entry, "lfs", None)}


COMMIT = re.compile(r"[0-9a-f]{40}")
IN_CACHE = re.compile(r"models--(?P<id>.+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")


def public_base(
    folder: AdapterFolder, base_id: str | None = None, base_revision: str | None = None
) -> tuple[str, str | None]:
    """Hub id of the base and the commit it was trained on.

    A base that is a folder of the Hub's cache says itself what it is. Any other folder is recognised if its
    configuration names a model on the Hub whose weights have the same SHA-256.

    Args:
        folder: The adapter.
        base_id: ``--base-id``, in place of the recorded base.
        base_revision: ``--base-revision``, a commit in place of the recorded one.

    Returns:
        The id, and the commit; None for one that is not recorded where the Hub cannot be asked.

    Raises:
        UserInputError: If the base is local and of unknown origin, or an argument is not of its form.
    """
    if base_revision is not None and not COMMIT.fullmatch(base_revision):
        raise UserInputError(f"--base-revision: must be a commit, 40 hexadecimal digits, got {base_revision!r}.")
    recorded = _recorded(folder)
    if base_id is not None:
        _check_form(base_id)
        known = _commit_of_run(folder) if base_id == recorded else None
        return base_id, base_revision or known or _commit_on_hub(base_id, folder.recorded_revision)
    if _is_local(recorded):
        found, commit = _recognised(folder, recorded)
        return found, base_revision or commit
    return recorded, base_revision or _commit_of_run(folder) or _commit_on_hub(recorded, folder.recorded_revision)


def _recorded(folder: AdapterFolder) -> str:
    recorded = folder.own_base or folder.recorded_base
    if not recorded:
        raise UserInputError(f"{folder.source}: adapter_config.json names no base. Give its Hub id with --base-id.")
    return str(recorded)


def _is_local(base: str) -> bool:
    return kind_of(base) != "hub"


def _commit_of_run(folder: AdapterFolder) -> str | None:
    """The commit that was trained on: as the run recorded it, else a revision that is one."""
    stated = (folder.summary or {}).get("base_commit") or (folder.summary or {}).get("base", {}).get("revision")
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
    if _is_local(base_id):
        raise UserInputError(f"--base-id: must be a Hub id (owner/name), got the folder {base_id!r}.")


def _recognised(folder: AdapterFolder, recorded: str) -> tuple[str, str | None]:
    """Id and commit of a local base that is known to be a model on the Hub."""
    path = Path(resolve_bundled(recorded)).expanduser()
    cached = IN_CACHE.search(path.absolute().as_posix())
    if cached:
        return cached["id"].replace("--", "/"), cached["commit"]
    named = _name_in_config(path)
    if named and not _is_local(named) and _same_weights(path, sha256_on_hub(named, None)):
        return named, ask_about_base(named, None).commit
    hint = f" (its config.json names {named!r}; the weights there differ, or cannot be seen)" if named else ""
    raise UserInputError(
        f"{folder.source}: it was trained on the local base {recorded!r}{hint}, and the Hub needs one that others can "
        "load. Give its Hub id with --base-id owner/name."
    )


def _name_in_config(path: Path) -> str | None:
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("_name_or_path") or None
    except (OSError, ValueError):
        return None


def _same_weights(path: Path, on_hub: dict[str, str]) -> bool:
    """Whether every weight file of a folder is on the Hub, byte for byte."""
    files = sorted(path.glob("*.safetensors"))
    return bool(files) and all(sha256_of_file(file) == on_hub.get(file.name) for file in files)
