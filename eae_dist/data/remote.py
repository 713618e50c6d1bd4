"""Shards on a web server or in an object store: each is fetched once, checked by its sha256 and kept in a folder of bounded size.

    RemoteFolder    opens the files of a data set at an address and fetches files that are not cached
    FetchAhead      threads that fetch files before they are needed

The name of a cached file is its sha256, so that data sets, ranks, loader workers and jobs on a machine share one cache. File
locks (flock) coordinate the processes; a lock ends with its process, even if the process is killed:

    SHA256.partial  exclusively locked by the process that fetches it; other processes wait and then find the file in the cache
    SHA256          shared lock of every process that has it open; only files that no process has open are removed
    .lock           held while space is made, which the full size of the file then reserves, and while a file gets its name

The cache never changes the data: a file is complete and correct, or an error names it.
"""

import fcntl
import hashlib
import io
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from eae_dist.config import DataConfig
from eae_dist.data.locked_files import alone, remove_unless_used, touch
from eae_dist.data.servers import STORES, Failure, checked_address, filesystem, is_address
from eae_dist.errors import UserError, UserFileError

__all__ = ["FETCHES", "Cache", "FetchAhead", "FetchError", "RemoteFolder", "checked_address", "is_address"]

SHA256 = re.compile(r"[0-9a-f]{64}")
KEPT = re.compile(r"[0-9a-f]{64}(\.partial)?")  # other files in the cache folder are never removed
BLOCK = 1 << 20
FETCHES = 4  # parallel fetches per process: enough if a server limits each connection
LONGEST_WAIT = 30.0  # seconds between two tries
WAIT_FOR_ROOM = 0.2  # seconds until a fetch that waits for space tries again

log = logging.getLogger("eae_dist")


class FetchError(UserFileError):
    """A remote file could not be fetched; the message names it and says what to do."""


@dataclass(frozen=True)
class Cache:
    """Folder and size limit of the cache, and timeout and retries of a fetch."""

    folder: Path
    bytes: int
    timeout: float
    retries: int
    first_wait: float = 1.0  # seconds before the first retry; the wait doubles before each further retry

    @classmethod
    def of(cls, data: DataConfig) -> "Cache":
        """Returns the cache of a configuration."""
        return cls(Path(data.cache).expanduser(), data.cache_bytes, data.timeout, data.retries)


