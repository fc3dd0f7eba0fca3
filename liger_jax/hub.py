"""From a folder or a hub id to a folder on this machine."""

from collections.abc import Sequence
from pathlib import Path


def local_folder(
    path_or_repo_id: str | Path,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder itself, or the files of a hub repository that match `patterns`, downloaded to the local cache.

    What is in the cache already is not downloaded again. `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE=1`
    work as they do for every program that uses huggingface_hub.

    Raises:
        FileNotFoundError: neither a folder nor something the hub (or, offline, the cache) has.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(
            f"{path} is a file; expected the folder of a checkpoint, or a hub id such as Qwen/Qwen2-VL-2B-Instruct"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo_id = str(path_or_repo_id)
    try:
        return Path(snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns)))
    except HFValidationError:
        raise FileNotFoundError(f"{repo_id}: no such folder, and not a hub id (owner/name)") from None
    except OSError as error:  # what the hub answers, what the cache lacks, no connection: all are OSErrors
        reason = str(error).strip().replace("\n", " ")
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(f"{repo_id}: no such folder, and the hub does not give it{at}: {reason}") from error
