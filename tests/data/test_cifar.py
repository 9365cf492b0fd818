"""CIFAR: archives and pickles load completely, or fail with one line and leave nothing behind."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import effnet_fast
from effnet_fast.data import load_dataset
from effnet_fast.data.archive import Archive
from effnet_fast.data.cifar import CIFAR10, Source, load_cifar, load_source, unpickle
from effnet_fast.data.dataset import channel_statistics

FOLDER = "tiny-python"
SUPERCLASSES = (0, 0, 1)


def batch(count: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = rng.integers(0, 3, count).tolist()
    coarse = [SUPERCLASSES[label] for label in labels]
    return pickle.dumps({b"data": images, b"fine_labels": labels, b"coarse_labels": coarse}, protocol=4)


def contents() -> dict[str, bytes]:
    names = {b"fine_label_names": [b"ant", b"bee", b"cat"], b"coarse_label_names": [b"insect", b"mammal"]}
    meta = pickle.dumps(names, protocol=4)
    return {"train": batch(40, 1), "test": batch(10, 2), "meta": meta, "readme.html": b"not unpacked"}


def regular(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


def pack(*extra: tuple[tarfile.TarInfo, bytes]) -> bytes:
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode="w:gz") as tar:
        folder = tarfile.TarInfo(FOLDER)
        folder.type = tarfile.DIRTYPE
        for member, content in (
            (folder, b""),
            *extra,
            *(regular(f"{FOLDER}/{name}", content) for name, content in contents().items()),
        ):
            tar.addfile(member, io.BytesIO(content))
    return blob.getvalue()


def source_of(tarball: bytes, url: str = "http://127.0.0.1:9/tiny.tar.gz") -> Source:
    """The source of a tarball; nothing listens on port 9."""
    files = {name: hashlib.md5(content).hexdigest() for name, content in contents().items() if name != "readme.html"}
    archive = Archive("TINY", url, hashlib.md5(tarball).hexdigest(), FOLDER, files)
    keys = "meta", "fine_labels", "fine_label_names"
    coarse = "coarse_labels", "coarse_label_names"
    return Source("tiny", archive, ("train",), ("test",), *keys, (0.5,) * 3, (0.3,) * 3, *coarse)


TARBALL = pack()
SOURCE = source_of(TARBALL)


def unpacked(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in contents().items():
        (folder / name).write_bytes(content)
    return folder


def check(dataset) -> None:
    expected = pickle.loads(contents()["train"])
    assert dataset.classes == ("ant", "bee", "cat")
    assert dataset.train.images.dtype == np.uint8
    assert np.array_equal(dataset.train.images.transpose(0, 3, 1, 2).reshape(40, 3072), expected[b"data"])
    assert dataset.train.labels.tolist() == expected[b"fine_labels"]
    assert len(dataset.test) == 10
    assert dataset.superclasses == (("insect", "mammal"), SUPERCLASSES)


def refusal(kind: type[Exception], *args, **kwargs) -> str:
    """The message of an expected error, which must be one line."""
    with pytest.raises(kind) as caught:
        load_source(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


class Server:
    """A local HTTP server that records requests, and can ignore ranges or close early."""

    def __init__(self) -> None:
        self.content = TARBALL
        self.ranges: list[str | None] = []
        self.supports_ranges = True
        self.stop_after: int | None = None
        self.status: int | None = None
        self.answering = threading.Event()
        self.answering.set()
        state = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requested = self.headers["Range"]
                state.answering.wait()
                state.ranges.append(requested)
                start = int(re.fullmatch(r"bytes=(\d+)-", requested)[1]) if requested and state.supports_ranges else 0
                if state.status or (start and start >= len(state.content)):
                    self.send_error(state.status or 416)
                    return
                body = state.content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: state.stop_after])

            def log_message(self, *_args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.source = source_of(TARBALL, f"http://127.0.0.1:{self.server.server_port}/tiny.tar.gz")


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    serving = Server()
    thread = threading.Thread(target=serving.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serving
    serving.answering.set()
    serving.server.shutdown()
    serving.server.server_close()
    thread.join()


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


# Where the data can be


@pytest.mark.parametrize("form", ["folder itself", "holds the folder", "holds the tar.gz"])
def test_local_data_needs_no_network(tmp_path, form):
    if form == "holds the tar.gz":
        (tmp_path / "tiny.tar.gz").write_bytes(TARBALL)
        data_dir = tmp_path
    else:
        folder = unpacked(tmp_path / FOLDER)
        data_dir = folder if form == "folder itself" else tmp_path
    check(load_source(SOURCE, data_dir, download=False))
    check(load_source(SOURCE, data_dir))


def test_renamed_folder(tmp_path):
    check(load_source(SOURCE, unpacked(tmp_path / "renamed")))


def test_only_needed_files_are_unpacked(tmp_path):
    (tmp_path / "tiny.tar.gz").write_bytes(TARBALL)
    load_source(SOURCE, tmp_path)
    assert visible(tmp_path) == {"tiny.tar.gz", FOLDER}
    assert visible(tmp_path / FOLDER) == {"train", "test", "meta"}


def test_missing_data(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    message = refusal(FileNotFoundError, SOURCE, tmp_path / "new", download=False)
    for part in ("TINY is missing", f"{FOLDER}/", "tiny.tar.gz", str(tmp_path / "new"), SOURCE.archive.url):
        assert part in message
    assert not (tmp_path / "new").exists()
    assert "cannot be reached" in refusal(FileNotFoundError, SOURCE, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="CIFAR-10 is missing"):
        load_dataset("cifar10", tmp_path, download=False)


def test_data_dir_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "use another --data_dir" in refusal(OSError, SOURCE, tmp_path / "file")
    assert "use another --data_dir" in refusal(OSError, SOURCE, tmp_path / "file" / "below")


# Downloading


def test_download(tmp_path, server, capsys):
    check(load_source(server.source, tmp_path / "a" / "b"))
    assert visible(tmp_path / "a" / "b") == {"tiny.tar.gz", FOLDER}
    assert "TINY: 0 of 0 MB" in capsys.readouterr().err
    check(load_source(server.source, tmp_path / "a" / "b"))
    assert server.ranges == [None]


def test_interrupted_download_resumes(tmp_path, server):
    server.stop_after = 1000
    assert f"1000 of {len(TARBALL)} bytes arrived" in refusal(ConnectionError, server.source, tmp_path)
    assert (tmp_path / "tiny.tar.gz.part").read_bytes() == TARBALL[:1000]
    refusal(ConnectionError, server.source, tmp_path)
    server.stop_after = None
    check(load_source(server.source, tmp_path))
    assert server.ranges == [None, "bytes=1000-", "bytes=2000-"]
    assert (tmp_path / "tiny.tar.gz").read_bytes() == TARBALL


def test_server_without_ranges(tmp_path, server):
    (tmp_path / "tiny.tar.gz.part").write_bytes(TARBALL[:1000])
    server.supports_ranges = False
    check(load_source(server.source, tmp_path))
    assert (tmp_path / "tiny.tar.gz").read_bytes() == TARBALL


def test_complete_part_is_used(tmp_path, server):
    (tmp_path / "tiny.tar.gz.part").write_bytes(TARBALL)
    check(load_source(server.source, tmp_path))


def test_download_with_wrong_md5_is_deleted(tmp_path, server):
    server.content = TARBALL[:-1] + b"?"
    message = refusal(ValueError, server.source, tmp_path)
    assert server.source.archive.md5 in message
    assert visible(tmp_path) == set()
    server.content = TARBALL
    check(load_source(server.source, tmp_path))


def test_server_error(tmp_path, server):
    server.status = 503
    assert "the server answered 503" in refusal(FileNotFoundError, server.source, tmp_path)


def test_two_processes_download_once(tmp_path, server):
    server.answering.clear()
    (tmp_path / "source").write_bytes(pickle.dumps(server.source))
    code = (
        "import pickle, sys; from pathlib import Path; from effnet_fast.data.cifar import load_source; "
        "folder = Path(sys.argv[1]); source = pickle.loads((folder / 'source').read_bytes()); "
        "dataset = load_source(source, folder / 'data'); "
        "print(len(dataset.train))"
    )
    processes = []
    for i in range(2):
        with (tmp_path / f"stderr{i}").open("w") as errors:
            command = [sys.executable, "-u", "-c", code, str(tmp_path)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True))
    while not any("waiting for another process" in (tmp_path / f"stderr{i}").read_text() for i in range(2)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    server.answering.set()
    assert [process.communicate()[0] for process in processes] == ["40\n"] * 2
    assert server.ranges == [None]


# Truncated, modified and hostile archives


def test_truncated_archive(tmp_path):
    (tmp_path / "tiny.tar.gz").write_bytes(TARBALL[:-100])
    message = refusal(ValueError, SOURCE, tmp_path)
    assert "tiny.tar.gz is truncated or modified" in message
    assert "delete it" in message
    assert visible(tmp_path) == {"tiny.tar.gz"}


@pytest.mark.parametrize("content", [TARBALL[:-100], b"not a tar.gz", b""])
def test_unreadable_archive_leaves_nothing(tmp_path, content):
    (tmp_path / "tiny.tar.gz").write_bytes(content)
    assert "is not a readable tar.gz" in refusal(ValueError, source_of(content), tmp_path)
    assert visible(tmp_path) == {"tiny.tar.gz"}


@pytest.mark.parametrize("name", ["train", "test", "meta"])
@pytest.mark.parametrize("change", ["truncated", "modified", "missing"])
def test_damaged_unpacked_file(tmp_path, name, change):
    path = unpacked(tmp_path / FOLDER) / name
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"" if change == "truncated" else b"?"))
    message = refusal(OSError if change == "missing" else ValueError, SOURCE, tmp_path)
    assert str(path) in message
    assert f"delete {tmp_path / FOLDER} and run again" in message


def test_leftovers_of_a_killed_unpacking_are_removed(tmp_path):
    (tmp_path / "tiny.tar.gz").write_bytes(TARBALL)
    (tmp_path / f".{FOLDER}.part").mkdir()
    (tmp_path / f".{FOLDER}.part" / "train").write_bytes(b"half")
    check(load_source(SOURCE, tmp_path))
    assert visible(tmp_path) == {"tiny.tar.gz", FOLDER}


def link(kind: bytes, name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


@pytest.mark.parametrize(
    "member",
    [
        regular("../evil", b"x"),
        regular(f"{FOLDER}/../../evil", b"x"),
        regular("/tmp/evil", b"x"),
        regular("elsewhere/evil", b"x"),
        link(tarfile.SYMTYPE, f"{FOLDER}/train", "../evil"),
        link(tarfile.LNKTYPE, f"{FOLDER}/train", "../evil"),
        link(tarfile.SYMTYPE, FOLDER, ".."),
        link(tarfile.FIFOTYPE, f"{FOLDER}/train", ""),
    ],
    ids=lambda member: f"{member[0].type.decode()} {member[0].name}",
)
def test_archive_with_links_or_outside_paths(tmp_path, member):
    tarball = pack(member)
    data_dir = tmp_path / "inner"
    data_dir.mkdir()
    (tmp_path / "evil").write_bytes(b"untouched")
    (data_dir / "tiny.tar.gz").write_bytes(tarball)
    message = refusal(ValueError, source_of(tarball), data_dir)
    assert repr(member[0].name) in message
    assert visible(data_dir) == {"tiny.tar.gz"}
    assert visible(tmp_path) == {"inner", "evil"}
    assert (tmp_path / "evil").read_bytes() == b"untouched"


# A full disk


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_while_downloading(tmp_path, server):
    (tmp_path / "tiny.tar.gz.part").symlink_to("/dev/full")
    assert f"the disk of {tmp_path} is full" in refusal(OSError, server.source, tmp_path)
    assert visible(tmp_path) == {"tiny.tar.gz.part"}


def test_full_disk_while_unpacking(tmp_path, monkeypatch):
    (tmp_path / "tiny.tar.gz").write_bytes(TARBALL)

    def full(source, target):
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        assert f"the disk of {tmp_path} is full" in refusal(OSError, SOURCE, tmp_path)
    assert visible(tmp_path) == {"tiny.tar.gz"}
    check(load_source(SOURCE, tmp_path))


# Pickles


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_code_in_a_pickle_does_not_run(tmp_path):
    blob = pickle.dumps({b"data": Call(os.system, f"touch {tmp_path / 'ran'}")})
    with pytest.raises(ValueError, match=r"some/file is refused: it names \w+\.system"):
        unpickle(blob, Path("some/file"))
    assert not (tmp_path / "ran").exists()
    pickle.loads(blob)
    assert (tmp_path / "ran").exists()  # the pickle does run the code where it is allowed to


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Call(eval, "1"), "builtins.eval"),
        (Call(getattr, "x", "upper"), "builtins.getattr"),
        (Call(np.load, "x"), "numpy.load"),
        (Call(np.fromfile, "x"), "numpy.fromfile"),
        (os.path.join, "posixpath.join"),
        (dataclasses.replace, "dataclasses.replace"),
        (np.ndarray.tofile, "builtins.getattr"),
        (np.float64(1), "multiarray.scalar"),
        (np.array([None, "x"]), "'O8'"),
        (np.array([1.0]), "'f8'"),
        (np.array(["x"]), "'U1'"),
        (np.zeros(2, [("a", "u1")]), "'V1'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pickles_with_other_objects_are_refused(value, named):
    with pytest.raises(ValueError, match="some/file is refused") as caught:
        unpickle(pickle.dumps({b"data": value}, protocol=4), Path("some/file"))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cnumpy.core.multiarray\n_reconstruct\n(N}(S'__init__'\nNutb.",  # BUILD on what stands for the function
        b"cnumpy\nndarray\n(NNtb.",
        b"cnumpy\nndarray\nN\x81.",
        b"cnumpy\nndarray\n)\x81(K\x01(K\x09tcnumpy\ndtype\nS'u1'\n\x85R\x89S'ab'\ntb.",  # 2 bytes for 9
        b"cnumpy\nndarray\n)\x81(K\x01(J\xff\xff\xff\xffJ\xfe\xff\xff\xfftcnumpy\ndtype\nS'u1'\n\x85R\x89S'ab'\ntb.",
        b"cnumpy\nndarray\n)\x81(K\x01(K\x02tcnumpy\ndtype\nS'u1'\n\x85R\x89]tb.",  # a list for bytes
        b"ccopyreg\n_reconstructor\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0cdtype.__init__\x93.",
        b"Pmodule\n.",
        b"\x82\x01.",
        b"(lp0\n.",
        b"}K\x01K\x02s.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fxx.",
        b".",
        b"",
    ],
)
def test_crafted_pickles_are_refused(opcodes):
    with pytest.raises(ValueError, match="some/file is refused"):
        unpickle(opcodes, Path("some/file"))


def test_truncated_pickle():
    blob = batch(2, 0)
    for end in range(0, len(blob), 97):
        with pytest.raises(ValueError, match="some/file is refused"):
            unpickle(blob[:end], Path("some/file"))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_of_bytes(protocol, order):
    array = np.arange(24, dtype=np.uint8).reshape(4, 6).copy(order)
    loaded = unpickle(pickle.dumps({"data": array, b"n": [1, "x", b"y", {}]}, protocol=protocol), Path("f"))
    assert np.array_equal(loaded["data"].array(), array)
    assert loaded["n"] == [1, "x", b"y", {}]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("meta", {"coarse": []}, "contains no class names"),
        ("train", {"fine_labels": [0]}, "does not contain 1 images"),
        ("train", {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]}, "does not contain 1 images"),
        ("test", {"data": np.zeros((1, 3072), np.uint8), "fine_labels": [3]}, "no fine_labels from 0 to 2"),
        ("test", {"data": np.zeros((1, 3072), np.uint8), "fine_labels": ["x"]}, "no fine_labels from 0 to 2"),
    ],
)
def test_files_with_other_contents_are_refused(tmp_path, file, content, message):
    blob = pickle.dumps(content, protocol=4)
    (unpacked(tmp_path / FOLDER) / file).write_bytes(blob)
    archive = dataclasses.replace(SOURCE.archive, files={**SOURCE.archive.files, file: hashlib.md5(blob).hexdigest()})
    assert message in refusal(ValueError, dataclasses.replace(SOURCE, archive=archive), tmp_path)


# The real data


def test_cifar100_as_published(cifar100_dir):
    dataset = load_cifar("cifar100", cifar100_dir, download=False)
    assert dataset.superclasses is not None
    names, of_class = dataset.superclasses
    assert np.bincount(of_class).tolist() == [5] * 20
    trees = {name for name, i in zip(dataset.classes, of_class, strict=True) if names[i] == "trees"}
    assert trees == {"maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"}
    assert dataset.train.images.shape == (50000, 32, 32, 3)
    assert dataset.test.images.shape == (10000, 32, 32, 3)
    assert np.bincount(dataset.train.labels).tolist() == [500] * 100
    assert np.bincount(dataset.test.labels).tolist() == [100] * 100
    assert dataset.classes == tuple(sorted(dataset.classes))
    mean, std = channel_statistics(dataset.train.images)
    assert dataset.mean == pytest.approx(mean, abs=5e-5)
    assert dataset.std == pytest.approx(std, abs=1e-4)
    # The first test image, a mountain, as stored in the file: red rows first.
    content = (cifar100_dir / "cifar-100-python" / "test").read_bytes()
    pixels = dataset.test.images[0].transpose(2, 0, 1).tobytes()
    assert content.count(pixels) == 1
    assert dataset.classes[dataset.test.labels[0]] == "mountain"


def test_cifar10_layout(tmp_path):
    rng = np.random.default_rng(0)
    files = {
        name: {b"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": [0, 9, 2, 1]}
        for name in CIFAR10.archive.files
    } | {"batches.meta": {b"label_names": [f"{i}".encode() for i in range(10)]}}
    folder = tmp_path / CIFAR10.archive.folder
    folder.mkdir()
    md5s = {}
    for name, content in files.items():
        blob = pickle.dumps(content, protocol=4)
        (folder / name).write_bytes(blob)
        md5s[name] = hashlib.md5(blob).hexdigest()
    tiny10 = dataclasses.replace(CIFAR10, archive=dataclasses.replace(CIFAR10.archive, files=md5s))
    dataset = load_source(tiny10, tmp_path)
    assert dataset.train.labels.tolist() == [0, 9, 2, 1] * 5
    fifth = dataset.train.images[16:].transpose(0, 3, 1, 2).reshape(4, 3072)
    assert np.array_equal(fifth, files["data_batch_5"][b"data"])


@pytest.mark.parametrize(
    ("name", "result", "top1"),
    [("cifar100-cpu-long", "test-evaluation.json", "top1"), ("cifar100-h200", "metrics.jsonl", "ema_top1")],
)
def test_the_kept_weights_classify_the_test_images(cifar100_dir, name, result, top1):
    """The first 500 of 10,000 images agree with the result that is kept with the weights, within its sampling error."""
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / name
    text = (folder / result).read_text()
    expected = json.loads(text.splitlines()[-1] if result.endswith("l") else text)[top1]
    classifier = effnet_fast.load(folder / "model.safetensors", device="cpu")
    test = load_cifar("cifar100", cifar100_dir, download=False).test
    best = classifier.predict([Image.fromarray(pixels) for pixels in test.images[:500]], top=1)
    hits = [p.label == classifier.classes[label] for (p,), label in zip(best, test.labels[:500], strict=True)]
    assert 100 * np.mean(hits) == pytest.approx(expected, abs=8)
