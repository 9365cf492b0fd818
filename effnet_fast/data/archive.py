"""An archive from the network: fetched once, verified, unpacked, and never half there.

Every step can be interrupted. A download goes on from its `.part` file; the archive and the unpacked folder get their
names only when they are whole; and whoever reads a file verifies it again.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

_CHUNK = 1 << 18  # bytes
_SILENCE = 30.0  # seconds without an answer after which a server counts as unreachable
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class Archive:
    """A tar.gz on the network that holds one folder.

    Attributes:
        title: what people call it.
        url: where it is; the last part is its file name.
        md5: of the tar.gz.
        folder: the folder inside it.
        files: name -> md5 of the files of that folder that are used; others are left in the tar.gz.
    """

    title: str
    url: str
    md5: str
    folder: str
    files: Mapping[str, str]

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def fetch(archive: Archive, data_dir: Path, download: bool = True) -> Path:
    """Find, unpack or download an archive; the network is asked last, and one process at a time.

    Args:
        archive: what to get.
        data_dir: the unpacked folder, or a folder that holds it or the tar.gz, or where both are to be put.
        download: whether the network may be asked.

    Returns:
        The folder with the unpacked files, which `read` verifies.

    Raises:
        FileNotFoundError: it is not there and cannot be downloaded.
        ConnectionError: the download broke off; another call goes on from there.
        ValueError: the tar.gz is truncated or altered, or holds what does not belong there.
        OSError: data_dir cannot be written, or its disk is full.
    """
    if found := _unpacked(archive, data_dir):
        return found
    tarball = data_dir / archive.filename
    if not download and not tarball.is_file():
        raise _missing(archive, data_dir, "downloading is switched off")
    with _writing(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        with _only_process(archive, data_dir):
            if found := _unpacked(archive, data_dir):
                return found
            if not tarball.is_file():
                _download(archive, tarball)
            return _unpack(archive, tarball)


def read(archive: Archive, folder: Path, name: str) -> bytes:
    """One file of the unpacked folder.

    Raises:
        FileNotFoundError, ValueError: the file is missing, truncated or altered.
    """
    path = folder / name
    remedy = f"delete {folder} and run again to get it afresh"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    content = path.read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != archive.files[name]:
        raise ValueError(f"{path} is truncated or altered (md5 {md5}, not {archive.files[name]}): {remedy}")
    return content


def _unpacked(archive: Archive, data_dir: Path) -> Path | None:
    for folder in (data_dir / archive.folder, data_dir):
        present = [(folder / name).is_file() for name in archive.files]
        if all(present) or (any(present) and folder.resolve().name == archive.folder):
            return folder
    return None


def _missing(archive: Archive, data_dir: Path, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{archive.title} is missing: neither {archive.folder}/ nor {archive.filename} is in {data_dir}, and {reason}; "
        f"bring {archive.url} from elsewhere and put it into {data_dir}"
    )


@contextlib.contextmanager
def _writing(data_dir: Path) -> Iterator[None]:
    """Say in one line what to do about a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(
                f"the disk of {data_dir} is full: make room and run again, or name another --data_dir"
            ) from error
        if error.errno in _UNUSABLE:
            raise OSError(f"cannot write to {data_dir} ({error.strerror}): name another --data_dir") from error
        raise


@contextlib.contextmanager
def _only_process(archive: Archive, data_dir: Path) -> Iterator[None]:
    lock = FileLock(data_dir / f".{archive.folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that gets {archive.title}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(archive: Archive, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    held = part.stat().st_size if part.exists() else 0
    if response := _request(archive, target.parent, held):
        with response:
            _receive(archive, response, part, held)
    md5 = _md5(part)
    if md5 != archive.md5:
        part.unlink()
        raise ValueError(
            f"{archive.url} gave a file with md5 {md5}, not {archive.md5}; it was deleted: run again, or bring the "
            f"right file from elsewhere to {target}"
        )
    part.replace(target)


def _request(archive: Archive, data_dir: Path, held: int) -> HTTPResponse | None:
    """Ask for all but the first `held` bytes; None when the server has no more than those."""
    request = urllib.request.Request(archive.url, headers={"User-Agent": "effnet-fast"})
    if held:
        request.add_header("Range", f"bytes={held}-")
    try:
        return urllib.request.urlopen(request, timeout=_SILENCE)
    except urllib.error.HTTPError as error:
        if held and error.code == 416:
            return None
        raise _missing(archive, data_dir, f"its server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _missing(archive, data_dir, f"its server cannot be reached ({_one_line(reason)})") from error


def _receive(archive: Archive, response: HTTPResponse, part: Path, held: int) -> None:
    """Append the answer to the `held` bytes of the part, or begin anew where the server sends everything."""
    resumed = response.status == 206
    done = held if resumed else 0
    length = response.headers.get("Content-Length")
    total = done + int(length) if length else None
    with part.open("ab" if resumed else "wb") as file, _progress(archive.title, total, done) as advance:
        for chunk in _chunks(archive, response):
            file.write(chunk)
            advance(len(chunk))
            done += len(chunk)
    if total is not None and done < total:
        raise _broken_off(archive, f"{done} of {total} bytes are here")


def _chunks(archive: Archive, response: HTTPResponse) -> Iterator[bytes]:
    # A generator of its own, so that errors of the network are told from those of the disk.
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except (OSError, HTTPException) as error:
        raise _broken_off(archive, _one_line(error)) from error


def _broken_off(archive: Archive, reason: str) -> ConnectionError:
    return ConnectionError(f"the download of {archive.url} broke off ({reason}): run again to go on from there")


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Archive, tarball: Path) -> Path:
    md5 = _md5(tarball)
    if md5 != archive.md5:
        raise ValueError(f"{tarball} is truncated or altered (md5 {md5}, not {archive.md5}): delete it and run again")
    target, unfinished = tarball.parent / archive.folder, tarball.parent / f".{archive.folder}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        _extract(archive, tarball, unfinished)
        for name in archive.files:
            read(archive, unfinished, name)
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _extract(archive: Archive, tarball: Path, target: Path) -> None:
    """Copy the files that are used, each under its bare name; an archive that reaches elsewhere is refused whole."""
    try:
        with tarfile.open(tarball, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                inside = path.parts[:1] == (archive.folder,) and ".." not in path.parts
                if not inside or not (member.isreg() or member.isdir()):
                    raise ValueError(f"{tarball} holds {member.name!r}, a link or a path outside of {archive.folder}/")
                content = tar.extractfile(member)
                if content and len(path.parts) == 2 and path.name in archive.files:
                    with (target / path.name).open("wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{tarball} is not a readable tar.gz ({_one_line(error)})") from error


@contextlib.contextmanager
def _progress(title: str, total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a few lines elsewhere; yields a function that takes the number of new bytes."""
    if sys.stderr.isatty():
        from rich import progress
        from rich.console import Console

        columns = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
        with progress.Progress(
            *progress.Progress.get_default_columns()[:2], *columns, console=Console(stderr=True)
        ) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda size: bar.advance(task, size)
        return
    step = max(1, (total or 160 << 20) // 10)
    whole = f" of {total / 1e6:.0f}" if total else ""

    def advance(size: int) -> None:
        nonlocal done
        if (done + size) // step > done // step:
            print(f"{title}: {(done + size) / 1e6:.0f}{whole} MB", file=sys.stderr)
        done += size

    yield advance
