"""Web servers and object stores: which addresses are read, how a server is connected to, and why a try to read failed."""

import asyncio
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import unquote, urlsplit

import fsspec

from eae_dist.errors import UserError

STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}  # scheme -> the package that reads it
SCHEMES = ("http", "https", *STORES)
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def is_address(root: str | Path) -> TypeGuard[str]:
    """True if the root of a data set has a URL scheme and is not a local folder."""
    return isinstance(root, str) and SCHEME.match(root) is not None and not Path(root).exists()


def checked_address(address: str, what: str) -> str:
    """Returns the address of a folder without its last slash. Raises ValueError that begins with `what` for other addresses.

    Other schemes of fsspec are rejected, because some read local files, and some tools run commands.
    """
    scheme = (SCHEME.match(address) or [""])[0].rstrip(":").lower()
    if scheme not in SCHEMES or not address.lower().startswith(f"{scheme}://"):
        raise UserError(f"{what}={address} is not an address of data; expected {'://, '.join(SCHEMES)}://")
    parts = urlsplit(address)
    folders = [unquote(folder) for folder in parts.path.strip("/").split("/")]
    if not parts.netloc or {"@", "$"} & set(address) or parts.query or parts.fragment or not address.isprintable():
        raise UserError(f"{what}={address} is not a plain address; expected SCHEME://HOST/FOLDER without user, $, ? or #")
    if {".", ".."} & set(folders) or ("" in folders and len(folders) > 1) or any("/" in folder for folder in folders):
        raise UserError(f"{what}={address} is not a plain address; leave out '.', '..' and empty folders")
    return scheme + address[len(scheme) :].rstrip("/")


class Failure(Exception):
    """The reason why a try failed, as a phrase about the file. passing: True if another try can succeed."""

    def __init__(self, what: str, passing: bool = True):
        super().__init__(what)
        self.passing = passing

    @classmethod
    def of(cls, error: Exception, scheme: str, timeout: float) -> "Failure":
        """Returns the reason that an error of the libraries behind fsspec means; scheme: one of SCHEMES."""
        if isinstance(error, FileNotFoundError):
            return cls("is not there", passing=False)
        if isinstance(error, PermissionError):
            return cls(f"may not be read ({error})", passing=False)
        if isinstance(error, ImportError):
            return cls(f"needs {STORES.get(scheme, 'aiohttp')}: pip install -e '.[{scheme}]'", passing=False)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):  # the same class from Python 3.11 on
            return cls(f"sent nothing for data.timeout={timeout:g} seconds")
        if (status := getattr(error, "status", None)) is not None:
            # Only these client errors are temporary: too slow, too early, too many requests.
            return cls(
                f"was answered with {status} {getattr(error, 'message', '')}", passing=status >= 500 or status in (408, 425, 429)
            )
        return cls(f"broke off ({type(error).__name__}: {error})")


@lru_cache(maxsize=4)
def filesystem(base: str, timeout: float, process: int) -> fsspec.AbstractFileSystem:
    """Returns the fsspec file system of a server; one per process, because connections do not survive a fork."""
    scheme = base.partition(":")[0]
    options: dict[str, Any] = {}
    if scheme == "s3":
        options["config_kwargs"] = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
    elif scheme == "gs":
        options["requests_timeout"] = timeout
    elif scheme == "az":
        options |= {"connection_timeout": timeout, "read_timeout": timeout}
    elif scheme in ("http", "https"):  # Hugging Face takes its timeout from the environment
        import aiohttp  # imported here because it takes a fifth of a second and most data is local

        # The default of aiohttp ends every download after five minutes.
        patience = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        options["client_kwargs"] = {"timeout": patience}
    found = fsspec.filesystem(scheme, **options, use_listings_cache=False, skip_instance_cache=True)
    found.retries = 1  # the default of s3fs is five tries
    return found
