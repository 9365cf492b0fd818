"""Weights from the Hugging Face Hub, here a server on the loopback interface."""

from __future__ import annotations

import hashlib
import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import yaml
from safetensors.torch import save

from command_line import mistake, run
from effnet_fast import checkpoint, create_model, list_models
from effnet_fast.model.weights import hub
from plain_networks import golden, random_state

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
NAME = "someone/efficientnet_b0.mine"
TINY = (
    "train --dataset synthetic --limit_train 16 --limit_eval 8 --batch_size 8 --num_epochs 1 --output_stride 32 "
    "--loader resident --num_workers 1 --device cpu"
)


class Server(http.server.ThreadingHTTPServer):
    """Repositories: `files[name, commit, file]` is a content, `newest[name]` the commit of `main`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.newest: dict[str, str] = {}
        self.requests: list[str] = []

    def handle_error(self, *_: object) -> None:
        """Ignore clients that close a connection early."""

    def publish(self, name: str, commit: str, fill: float) -> None:
        """Put timm's EfficientNet-B0 into a repository, with `fill` in the first layer."""
        state = random_state(golden("timm_efficientnet_b0"))
        state["conv_stem.weight"].fill_(fill)
        settings = {"architecture": "efficientnet_b0", "pretrained_cfg": {"mean": [fill] * 3, "std": [0.5] * 3}}
        self.files[name, commit, "model.safetensors"] = save(state)
        self.files[name, commit, "config.json"] = json.dumps(settings).encode()
        self.newest[name] = commit


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        owner, name, _, revision, file = self.path.strip("/").split("/")
        repository = f"{owner}/{name}"
        self.server.requests.append(self.path)
        commit = self.server.newest.get(repository, "") if revision == "main" else revision
        content = self.server.files.get((repository, commit, file))
        commits = {known for other, known, _ in self.server.files if other == repository}
        if content is None:
            self.send_response(404)
            missing = "RepoNotFound" if not commits else "EntryNotFound" if commit in commits else "RevisionNotFound"
            self.send_header("X-Error-Code", missing)
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        return content or b""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    server.publish(NAME, OLD, fill=0.25)
    server.files["someone/pickled", OLD, "pytorch_model.bin"] = b""
    server.newest["someone/pickled"] = OLD
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def connect(monkeypatch, server, tmp_path) -> Iterator[Callable[..., None]]:
    """Set huggingface_hub's variables, which it reads when it is imported, and an empty cache."""

    def forget() -> None:
        for module in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[module]

    def connect(**variables: str) -> None:
        forget()
        places = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        for name, value in (places | quiet | variables).items():
            monkeypatch.setenv(name, value)

    connect()
    yield connect
    forget()


def test_weights_and_normalisation_of_a_repository(connect, server, capsys):
    weights = hub.find_weights(f"hf-hub:{NAME}", "efficientnet-b0")
    assert weights.source == f"hf-hub:{NAME}@{OLD}"
    assert weights.mean == (0.25,) * 3
    model = create_model("efficientnet-b0", 10, 32, pretrained=f"hf-hub:{NAME}@{OLD}")
    assert model.stem.conv.weight.unique().tolist() == [0.25]
    assert f"hf-hub:{NAME}@{OLD}: timm's names; symmetric padding" in capsys.readouterr().err
    asked = len(server.requests)
    connect(HF_HUB_OFFLINE="1")
    assert hub.find_weights(f"hf-hub:{NAME}", "efficientnet-b0").revision == OLD
    assert len(server.requests) == asked


def test_downloaded_folder(connect, server, tmp_path):
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).write_bytes(server.files[NAME, OLD, file])
    weights = hub.find_weights(tmp_path, "efficientnet-b0")
    assert (weights.mean, weights.revision) == ((0.25,) * 3, None)


def test_true_is_timms_default(connect, server):
    source = hub.Repository.parse(hub.DEFAULTS["efficientnet-b0"])
    server.publish(source.name, source.revision, fill=0.5)
    weights = hub.find_weights(True, "efficientnet-b0")
    assert weights.source == f"hf-hub:{source.name}@{source.revision}"
    assert hub.find_weights(f"hf-hub:{source.name}", "efficientnet-b0").revision == source.revision
    assert hub.DEFAULTS.keys() == set(list_models())


def test_a_run_keeps_its_commit(connect, server, tmp_path, capsys):
    name = "someone/efficientnet_b0.moving"
    server.publish(name, OLD, fill=0.25)
    line = f"{TINY} --pretrained hf-hub:{name} --save_dir {tmp_path} --run_name first"
    run(f"{line} --time_budget 0.001")
    server.publish(name, NEW, fill=0.75)
    run(line)
    assert "resuming" in capsys.readouterr().out
    settings = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert (settings["pretrained"], settings["pretrained_revision"]) == (f"hf-hub:{name}", OLD)
    run(f"train --config {tmp_path}/first/config.yaml --run_name again --learning_rate 0 --freeze backbone")
    again = checkpoint.load(tmp_path / "again" / "last.pt")
    assert again["mean"] == [0.25] * 3
    assert torch.all(again["model"]["stem.conv.weight"] == 0.25)
    other = f"train --config {tmp_path}/first/config.yaml --run_name other --pretrained hf-hub:{name}@{NEW}"
    run(f"{other} --time_budget 0.001")  # the command line's weights, at their own commit
    assert checkpoint.load(tmp_path / "other" / "last.pt")["mean"] == [0.75] * 3
    run(f"{other} --pretrained_revision {OLD} --run_name third --time_budget 0.001")
    assert checkpoint.load(tmp_path / "third" / "last.pt")["mean"] == [0.25] * 3
    run(f"{line} --resume no --time_budget 0.001")
    assert checkpoint.load(tmp_path / "first" / "last.pt")["mean"] == [0.75] * 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "someone/pickled",
            "hf-hub:someone/pickled has no model.safetensors, and files of other formats could",
        ),
        ("someone/nothing", "hf-hub:someone/nothing does not exist, or is private: check the name"),
        (f"{NAME}@v9", f"hf-hub:{NAME}@v9: the repository has no revision v9"),
        ("a/b/c", "hf-hub:a/b/c is no name of a repository: write hf-hub:OWNER/NAME"),
    ],
)
def test_mistakes_are_one_line(connect, tmp_path, capsys, source, words):
    assert words in mistake(capsys, f"{TINY} --pretrained hf-hub:{source} --save_dir {tmp_path}")


def test_without_network_or_package(connect, monkeypatch, tmp_path, capsys):
    connect(HF_HUB_OFFLINE="1")
    run(f"{TINY} --pretrained --save_dir {tmp_path}", expected=2)
    printed = capsys.readouterr().err
    assert "hf-hub:timm/efficientnet_b0.ra_in1k@1b5383e" in printed
    assert "is not in the cache, and the Hugging Face Hub cannot be reached" in printed
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    run(f"{TINY} --pretrained --save_dir {tmp_path}", expected=2)
    assert "needs huggingface_hub: pip install 'effnet-fast[hub]'" in capsys.readouterr().err
