"""The one lister of images."""

import pytest

from effnet_fast.data.listing import SUFFIXES, list_images


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(folder):
    images, others = list_images(folder)
    return [[path.relative_to(folder).as_posix() for path in paths] for paths in (images, others)]


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_suffixes_in_upper_and_lower_case(tmp_path, suffix):
    touch(tmp_path, f"a{suffix}", f"b{suffix.upper()}", f"c{suffix}.txt", "d")
    assert names(tmp_path) == [[f"a{suffix}", f"b{suffix.upper()}"], [f"c{suffix}.txt", "d"]]


def test_nested_folders_are_sorted(tmp_path):
    touch(tmp_path, "b/2.png", "b/a/1.png", "a.png", "c/d/e/3.jpg", "c/notes.txt")
    assert names(tmp_path) == [["a.png", "b/2.png", "b/a/1.png", "c/d/e/3.jpg"], ["c/notes.txt"]]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    touch(tmp_path, "1.png", "._1.png", ".ipynb_checkpoints/1.png", ".thumbnails/deep/1.png", "a/.hidden.jpg")
    assert names(tmp_path) == [["1.png"], []]


def test_a_hidden_folder_that_is_named_is_listed(tmp_path):
    touch(tmp_path, ".cache/1.png")
    assert names(tmp_path / ".cache") == [["1.png"], []]


def test_links_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/deep/1.png", "elsewhere/2.jpg")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "file.png").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (folder / "broken.png").symlink_to("nowhere")
    assert names(folder) == [["broken.png", "file.png", "linked/2.jpg", "linked/deep/1.png"], []]


def test_two_links_to_one_folder_are_both_followed(tmp_path):
    touch(tmp_path, "elsewhere/1.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "ab":
        (folder / name).symlink_to(tmp_path / "elsewhere")
    assert names(folder) == [["a/1.png", "b/1.png"], []]


def test_a_link_to_a_parent_is_not_followed(tmp_path):
    touch(tmp_path, "a/1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(".")
    assert names(tmp_path) == [["a/1.png"], []]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_images(tmp_path / "none")