@dataclass(frozen=True)
class RemoteFolder:
    """The files at an address, read through a cache; base: the result of `checked_address`."""

    base: str
    cache: Cache
    remote = True

    @property
    def scheme(self) -> str:
        """One of SCHEMES."""
        return self.base.partition(":")[0]

    def place(self, name: str) -> str:
        """Returns the address of a file."""
        return f"{self.base}/{name if self.scheme in STORES else quote(name, safe='')}"

    def open(self, name: str, sha256: str, size: int | None = None, stop: threading.Event | None = None) -> BinaryIO:
        """Opens the complete, checked file, which is fetched if it is not cached. An open file is not removed from the cache.

        size: in bytes, None if unknown. stop: if another thread sets it, the fetch ends with a FetchError.
        Raises FetchError if the file cannot be fetched, OSError if it cannot be cached.
        """
        while True:
            self.fetch(name, sha256, size, stop=stop)
            try:
                file = open(self._kept(sha256), "rb", buffering=0)  # noqa: SIM115  the caller closes it
            except FileNotFoundError:  # another process has removed it to make space
                continue
            fcntl.flock(file, fcntl.LOCK_SH)
            return file

    def keeps(self, sha256: str) -> bool:
        """True if the file is in the cache."""
        return self._kept(sha256).exists()

    def fetch(
        self, name: str, sha256: str, size: int | None = None, *, ahead: bool = False, stop: threading.Event | None = None
    ) -> bool:
        """Puts the file into the cache if it is not there, and marks it as used last; the oldest files are removed first.

        ahead: if there is no space, return False without fetching. Otherwise a file that is needed may exceed the size limit.
        """
        kept = self._kept(sha256)
        try:
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            if touch(kept):
                return True
            with alone(kept.with_name(f"{sha256}.partial")) as partial:
                if touch(kept):  # the previous holder of the lock has fetched it
                    return True
                partial.truncate(0)  # removes the data of a killed process
                while not self._take_room(partial, sha256, size or 0, needed=not ahead):
                    if ahead:
                        return False
                    time.sleep(WAIT_FOR_ROOM)
                self.copy(name, partial, size, sha256, stop)
                if size is None:
                    self._take_room(partial, sha256, 0, needed=True)  # its size is now counted as well
                partial.flush()
                os.fsync(partial.fileno())
                with self._room():
                    os.replace(kept.with_name(f"{sha256}.partial"), kept)
                return True
        except FetchError:
            raise
        except OSError as error:
            raise UserFileError(
                f"data.cache={self.cache.folder} cannot keep {self.place(name)}: {error.strerror or error}; free some space, "
                f"lower data.cache_bytes={self.cache.bytes} or choose another folder on a local disk"
            ) from error

    def digest(self, name: str) -> str:
        """Returns the sha256 of the remote file; it is not cached."""
        return self.copy(name, None)

    def copy(
        self,
        name: str,
        file: BinaryIO | None,
        size: int | None = None,
        sha256: str | None = None,
        stop: threading.Event | None = None,
    ) -> str:
        """Writes the remote file into `file` (None: nowhere) and returns its sha256; a temporary error is followed by a retry.

        Raises FetchError if the last try fails, also for an unexpected size or sha256.
        """
        stop = stop or threading.Event()
        closed = f"{self.place(name)} was not fetched: the stream is closed"
        failure: Failure | None = None
        for attempt in range(self.cache.retries + 1):
            if attempt:
                log.warning("%s %s; trying again (%d of %d)", self.place(name), failure, attempt, self.cache.retries)
                stop.wait(min(self.cache.first_wait * 2 ** (attempt - 1), LONGEST_WAIT))
            if stop.is_set():
                raise FetchError(closed)
            if file is not None:
                file.seek(0)
                if size is None:  # otherwise _take_room has set its size
                    file.truncate()
            digest, received = hashlib.sha256(), 0
            try:
                for block in self._blocks(name, size):
                    if stop.is_set():
                        break
                    received += len(block)
                    if size is not None and received > size:
                        raise Failure(f"sent more than the {size:,} bytes that the index says")
                    digest.update(block)
                    if file is not None:
                        file.write(block)
                if stop.is_set():
                    raise FetchError(closed)
                if size is not None and received < size:
                    raise Failure(f"ended after {received:,} of {size:,} bytes")
                if sha256 is not None and digest.hexdigest() != sha256:
                    raise Failure(f"sent other bytes than were indexed: sha256 {digest.hexdigest()}, the index says {sha256}")
                return digest.hexdigest()
            except Failure as error:
                failure = error
                if not error.passing:
                    break
        assert failure is not None  # there was at least one try
        tries, patience = "", ""
        if failure.passing:
            tries = f" in {attempt + 1} tries"
            patience = f", or raise data.retries={self.cache.retries} or data.timeout={self.cache.timeout:g}"
        raise FetchError(
            f"{self.place(name)} could not be fetched{tries}: it {failure}; restore the file or its server{patience}"
        )

    def read(self, name: str) -> bytes:
        """Returns the bytes of a small file without a known checksum; it is not cached."""
        file = io.BytesIO()
        self.copy(name, file)
        return file.getvalue()

    def names(self) -> list[str]:
        """Returns the names of the files at the address; only for STORES, because a web server has no list."""
        try:
            found = filesystem(self.base, self.cache.timeout, os.getpid()).ls(self.base, detail=False)
        except Exception as error:  # the libraries behind fsspec raise many types
            raise FetchError(f"{self.base} cannot be listed: it {Failure.of(error, self.scheme, self.cache.timeout)}") from error
        return sorted(path.rpartition("/")[2] for path in found)

    def _blocks(self, name: str, size: int | None) -> Iterator[bytes]:
        """Yields the content of the remote file. Raises Failure for any error."""
        # A file of the web or of Hugging Face is requested as a whole; with a given size, fsspec does not request the size first.
        whole = {"block_size": 0} if self.scheme == "hf" else {"block_size": 0, "size": size or -1}
        how = {"cache_type": "none"} if self.scheme in ("s3", "gs", "az") else whole
        try:
            with filesystem(self.base, self.cache.timeout, os.getpid()).open(self.place(name), "rb", **how) as file:
                while block := file.read(BLOCK):
                    yield block
        except Exception as error:  # the libraries behind fsspec raise many types
            raise Failure.of(error, self.scheme, self.cache.timeout) from error

    def _kept(self, sha256: str) -> Path:
        if not SHA256.fullmatch(sha256):  # it comes from the data and becomes a path
            raise UserError(f"the index of {self.base} gives {sha256!r} for a sha256; write it again with `pack --index`")
        return self.cache.folder / sha256

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Lock of the cache, held while files are counted, removed or renamed."""
        with open(self.cache.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _take_room(self, partial: BinaryIO, sha256: str, size: int, *, needed: bool) -> bool:
        """Reserves the size of the file; the least recently used files that no process has open are removed for it.

        Returns False if there is not enough space. needed: exceed the limit instead, unless other files are being fetched,
        because those can be removed later.
        """
        others = False
        with self._room():
            files = []
            for entry in os.scandir(self.cache.folder):
                if KEPT.fullmatch(entry.name):
                    try:
                        status = entry.stat()
                    except FileNotFoundError:  # the file of an abandoned fetch
                        continue
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
                    # A file that waits for space has no size yet, so two fetches do not wait for each other.
                    others |= entry.name.endswith(".partial") and not entry.name.startswith(sha256) and status.st_size > 0
            excess = sum(file[1] for file in files) + size - self.cache.bytes
            for _, bytes_, path in sorted(files):
                if excess <= 0:
                    break
                if remove_unless_used(path):
                    excess -= bytes_
            if excess > 0 and (others or not needed):
                return False
            if excess > 0:
                log.warning(
                    "data.cache=%s holds %s bytes more than data.cache_bytes=%s, all of them in use; raise data.cache_bytes, "
                    "lower data.lanes or let fewer jobs share the folder",
                    *(self.cache.folder, f"{excess:,}", self.cache.bytes),
                )
            if size:
                partial.truncate(size)
            return True


class FetchAhead:
    """Fetches requested files in background threads, which end with `close`.

    An error is ignored here: `RemoteFolder.open` tries again when the file is needed, and raises the error.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._wanted: dict[str, tuple] = {}  # by sha256, in the order of the requests
        self._changed = threading.Condition()
        self._threads = 0

    def ask(self, folder: RemoteFolder, name: str, sha256: str, size: int | None) -> None:
        """Requests a file; arguments as for `RemoteFolder.open`."""
        with self._changed:
            self._wanted[sha256] = (folder, name, sha256, size)
            self._changed.notify()
        if self._threads < FETCHES:
            self._threads += 1
            threading.Thread(target=self._work, name="fetch-ahead", daemon=True).start()

    def forget(self, sha256: str) -> None:
        """Drops the request for a file that is now opened directly."""
        with self._changed:
            self._wanted.pop(sha256, None)

    def close(self) -> None:
        """Ends all fetches and threads."""
        with self._changed:
            self.stop.set()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self.stop.is_set())
                if self.stop.is_set():
                    return
                folder, name, sha256, size = wanted = self._wanted.pop(next(iter(self._wanted)))
            try:
                if not folder.fetch(name, sha256, size, ahead=True, stop=self.stop):
                    with self._changed:
                        self._wanted = {sha256: wanted} | self._wanted
                    self.stop.wait(WAIT_FOR_ROOM)
            except (OSError, ValueError) as error:
                log.debug("not fetched in advance: %s", error)
