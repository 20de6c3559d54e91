"""A model without an adapter, ready to answer: an untuned base, or a full model that was trained here."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..base.config import check_base_config, load_tokenizer
from ..base.nf4 import load_nf4_base, load_unquantized_base
from ..base.precision import resolve_precision
from ..data.templates import TEMPLATE_OF_FORMAT
from ..errors import UserInputError
from ..files import sha256_of_file, sha256_of_text
from ..paths import kind_of, resolve_bundled, shown_path
from ..recipe import Recipe
from .folder import CONFIG, find_adapter, recorded_recipe
from .load import Loaded
from .prompts import Prompts

MODEL_CONFIG = "config.json"
PLAIN_TEMPLATE = "alpaca"  # of a model without a chat template: what NEFTune's authors put their untuned base to


@dataclass(frozen=True)
class UntunedFolder:
    """A model that is no adapter, not loaded yet.

    Attributes:
        source: Folder or Hub id, as the caller wrote it.
        recipe: The recipe of a full model that was trained here, else None.
    """

    source: str
    recipe: Recipe | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether it is loaded in NF4, as the bases of adapters are; a full model is loaded as it was trained."""
        return self.recipe is None

    def identity(self) -> str:
        """Return what tells its weights from another's: a hash of local files, or the commit on the Hub."""
        path = Path(resolve_bundled(self.source)).expanduser()
        if path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            return sha256_of_text("".join(sha256_of_file(file) for file in files))[:16]
        config = check_base_config(self.source)
        return getattr(config, "_commit_hash", None) or "unknown"


def find_untuned(source: str | Path) -> UntunedFolder | None:
    """Find a model that is no adapter; None if the source is an adapter, or nothing that can be told from here.

    Args:
        source: A folder, a bundled model, or a Hub id.

    Raises:
        UserInputError: If a Hub id holds neither.
    """
    source = str(source)
    path = Path(resolve_bundled(source)).expanduser()
    if path.is_dir():
        is_adapter = (path / CONFIG).is_file() or not (path / MODEL_CONFIG).is_file()
        return None if is_adapter else UntunedFolder(source, recorded_recipe(path))
    if kind_of(source) != "hub" or "/" not in source:
        return None
    try:
        find_adapter(source)
    except UserInputError:
        # No adapter: a model, if it has a configuration. One that cannot be reached is told by its own message.
        with _named(source):
            check_base_config(source)
        return UntunedFolder(source)
    return None


def load_untuned(
    folder: UntunedFolder, *, device: str = "auto", precision: str = "auto", prompt_template: str | None = None
) -> Loaded:
    """Load a model without an adapter, in NF4 as the bases of adapters are.

    Args:
        folder: From `find_untuned`.
        device, precision: As in `load_trained`.
        prompt_template: Template to ask in, see `template_of_untuned`.

    Raises:
        UserInputError: If it cannot be loaded.
    """
    policy, source = resolve_precision(precision, device), resolve_bundled(folder.source)
    with _named(folder.source):
        tokenizer = load_tokenizer(source)
        try:
            prompts = Prompts(tokenizer, prompt_template or template_of_untuned(folder))
        except UserInputError as error:
            raise UserInputError(f"--prompt-template: {error}") from error
        if folder.is_quantized:
            model = load_nf4_base(source, device=policy.device, compute_dtype=policy.compute_dtype)
        else:
            model = load_unquantized_base(source, device=policy.device, dtype=policy.compute_dtype)
    return Loaded(
        model=model.eval(),
        tokenizer=tokenizer,
        prompts=prompts,
        policy=policy,
        template_is_guessed=prompt_template is None and folder.recipe is None,
    )


def template_of_untuned(folder: UntunedFolder) -> str:
    """Return the prompt template a model is asked in: that of its training, its chat template, or else Alpaca's."""
    data = folder.recipe.data if folder.recipe else None
    stated = TEMPLATE_OF_FORMAT.get(data.format) if data and data.prompt_template == "auto" else None
    stated = stated or (data.prompt_template if data and data.prompt_template != "auto" else None)
    if stated is not None:
        return stated
    with _named(folder.source):
        tokenizer = load_tokenizer(resolve_bundled(folder.source))
    return "chat" if tokenizer.chat_template else PLAIN_TEMPLATE


@contextmanager
def _named(source: str) -> Generator[None, None, None]:
    """Let errors name what the caller wrote, instead of a recipe's key."""
    try:
        yield
    except UserInputError as error:
        rule = str(error).removeprefix("model.name_or_path: ")
        raise UserInputError(f"{shown_path(source)}: {rule}" if rule != str(error) else rule) from error
