"""Weight files on the Hugging Face hub."""

import re
from pathlib import Path

from zoo.errors import UserError

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:.+)?")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")  # the safest first


def is_hub_id(text: str) -> bool:
    """Whether `text` reads owner/name or owner/name:file, and not like a file that should be here."""
    return bool(_ID.fullmatch(text)) and (":" in text or not text.endswith(_SUFFIXES))


def fetch(name: str) -> Path:
    """A weight file of the hub; from its cache when it was fetched before and the hub cannot be reached.

    Args:
        name: owner/name of a repository with one weight file, or owner/name:file.

    Raises:
        FileNotFoundError: no such repository or file, or no network.
        UserError: the repository holds several weight files, or none.
    """
    from huggingface_hub import hf_hub_download

    repository, _, file = name.partition(":")
    try:
        return Path(hf_hub_download(repository, file or _only(repository)))
    except UserError:
        raise
    except Exception as error:  # the classes of its network errors change with its versions
        raise FileNotFoundError(
            f"load: {name!r} is neither a file here nor to be had from the hub; check the name or the network"
        ) from error


def _only(repository: str) -> str:
    """The one weight file of a repository, safetensors before others."""
    files = _files(repository)
    for suffix in _SUFFIXES:
        found = [file for file in files if file.endswith(suffix)]
        if len(found) == 1:
            return found[0]
        if found:
            shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
            raise UserError(f"load: {repository} holds several weight files ({shown}); name one as owner/name:file")
    raise UserError(f"load: {repository} holds no weight file; give owner/name:file of another repository")


def _files(repository: str) -> list[str]:
    from huggingface_hub import model_info, snapshot_download

    try:
        return [file.rfilename for file in model_info(repository, timeout=10).siblings or ()]
    except Exception:
        folder = Path(snapshot_download(repository, local_files_only=True))
        return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
