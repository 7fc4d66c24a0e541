"""From what the user typed to a folder on this machine: a path as it is, or a hub id through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from streamq.errors import UsageError

# A transformer's weights and every small configuration file; not text encoders, VAEs or tokenizers.
WANTED = ["*.json", "diffusion_pytorch_model*.safetensors"] + [
    f"{folder}/*.safetensors" for folder in ("transformer", "transformer_2", "high_noise_model", "low_noise_model")
]
UNWANTED = [f"{folder}/*" for folder in ("text_encoder*", "image_encoder", "vae", "tokenizer", "google", "assets")]


def resolve(
    model_path: str, *, download: bool, option: str = "--model_path", wanted: list[str] | None = None,
    unwanted: list[str] | None = UNWANTED,
) -> Path:  # fmt: skip
    """The local file or folder. `download` False looks into the local cache only (plan and inspect move no weights).

    `option` is what the user gave it to; `wanted` and `unwanted` are patterns of a repository's files, by default a
    transformer's. Raises UsageError.
    """
    path = Path(model_path).expanduser()
    try:
        if path.exists():
            return path
    except OSError as error:  # a name that is too long
        raise UsageError(f"{option} {model_path[:200]}: {error.strerror}; give another path") from error
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model_path):
        raise UsageError(f"{option} {model_path}: no such file or folder, and not a hub id (owner/name)")
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model_path, allow_patterns=wanted or WANTED, ignore_patterns=unwanted, local_files_only=not download
            )
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{option} {model_path}: no such path here, and not to be had as a hub id ({reason});"
            f" `hf download {model_path}` fetches it where there is a network"
        ) from error
