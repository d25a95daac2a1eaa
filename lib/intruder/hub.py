"""From what a user names, a folder: a local directory, a hub id, or a hub id at a revision (`owner/name@revision`)."""

import re
from pathlib import Path

from .errors import InputError

# What is downloaded: safetensors and the two configurations; never a pickle, never code.
PATTERNS = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
]
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w./-]+))?")


def local_folder(source: str | Path) -> Path:
    """The folder that holds the checkpoint `source`; for a hub id, the snapshot in the local cache of the hub.

    A path that exists is used as it is, and a Path object is never taken for a hub id. Anything else that reads as
    `name`, `owner/name` or `owner/name@revision` (branch, tag or commit) is fetched with
    huggingface_hub.snapshot_download: only safetensors, their index and the two configurations; what the cache holds
    already is not fetched again, and with HF_HUB_OFFLINE=1 nothing is fetched. Raises InputError if the hub cannot give
    it, saying why. What does not read as an id is returned unchanged for the caller to name.
    """
    path = Path(source)
    text = str(source)
    match = HUB_ID.fullmatch(text)
    if isinstance(source, Path) or path.exists() or not match or ".." in text:
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, HfHubHTTPError
    except ImportError as error:
        raise InputError(
            f"no folder {text}, and huggingface_hub is not installed to look for it on the hub; wanted a local folder, "
            'or `pip install "intruder[train]"`'
        ) from error
    try:
        return Path(snapshot_download(match["id"], revision=match["revision"], allow_patterns=PATTERNS))
    except (OSError, HFValidationError, HfHubHTTPError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no folder {text} here, and the hub did not give {text!r} ({type(error).__name__}: {reason}); wanted a "
            "local folder, a hub id such as owner/name, or owner/name@revision"
        ) from error
