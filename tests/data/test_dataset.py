"""Holding out and limiting: stratified, seeded; impossible counts are refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_fast.data import ArraySplit, Dataset, FileSplit, load_dataset
from effnet_fast.data.dataset import ImageFile, balanced_weights, channel_statistics, hold_out, limit, stratified
from effnet_fast.data.sheet import sample_sheet, summarize


def tiny(labels, classes=3, **fields):
    labels = np.asarray(labels, np.int64)
    rng = np.random.default_rng(0)
    split = ArraySplit(rng.integers(0, 256, (len(labels), 4, 4, 3), dtype=np.uint8), labels)
    values = {
        "name": "tiny",
        "classes": tuple(f"class {i}" for i in range(classes)),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "train": split,
        "test": split,
        "native_size": 4,
        "fingerprint": "0" * 64,
    }
    return Dataset(**(values | fields))


@given(st.lists(st.integers(0, 6), max_size=80), st.floats(0, 1), st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_stratified_rounds_the_share_of_each_class(labels, share, seed):
    labels = np.array(labels, np.int64)
    count = int(share * len(labels))
    chosen = stratified(labels, count, seed)
    assert chosen.dtype == np.int64
    assert len(chosen) == count
    assert np.all(np.diff(chosen) > 0)
    for label in np.unique(labels):
        exact = (labels == label).sum() * count / len(labels)
        assert np.floor(exact) <= (labels[chosen] == label).sum() <= np.ceil(exact)


def test_stratified_depends_on_the_seed():
    labels = np.arange(1000) % 10
    assert np.array_equal(stratified(labels, 100, 7), stratified(labels, 100, 7))
    assert not np.array_equal(stratified(labels, 100, 7), stratified(labels, 100, 8))
    # With fewer images than classes, the seed selects the classes.
    assert len({int(label) for seed in range(20) for label in labels[stratified(labels, 3, seed)]}) > 5


def test_a_larger_subset_contains_the_smaller():
    labels = np.arange(1000) % 10
    assert set(stratified(labels, 100, 3)) < set(stratified(labels, 200, 3))


@pytest.mark.parametrize("count", [-1, 5])
def test_stratified_refuses_impossible_counts(count):
    with pytest.raises(ValueError, match=f"{count} of 4"):
        stratified(np.zeros(4, np.int64), count, 0)


@pytest.mark.parametrize("count", [0, 31])
def test_limit_refuses_impossible_counts(count):
    with pytest.raises(ValueError, match=f"--limit_eval {count} does not fit a split of 30 images: use 1 to 30"):
        limit(tiny(np.arange(30) % 3).train, count, 0, "--limit_eval")


def test_limit_keeps_images_and_labels_together():
    files = tuple(ImageFile(Path(f"{i % 3}/{i}.png"), 1 + i % 8) for i in range(30))
    split = limit(FileSplit(files, np.arange(30) % 3), 9, 0, "--limit_eval")
    assert len(split) == 9
    assert [int(path.parent.name) for path in split.paths] == split.labels.tolist()
    assert all(file.orientation == 1 + int(file.path.stem) % 8 for file in split.files)


def test_balanced_weights():
    """n / (k n_c), as scikit-learn's class_weight="balanced"; their mean over images is 1."""
    labels = np.array([0] * 6 + [1] * 1 + [2] * 2)
    weights = balanced_weights(labels, ("cat", "dog", "horse"))
    assert weights == (9 / (3 * 6), 9 / (3 * 1), 9 / (3 * 2))
    assert np.mean(np.array(weights)[labels]) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"class fox has no training image"):
        balanced_weights(labels, ("cat", "dog", "horse", "fox"))


def test_hold_out_partitions_the_training_images():
    dataset = tiny(np.arange(60) % 3)
    held = hold_out(dataset, 0.2, seed=1)
    assert np.bincount(held.val.labels).tolist() == [4, 4, 4]
    both = np.concatenate([held.train.images, held.val.images]).reshape(60, -1)
    assert np.array_equal(np.unique(both, axis=0), np.unique(dataset.train.images.reshape(60, -1), axis=0))
    assert held.test is dataset.test
    assert held.fingerprint == dataset.fingerprint
    again = hold_out(dataset, 0.2, seed=1)
    assert np.array_equal(again.val.images, held.val.images)
    assert not np.array_equal(hold_out(dataset, 0.2, seed=2).val.images, held.val.images)


@pytest.mark.parametrize(
    ("fraction", "message"),
    [(0.001, "is no image"), (0.9, "leaves class class 0 no training image"), (3.0, "leaves class")],
)
def test_hold_out_refuses_impossible_fractions(fraction, message):
    with pytest.raises(ValueError, match=message):
        hold_out(tiny([0, 1, 1, 1, 1, 2, 2, 2, 2]), fraction, 0)


def test_hold_out_refuses_a_second_validation_split():
    dataset = tiny([0, 1, 2], val=tiny([0]).train)
    with pytest.raises(ValueError, match="its own validation split"):
        hold_out(dataset, 0.5, 0)


def test_channel_statistics():
    images = tiny(np.zeros(50)).train.images
    mean, std = channel_statistics(images)
    assert mean == pytest.approx((images / 255).mean((0, 1, 2)))
    assert std == pytest.approx((images / 255).std((0, 1, 2)))
    assert min(channel_statistics(np.full((1, 2, 2, 3), 9, np.uint8))[1]) > 0


def test_load_dataset_holds_out_then_limits():
    dataset = load_dataset("synthetic", "nowhere", seed=3, val_fraction=0.1, limit_train=500, limit_eval=200)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [500, 200, 200]
    assert all(np.ptp(np.bincount(split.labels)) == 0 for split in (dataset.train, dataset.val, dataset.test))
    whole = load_dataset("synthetic", "nowhere", seed=4)
    assert whole.fingerprint == dataset.fingerprint
    assert whole.val is None


def test_load_dataset_refuses_impossible_limits():
    with pytest.raises(ValueError, match="--limit_train 20000 does not fit a split of 10000 images"):
        load_dataset("synthetic", "nowhere", limit_train=20000)
    with pytest.raises(ValueError, match="unknown data set 'mnist'"):
        load_dataset("mnist", "nowhere")


def test_data_sets_load_without_torch_and_dali():
    check = (
        "import sys, effnet_fast.data, effnet_fast.data.cifar, effnet_fast.data.folder, effnet_fast.data.synthetic, "
    )
    check += "effnet_fast.data.sheet; assert not {'torch', 'nvidia.dali'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_sample_sheet(tmp_path):
    from PIL import Image

    dataset = tiny([2, 0, 1, 0])
    sample_sheet(dataset, tmp_path / "new" / "sheet.png", rows=4, columns=2)
    sheet = np.array(Image.open(tmp_path / "new" / "sheet.png"))
    assert sheet.shape == (2 * 116 + 4, 2 * 100 + 4, 3)
    assert np.array_equal(sheet[4 + 12 : 100 : 24, 4 + 12 : 100 : 24], dataset.train.images[1])
    assert np.array_equal(sheet[4 + 12 : 100 : 24, 104 + 12 : 200 : 24], dataset.train.images[2])


def test_summarize():
    text = summarize(hold_out(tiny([0] * 10 + [1] * 10 + [2] * 20), 0.1, 0))
    assert "train        36 images, 4 x 4 px, 9 to 18 of each class" in text
    assert "val          4 images" in text
    assert "3 classes: class 0, class 1, class 2" in text
    assert "0.5000 0.5000 0.5000" in text
