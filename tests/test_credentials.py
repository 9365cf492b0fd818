"""Passwords in URLs reach no file, message or log."""

import subprocess
import sys
from pathlib import Path

import pytest

from command_line import run
from effnet_fast import provenance
from effnet_fast.credentials import mask_credentials

LAUNCH = Path(__file__).parents[1] / "launchers" / "launch.sh"
URLS = {
    "postgresql://me:s3cret@host/name": "postgresql://me:***@host/name",
    "postgresql+psycopg://me:s3cret@host:5432/name": "postgresql+psycopg://me:***@host:5432/name",
    "redis://:s3cret@host": "redis://:***@host",
    "mysql://me:s3cret/with@signs and: spaces@host/name": "mysql://me:***@host/name",
    "postgresql://host/name?user=me&password=s3cret&sslmode=require": (
        "postgresql://host/name?user=me&password=***&sslmode=require"
    ),
    "https://s3cret@host/repository": "https://***@host/repository",
    "https://host/path?api_key=s3cret": "https://host/path?api_key=***",
    "mysql://host/name?Password=s3cret": "mysql://host/name?Password=***",
}


@pytest.mark.parametrize(("url", "masked"), URLS.items())
def test_mask(url, masked):
    assert mask_credentials(url) == masked
    assert mask_credentials(f"--storage {url}") == f"--storage {masked}"


@pytest.mark.parametrize(
    "text",
    ["postgresql://me@host/name", "sqlite:///search.db", "sqlite:////home/me@site/search.db", "me@site: 1:2", "C:/a@b"],
)
def test_text_without_a_password_is_unchanged(text):
    assert mask_credentials(text) == text


@pytest.mark.parametrize("url", URLS)
def test_environment_has_no_password(monkeypatch, url):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "effnet_fast", "search", "--storage", url, f"--x={url}"])
    command = provenance.environment()["command"]
    assert "s3cret" not in command
    assert "***" in command


@pytest.mark.parametrize("flags", ["--storage", "--storge", "--seeds 0 --storage"])
def test_error_has_no_password(tmp_path, capsys, flags):
    grid = "--alpha 1.2 --beta 1.1 --gamma 1.15 --output_stride 32 --image_size 16"
    run(f"search --dataset synthetic {grid} --save_dir {tmp_path} {flags} postgresql://me:s3cret@nowhere.invalid/x", 2)
    assert "s3cret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(("url", "masked"), URLS.items())
def test_launcher_prints_no_password(url, masked):
    script = f'source "{LAUNCH}" --dry-run; launch effnet-fast search --storage "$1"'
    shown = subprocess.run(["bash", "-c", script, "bash", url], capture_output=True, text=True, check=True).stdout
    assert "s3cret" not in shown
    assert shown.replace("\\", "").strip().endswith(masked)


def test_search_leaves_no_password_in_its_files(tmp_path, monkeypatch, capfd):
    line = (
        "search --dataset synthetic --output_stride 32 --limit_train 32 --limit_eval 20 --batch_size 16 "
        "--image_size 16 --search_epochs 1 --alpha 1.2 --beta 1.1 --gamma 1.15 --phi 1 --max_flops 5e7 "
        f"--loader resident --num_workers 1 --device cpu --save_dir {tmp_path} --run_name masked "
        f"--storage sqlite:///{tmp_path}/search.db?password=s3cret"
    )
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "effnet_fast", *line.split()])
    run(line)
    files = [path for path in (tmp_path / "masked").rglob("*") if path.is_file()]
    assert {"plan.json", "candidates.json", "environment.json", "log.txt", "config.yaml"} <= {p.name for p in files}
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []
    assert "***" in (tmp_path / "masked" / "plan.json").read_text()
    assert "s3cret" not in "".join(capfd.readouterr())
