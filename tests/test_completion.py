"""Scripts that complete commands in a shell."""

import shutil
import subprocess

import pytest

from command_line import run

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_effnet_fast
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        with pytest.MonkeyPatch.context() as patch, (folder / shell).open("w") as file:
            patch.setattr("sys.stdout", file)
            run(f"--print_completion {shell}")
    return folder


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_accepts_the_script(scripts, shell):
    text = (scripts / shell).read_text()
    assert "num_epochs" in text
    assert "Passes over the training images" in text or shell == "bash"
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    checked = subprocess.run([shell, "-n", scripts / shell], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["tra"], ["train"]),
        (["train", "--num_ep"], ["--num_epochs"]),
        (["train", "--optimizer", "ada"], ["adamw"]),
        (["eval", "--checkpoint", "ba"], ["bash"]),  # a file here
        (["predict", "fi"], ["fish"]),
    ],
    ids=" ".join,
)
def test_completing_in_bash(scripts, typed, completed):
    command = ["bash", "--norc", "-c", COMPLETE, "bash", scripts / "bash", "effnet-fast", *typed]
    printed = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True).stdout
    assert printed.split() == completed


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(
    ("typed", "completed"), [("tra", "train"), ("train --num_ep", "--num_epochs"), ("train --optimizer ada", "adamw")]
)
def test_completing_in_fish(scripts, typed, completed):
    command = ["fish", "--no-config", "-c", 'source $argv[1]; complete -C "$argv[2]"']
    printed = subprocess.run([*command, scripts / "fish", f"effnet-fast {typed}"], capture_output=True, text=True)
    assert [line.split("\t")[0] for line in printed.stdout.splitlines() if line] == [completed]


@pytest.mark.parametrize("line", ["--print_completion", "--print_completion ksh", "--print_completion=ksh"])
def test_unknown_shell(line, capsys):
    run(line, expected=2)
    assert "use one of bash, zsh" in capsys.readouterr().err
