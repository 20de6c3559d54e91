"""What the Hub says of a base model; no answer is an answer too, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

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
