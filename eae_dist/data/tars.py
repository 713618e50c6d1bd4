"""The members of a tar file in WebDataset form, one by one, each with its place; a damaged tar is never a shorter one."""

import tarfile
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

from eae_dist.errors import UserError

COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
MOST_KINDS = 5  # of members that one line shows


def members_of(
    path: Path, extensions: Container[str], ignored: Counter, last_dot: bool = False
) -> Iterator[tuple[str, str, int, bytes]]:
    """Yields key, extension, offset and bytes of the members with these extensions; counts the others in `ignored`.

    The key is the member's name up to the first dot of its base name, as in webdataset; last_dot: up to the last.
    Raises ValueError for a file that is compressed, truncated, damaged or not a tar.
    """
    refuse_compressed(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    # Otherwise tarfile keeps every header in memory.
                    tar.members.clear()  # type: ignore[attr-defined]  # the types of the standard library lack it
                    folder, slash, base = member.name.rpartition("/")
                    key, _, extension = base.rpartition(".") if last_dot else base.partition(".")
                    extension = extension.lower()
                    if not member.isreg() or member.issparse():
                        ignored["folders" if member.isdir() else "links and special files"] += 1
                    elif not key or not extension:
                        ignored["files without a key or an extension"] += 1
                    elif extension not in extensions:
                        ignored[f".{extension}"] += 1
                    elif not _is_utf8(member.name):
                        raise UserError(f"{path}: the name of member {member.name!r} is not UTF-8; rename it")
                    elif member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"the data of {member.name!r} ends early")
                    else:
                        file.seek(member.offset_data)
                        yield folder + slash + key, extension, member.offset_data, file.read(member.size)
                end = tar.offset
        except tarfile.TarError as error:
            raise _truncated(path, str(error)) from error
        # tarfile stops at any unreadable header. The true end consists of zeros, and nothing follows it.
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
        if len(rest) < tarfile.BLOCKSIZE:
            raise _truncated(path, "its end mark is missing")
        while rest:
            if rest.strip(b"\0"):
                raise _truncated(path, f"from byte {end} on it is neither a member nor the end mark")
            rest = file.read(1 << 20)


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # tarfile decodes invalid bytes to surrogates
        return False


def refuse_compressed(path: Path) -> None:
    """Raises ValueError for a compressed file, which says how to unpack it."""
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{path} is compressed, but samples are read by their offset; unpack it with `{program}` first")


def _truncated(path: Path, why: str) -> UserError:
    return UserError(f"{path} is truncated, damaged or not a tar file ({why}); fetch or write it again")


def left_alone(ignored: Counter, images: Container[str]) -> str:
    """Returns a sentence about the members that are neither image nor label, with at most MOST_KINDS kinds of them.

    images: the extensions of images.
    """
    dotted = {kind for kind in ignored if kind.startswith(".") and kind.rpartition(".")[0] and kind.rpartition(".")[2] in images}
    kinds = Counter({kind: count for kind, count in ignored.items() if kind not in dotted}).most_common()
    said = [f"{count:,} {kind}" for kind, count in kinds[:MOST_KINDS]]
    if kinds[MOST_KINDS:]:
        said.append(f"{sum(count for _, count in kinds[MOST_KINDS:]):,} of {len(kinds) - MOST_KINDS} other kinds")
    if dotted:
        said.append(
            f"{sum(ignored[kind] for kind in dotted):,} images with a dot before the extension (KEY{min(dotted)}): a key ends at "
            f"the first dot of the name; where keys contain dots, `pack webdataset --dots-in-keys` reads them"
        )
    return f"members left alone: {', '.join(said)}" if said else ""
