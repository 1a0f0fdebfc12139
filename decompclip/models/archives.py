"""Zip archives of torch's, held against their own sizes and checksums before anything in them is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path

MOST_MEMBERS = 1 << 20
_PIECE = 1 << 20


def members_of(path: Path) -> list[zipfile.ZipInfo]:
    """What an archive says that it holds.

    Raises:
        ValueError: no archive that can be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception as error:  # zipfile trips over odd fields in many ways
        raise ValueError(
            f"it is no zip archive that can be read ({error or type(error).__name__})"
        ) from error


def check_archive(path: Path) -> None:
    """Check an archive as `torch.save` and `torch.jit.save` write it; its members are read once, in pieces.

    torch writes members plain, one behind the other, each with a checksum that it does not look at when it loads.
    Only the source code in a TorchScript archive is compressed, which nobody here reads.

    Raises:
        ValueError: a member that is compressed, larger than its place in the file, there twice, or not as it was
            written; or no archive that can be read.
    """
    members = [member for member in members_of(path) if "/code/" not in member.filename]
    _check_sizes(members, path.stat().st_size)
    if not any(member.CRC for member in members):
        return  # written after torch.serialization.set_crc32_options(False): there is nothing to check
    with zipfile.ZipFile(path) as archive:
        for member in members:
            try:
                with archive.open(member) as content:
                    while content.read(_PIECE):
                        pass
            except Exception as error:
                raise ValueError(
                    f"its member {member.filename!r} is not as it was written ({error})"
                ) from error


def _check_sizes(members: list[zipfile.ZipInfo], whole: int) -> None:
    if len(members) > MOST_MEMBERS:
        raise ValueError(f"it has {len(members):,} members; expected {MOST_MEMBERS:,} at most")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(
                f"its member {member.filename!r} is compressed, {member.compress_size:,} bytes that unpack to "
                f"{member.file_size:,}; torch compresses no weights"
            )
    if (told := sum(member.file_size for member in members)) > whole:
        raise ValueError(f"its members are said to have {told:,} bytes, in a file of {whole:,}")
    seen: set[str] = set()
    for member in members:
        if member.filename in seen:
            raise ValueError(f"its member {member.filename!r} is there twice")
        seen.add(member.filename)
