"""Random bytes give readers a valid result, or a ValueError or OSError in one line; no code runs."""

import io
import pickle
import tarfile
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from effnet_fast import checkpoint, cli
from effnet_fast.config import TrainConfig
from effnet_fast.data.archive import Archive, _extract
from effnet_fast.data.cifar import unpickle
from effnet_fast.data.decode import read_image
from effnet_fast.model.trained import from_checkpoint
from effnet_fast.run.restore import config_of

EXPLODED = []


def explode(*_):
    EXPLODED.append(True)


class Bomb:
    def __reduce__(self):
        return explode, ()


@pytest.fixture(autouse=True)
def nothing_explodes():
    yield
    assert not EXPLODED


fuzzed = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def one_line(load, *arguments):
    """The result, or None if it is refused in one line."""
    try:
        return load(*arguments)
    except (ValueError, OSError) as error:
        reason = str(error)
    assert reason.strip()
    assert "\n" not in reason
    return None


def zipped(records):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return content.getvalue()


PICKLES = [
    pickle.dumps(value, protocol) for value in (Bomb(), {"format": 1, "model": Bomb()}) for protocol in (0, 2, 4)
]
# Pickles put together from opcodes and names that matter to one, and any bytes.
OPCODES = st.sampled_from(
    b"cos\nsystem\n|cbuiltins\neval\n|ctorch._utils\n_rebuild_tensor_v2\n|X\x06\x00\x00\x00format|K\x01|q\x00|h\x00|"
    b"\x80\x02|\x81|(|)|}|]|R|b|s|t|Q|N|0|.".split(b"|")
)
PICKLED = st.one_of(
    st.sampled_from(PICKLES),
    st.binary(max_size=300),
    st.lists(OPCODES, max_size=20).map(b"".join).map(lambda p: p + b"."),
)


@fuzzed
@given(data=st.one_of(st.binary(max_size=2000), PICKLED))
def test_checkpoint_of_random_bytes(tmp_path, data):
    path = tmp_path / "last.pt"
    path.write_bytes(data)
    assert one_line(checkpoint.load, path) is None


@fuzzed
@given(pickled=PICKLED, storage=st.binary(max_size=100))
def test_checkpoint_of_random_records(tmp_path, pickled, storage):
    path = tmp_path / "last.pt"
    path.write_bytes(
        zipped({"a/data.pkl": pickled, "a/data/0": storage, "a/version": b"3\n", "a/byteorder": b"little"})
    )
    one_line(checkpoint.load, path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PARTS = st.sampled_from(["model", "ema", "config", "architecture", "classes", "mean", "std", "fingerprint", "progress"])


@fuzzed
@given(state=st.dictionaries(PARTS, VALUES))
@example(state={})
@example(state={"config": {"num_epochs": "many"}})
@example(state={"architecture": {"width": -1}, "model": {}, "ema": None})
def test_checkpoint_of_random_content(tmp_path, state):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state)
    one_line(checkpoint.Checkpoint.read, path, True)
    saved = one_line(checkpoint.Checkpoint.read, path)
    if saved is not None:
        one_line(config_of, saved)
        one_line(from_checkpoint, saved, "auto", torch.device("cpu"))


@fuzzed
@given(data=PICKLED)
def test_random_pickle(data):
    one_line(unpickle, data, Path("train"))


MEMBER = st.tuples(
    st.sampled_from(["images/train", "images", "../train", "/etc/train", "images/../../train", "images/a/train"]),
    st.sampled_from(
        [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    ),
    st.binary(max_size=50),
)


@fuzzed
@given(members=st.lists(MEMBER, max_size=4), cut=st.integers(0, 400), flip=st.integers(0, 8 * 400))
def test_random_tar_writes_nothing_outside(tmp_path_factory, members, cut, flip):
    folder = tmp_path_factory.mktemp("tar")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(member, io.BytesIO(data))
    damaged = bytearray(content.getvalue())
    if flip // 8 < len(damaged):
        damaged[flip // 8] ^= 1 << flip % 8
    tarball, target = folder / "images.tar.gz", folder / "inside" / "images"
    tarball.write_bytes(damaged[: len(damaged) - cut] if cut < len(damaged) else damaged)
    target.mkdir(parents=True)
    archive = Archive("Images", "http://127.0.0.1:9/images.tar.gz", "", "images", {"train": ""})
    one_line(_extract, archive, tarball, target)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert found <= {"images.tar.gz", "inside", "inside/images", "inside/images/train"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))


@fuzzed
@given(
    data=st.binary(max_size=500),
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM"]),
)
def test_image_of_random_bytes(tmp_path, data, head):
    path = tmp_path / "image.png"
    path.write_bytes(head + data)
    one_line(read_image, path, 8)


NAMES = st.sampled_from([field.name for field in fields(TrainConfig)] + ["model.width", "__class__", "config"])


@settings(fuzzed, max_examples=60)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.binary(max_size=60),
        st.dictionaries(NAMES, VALUES, max_size=3).map(str),
        st.sampled_from(
            ["!!python/object/apply:os.system [true]", "&a [*a, *a]", "a: &a {b: *a}", "x: !!python/name:os.system"]
        ),
    )
)
@example(text="{'config':{}}")
@example(text="config: recipe.yaml")
def test_settings_of_random_text(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="replace"))
    one_line(cli.parse, cli.VERBS["train"], "train", ["--config", str(path)])
