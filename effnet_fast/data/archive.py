"""Download an archive once, verify it and unpack it.

Every step can be interrupted. A download resumes from its `.part` file. The archive and the unpacked folder get their
final names only when they are complete, and each file is verified again when it is read.
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
_TIMEOUT = 30.0  # seconds without an answer after which a server counts as unreachable
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class Archive:
    """A tar.gz on the network that contains one folder.

    Attributes:
        title: the data set's usual name, for messages.
        url: address; its last part is the file name.
        md5: of the tar.gz.
        folder: the folder inside the tar.gz.
        files: name -> md5 of the files to unpack from that folder; other files are ignored.
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
    """Return the unpacked folder; unpack or download the tar.gz if necessary, in one process at a time.

    Args:
        archive: what to get.
        data_dir: the unpacked folder, or a folder that contains it or the tar.gz, or where to put both.
        download: whether to use the network.

    Returns:
        The folder with the unpacked files, which `read` verifies.

    Raises:
        FileNotFoundError: the archive is missing and cannot be downloaded.
        ConnectionError: the download was interrupted; another call resumes it.
        ValueError: the tar.gz is truncated or modified, or contains links or paths outside its folder.
        OSError: data_dir cannot be written, or the disk is full.
    """
    if folder := _unpacked_folder(archive, data_dir):
        return folder
    tarball = data_dir / archive.filename
    if not download and not tarball.is_file():
        raise _missing(archive, data_dir, "downloading is off")
    with _write_errors_in_one_line(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        with _exclusive(archive, data_dir):
            if folder := _unpacked_folder(archive, data_dir):
                return folder
            if not tarball.is_file():
                _download(archive, tarball)
            return _unpack(archive, tarball)


def read(archive: Archive, folder: Path, name: str) -> bytes:
    """Read and verify one file of the unpacked folder.

    Raises:
        FileNotFoundError, ValueError: the file is missing, truncated or modified.
    """
    path = folder / name
    remedy = f"delete {folder} and run again to restore it"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    content = path.read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != archive.files[name]:
        raise ValueError(f"{path} is truncated or modified (md5 {md5}, not {archive.files[name]}): {remedy}")
    return content


def _unpacked_folder(archive: Archive, data_dir: Path) -> Path | None:
    for folder in (data_dir / archive.folder, data_dir):
        present = [(folder / name).is_file() for name in archive.files]
        if all(present) or (any(present) and folder.resolve().name == archive.folder):
            return folder
    return None


def _missing(archive: Archive, data_dir: Path, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{archive.title} is missing: neither {archive.folder}/ nor {archive.filename} is in {data_dir}, and {reason}; "
        f"download {archive.url} elsewhere and copy it to {data_dir}"
    )


@contextlib.contextmanager
def _write_errors_in_one_line(data_dir: Path) -> Iterator[None]:
    """Turn errors of writing into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(
                f"the disk of {data_dir} is full: free some space and run again, or use another --data_dir"
            ) from error
        if error.errno in _UNUSABLE:
            raise OSError(f"cannot write to {data_dir} ({error.strerror}): use another --data_dir") from error
        raise


@contextlib.contextmanager
def _exclusive(archive: Archive, data_dir: Path) -> Iterator[None]:
    lock = FileLock(data_dir / f".{archive.folder}.lock")
    with contextlib.suppress(NotImplementedError):  # a file system without locks
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that is downloading {archive.title}", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(archive: Archive, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    present = part.stat().st_size if part.exists() else 0
    if response := _request(archive, target.parent, present):
        with response:
            _receive(archive, response, part, present)
    md5 = _md5(part)
    if md5 != archive.md5:
        part.unlink()
        raise ValueError(
            f"{archive.url} sent a file with md5 {md5}, not {archive.md5}; it was deleted: run again, or copy the "
            f"right file to {target}"
        )
    part.replace(target)


def _request(archive: Archive, data_dir: Path, present: int) -> HTTPResponse | None:
    """Request everything after the first `present` bytes; None if there is nothing more."""
    request = urllib.request.Request(archive.url, headers={"User-Agent": "effnet-fast"})
    if present:
        request.add_header("Range", f"bytes={present}-")
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if present and error.code == 416:
            return None
        raise _missing(archive, data_dir, f"the server answered {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _missing(archive, data_dir, f"the server cannot be reached ({_one_line(reason)})") from error


def _receive(archive: Archive, response: HTTPResponse, part: Path, present: int) -> None:
    """Append the response to the first `present` bytes of the part; start over if the server sends the whole file."""
    resumed = response.status == 206
    done = present if resumed else 0
    length = response.headers.get("Content-Length")
    total = done + int(length) if length else None
    with part.open("ab" if resumed else "wb") as file, _progress(archive.title, total, done) as advance:
        for chunk in _chunks(archive, response):
            file.write(chunk)
            advance(len(chunk))
            done += len(chunk)
    if total is not None and done < total:
        raise _interrupted(archive, f"{done} of {total} bytes arrived")


def _chunks(archive: Archive, response: HTTPResponse) -> Iterator[bytes]:
    # A separate generator, so that network errors are not mistaken for disk errors.
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except (OSError, HTTPException) as error:
        raise _interrupted(archive, _one_line(error)) from error


def _interrupted(archive: Archive, reason: str) -> ConnectionError:
    return ConnectionError(f"the download of {archive.url} was interrupted ({reason}): run again to resume it")


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Archive, tarball: Path) -> Path:
    md5 = _md5(tarball)
    if md5 != archive.md5:
        raise ValueError(f"{tarball} is truncated or modified (md5 {md5}, not {archive.md5}): delete it and run again")
    target, unfinished = tarball.parent / archive.folder, tarball.parent / f".{archive.folder}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        _extract(archive, tarball, unfinished)
        for name in archive.files:
            read(archive, unfinished, name)
        try:
            unfinished.replace(target)
        except OSError as error:
            raise OSError(f"{target} is in the way ({error.strerror}), not complete: delete it, run again") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _extract(archive: Archive, tarball: Path, target: Path) -> None:
    """Copy the files named in `archive.files`; refuse an archive with links or paths outside its folder."""
    try:
        with tarfile.open(tarball, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                inside = path.parts[:1] == (archive.folder,) and ".." not in path.parts
                if not inside or not (member.isreg() or member.isdir()):
                    raise ValueError(
                        f"{tarball} contains {member.name!r}, a link or a path outside of {archive.folder}/"
                    )
                content = tar.extractfile(member)
                if content and len(path.parts) == 2 and path.name in archive.files:
                    with (target / path.name).open("wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{tarball} is not a readable tar.gz ({_one_line(error)})") from error


@contextlib.contextmanager
def _progress(title: str, total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal or in a notebook, else a few lines; yields a function that takes the new bytes."""
    from rich import progress

    from effnet_fast.consoles import line_console, progress_bar

    columns = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    bar = progress_bar(line_console(stderr=True), *progress.Progress.get_default_columns()[:2], *columns)
    if bar is not None:
        with bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda size: bar.update(task, advance=size, refresh=True)
        return
    step = max(1, (total or 160 << 20) // 10)
    of_total = f" of {total / 1e6:.0f}" if total else ""

    def advance(size: int) -> None:
        nonlocal done
        if (done + size) // step > done // step:
            print(f"{title}: {(done + size) / 1e6:.0f}{of_total} MB", file=sys.stderr)
        done += size

    yield advance
