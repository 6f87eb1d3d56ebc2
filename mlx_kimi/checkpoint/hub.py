"""Models by name: found in a folder, or downloaded from the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_kimi.errors import KimiError
from mlx_kimi.user_files import is_there

# What belongs to a model beside its weights and config.json. Never Python: no code of a checkpoint
# is fetched, run or passed on.
BESIDE_WEIGHTS = (
    "tiktoken.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)
# A repository may hold other formats of the same weights.
ALL_BUT_WEIGHTS = ["*.safetensors.index.json", "config.json", *BESIDE_WEIGHTS]
NEEDED = ["*.safetensors", *ALL_BUT_WEIGHTS]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_folder(path_or_hub_id: str | Path) -> bool:
    """Whether it is a folder here.

    Raises:
        KimiError: it is neither that nor a name on the hub.
    """
    name, folder = str(path_or_hub_id), Path(path_or_hub_id)
    if name and os.path.isdir(folder):  # unlike Path's, false for what cannot be a path
        return True
    if os.path.exists(folder) or not _HUB_ID.fullmatch(name):
        raise KimiError(
            f"{name or '(nothing)'}: a model must be a folder or a hub name such as "
            "moonshotai/Kimi-Linear-48B-A3B-Instruct"
        )
    return False


def local_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a model, downloaded if it is not a folder here.

    Downloads show their progress on stderr, resume where they stopped, and are kept in the hub's
    own cache.

    Raises:
        KimiError: neither a model's folder nor a name on the hub, or the download failed.
    """
    if is_folder(path_or_hub_id):
        folder = Path(path_or_hub_id)
        if not is_there(folder / "config.json"):
            raise KimiError(f"{folder}: no model's folder: it has no config.json")
        return folder
    return downloaded(str(path_or_hub_id), NEEDED)


def downloaded(name: str, files: list[str], revision: str | None = None) -> Path:
    """The folder in the hub's cache with those files of a model, patterns as of a shell.

    Raises:
        KimiError: the download failed.
    """
    with in_one_line(f"{name}: no such folder, and "):
        # Imported here: it takes a third of a second, and folders do not need it.
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, ignore_patterns=["*/*"]
            )
        )


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a KimiError that begins with `what`."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError:
        raise KimiError(f"{what}the hub cannot be reached") from None
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise KimiError(f"{what}the hub says: {reason}") from None
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise KimiError(f"{what}the download failed: {reason}") from None
