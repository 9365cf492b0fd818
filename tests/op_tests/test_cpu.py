"""Compares the C++ ops with the float64 references; threads, evaluation, autocast, torch.compile, ranks, builds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import CASES, OPS, TOLERANCE, Case, compare, make_inputs, relative_rms, run
from test_block import (
    BLOCKS,
    NORMS,
    block_step,
    check_dropped_samples,
    check_one_norm_evaluates,
    check_recomputation,
    compare_block,
    opcheck_block,
)
from test_model import assert_as_good, check_zeroed_block, images, narrow, step

from command_line import run as run_cli
from effnet_fast import checkpoint
from effnet_fast.model.blocks import MBConv, Style
from effnet_kernels import launch
from effnet_kernels.cpu import build
from effnet_kernels.depthwise_conv import depthwise_conv, depthwise_conv_reference
from effnet_kernels.gate_mlp import SqueezeExcite
from effnet_kernels.se_gate import se_gate
from effnet_kernels.statistics import BatchNorm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the ops' tests run on the GPU here")

NAMES = [name for name in OPS if name != "silu"]
CASE = Case(2, 24, 7, 5, 3, 1)


@pytest.fixture(autouse=True)
def cpp(monkeypatch):
    """Run CPU tensors on the C++ ops instead of Triton's interpreter."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    if build.library() is None:
        assert shutil.which(os.environ.get("CXX", "c++")) is None, "the C++ ops do not compile"
        pytest.skip("there is no C++ compiler")


def has_two_values(op, case):
    """False if the op starts with a BatchNorm over one value per channel, which training refuses."""
    one = op.shapes(case)[:1] == op.shapes(case)[1:2] and case.n * case.h * case.w < 2
    return not one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", NAMES)
def test_against_float64(name, case, dtype):
    if has_two_values(OPS[name], case):
        compare(OPS[name], case, dtype, "cpp")


@pytest.mark.parametrize("settings", BLOCKS, ids=str)
def test_block_against_float64(settings):
    compare_block(settings, "cpp")


@pytest.mark.parametrize("norm", NORMS)
def test_one_norm_of_a_block_evaluates(norm):
    check_one_norm_evaluates("cpp", norm)


def test_the_whole_block_takes_float32_only():
    block = MBConv(8, 8, 3, 1, 4, style=Style(kernels="cpp"))
    with pytest.raises(ValueError, match=r"the C\+\+ block takes float32, not torch\.bfloat16"):
        block._whole_block(torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16), None)


def test_block_drops_the_same_samples():
    check_dropped_samples("cpp")


def test_a_block_that_starts_as_its_shortcut():
    check_zeroed_block("cpp")


@pytest.mark.parametrize("settings", BLOCKS, ids=str)
def test_block_has_the_same_bits_with_two_threads(settings):
    one, two = (block_step(settings, "cpp", threads=threads) for threads in (1, 2))
    for name, value in one.items():
        assert torch.equal(two[name], value), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_with_two_threads_and_other_layouts(name, dtype):
    op, inputs = OPS[name], make_inputs(OPS[name], Case(20, 100, 9, 8, 5, 2), dtype)
    wide = torch.zeros(20, 100, 9, 16, dtype=dtype)[..., ::2].copy_(inputs.x)
    results = []
    before = torch.get_num_threads()
    for threads, x in ((1, inputs.x), (2, inputs.x), (2, inputs.x.contiguous()), (2, wide)):
        torch.set_num_threads(threads)
        again = inputs.fresh()
        again.x = x.detach()
        results.append(run(op, Case(20, 100, 9, 8, 5, 2), again, "cpp")[0])
    torch.set_num_threads(before)
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("name", ["bn_silu", "bn_residual", "bn_silu_squeeze", "se_gate", "mbconv"])
def test_mean_of_1000_standard_deviations(name):
    inputs = make_inputs(OPS[name], CASE, torch.float32, mean=1000.0)
    got, dy = run(OPS[name], CASE, inputs.fresh(), "cpp")
    baseline, _ = run(OPS[name], CASE, inputs.fresh(), "torch", dy)
    want, _ = run(OPS[name], CASE, inputs.double(), "torch", dy)
    for key, value in want.items():
        error = relative_rms(got[key], value)
        assert error <= max(1e-3 if key != "dx" else 0.0, 2 * relative_rms(baseline[key], value)), (key, error)


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_gives_nan_out(name):
    inputs = make_inputs(OPS[name], CASE, torch.float32)
    inputs.x[1, 3, 2, 2] = float("nan")
    got, _ = run(OPS[name], CASE, inputs, "cpp")
    assert got["y"].select(1, 3).isnan().any()
    assert (got["dparameter0"][3] if name == "depthwise_conv" else got["dx"].select(1, 3)).isnan().any()


@pytest.mark.parametrize("value", [-1e4, -200.0, -88.0, -20.0, 0.0, 20.0, 200.0, 1e4])
def test_swish_of_large_values(value):
    """BatchNorm in evaluation with mean 0, rstd 1, gamma 1 and beta 0, so that only Swish remains."""
    bn = (torch.tensor([[0.0], [1.0], [1.0], [1.0]]).expand(4, 16).contiguous(), torch.ones(16), torch.zeros(16))
    x = torch.full((1, 16, 2, 2), value).contiguous(memory_format=torch.channels_last)
    y = build.library().normalize(x, *bn, None, None, True)
    torch.testing.assert_close(y, torch.nn.functional.silu(x), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("op", [OPS[name] for name in NAMES if OPS[name].norms], ids=lambda op: op.name)
def test_one_value_per_channel_is_refused(op):
    case = Case(1, 24, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        run(op, case, make_inputs(op, case, torch.float32), "cpp")


@pytest.mark.parametrize("expand", [1, 6])
def test_block_refuses_one_value_per_channel(expand):
    block = MBConv(8, 8, 3, 1, expand, style=Style(kernels="cpp"))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 8, 1, 1))


def test_low_precision_parameters():
    inputs = make_inputs(OPS["mbconv"], CASE, torch.bfloat16)
    inputs.parameters = [p.bfloat16() for p in inputs.parameters]
    got, dy = run(OPS["mbconv"], CASE, inputs.fresh(), "cpp")
    want, _ = run(OPS["mbconv"], CASE, inputs.double(), "torch", dy)
    for key, value in want.items():
        assert relative_rms(got[key], value) <= 4 * TOLERANCE[torch.bfloat16], key


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_a_step_of_a_narrow_model(padding):
    models = [narrow(kernels, padding=padding) for kernels in ("cpp", "torch", "torch")]
    x = images(4)
    assert_as_good(step(models[0], x), step(models[1], x), step(models[2].double(), x))


def test_a_step_under_autocast():
    models, x = [narrow(kernels) for kernels in ("cpp", "torch", "torch")], images(8)
    actual, baseline = (step(model, x, torch.bfloat16) for model in models[:2])
    assert_as_good(actual, baseline, step(models[2].double(), x), least=128)
    assert all(p.grad.dtype == torch.float32 for p in models[0].parameters())


def test_a_backward_pass_under_autocast_has_the_same_bits():
    """The op computes as in its forward pass, and alike on every thread: only one inherits the autocast."""
    op, case = OPS["se_gate"], Case(40, 24, 5, 5)
    plain, mixed = (make_inputs(op, case, torch.float32) for _ in range(2))
    results = []
    for inputs, on in ((plain, False), (mixed, True)):
        x = inputs.x.requires_grad_()
        parameters = [p.requires_grad_() for p in inputs.parameters]
        y = se_gate(x, BatchNorm(*parameters[:2], torch.zeros(24), torch.ones(24)), SqueezeExcite(*parameters[2:]))
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y.backward(y.detach().sin())
        results.append([x.grad, *(p.grad for p in parameters)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("k", [1, 7])
def test_taps_of_other_sizes_run_in_pytorch(k):
    x, weight = torch.randn(2, 24, 9, 9), torch.randn(24, 1, k, k)
    padding = (k // 2,) * 4
    got = depthwise_conv(x, weight, 1, padding, kernels="cpp")
    assert torch.equal(got, depthwise_conv_reference(x, weight, 1, padding))
    blocks = [MBConv(8, 8, k, 1, 6, style=Style(kernels=kernels)) for kernels in ("cpp", "torch")]
    blocks[1].load_state_dict(blocks[0].state_dict())
    one, other = (block(x[:, :8]) for block in blocks)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_gives_an_empty_map():
    x = torch.zeros(0, 24, 8, 8)
    assert depthwise_conv(x, torch.zeros(24, 1, 3, 3), kernels="cpp").shape == (0, 24, 8, 8)
    block = MBConv(24, 16, 3, 2, 6, style=Style(kernels="cpp")).eval()
    assert block(x).shape == (0, 16, 4, 4)


def test_evaluation():
    x, models = images(2), [narrow(kernels, output_stride=16).eval() for kernels in ("cpp", "torch")]
    with torch.no_grad():
        assert relative_rms(*(model(x) for model in models)) <= 1e-5


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    eager, model, x = narrow("cpp", output_stride=16), narrow("cpp", output_stride=16), images(8)
    compiled = step(torch.compile(model, fullgraph=True), x)
    for name, value in step(eager, x).items():
        other = compiled[f"_orig_mod.{name}" if name != "logits" else name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("expand", [1, 6])
def test_opcheck_of_the_block(expand):
    opcheck_block(expand)


def test_recomputation_gives_the_same_bits():
    check_recomputation("cpp")


def test_exports_through_the_reference():
    model = narrow("auto", output_stride=16).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),))
    assert not any("effnet" in str(node.target) for node in program.graph.nodes)


def test_auto_uses_the_cpp_kernels(monkeypatch):
    x = torch.zeros(2)
    assert launch.use_kernels("auto", x)
    assert not launch.use_kernels("torch", x)
    assert not launch.use_kernels("auto", x.double())
    with pytest.raises(ValueError, match=r"kernels='cpp' cannot serve a torch\.float64 tensor on cpu"):
        launch.use_kernels("cpp", x.double())
    monkeypatch.setattr(build, "library", lambda: None)
    assert not launch.use_kernels("auto", x)


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    line = (
        "train --dataset synthetic --output_stride 16 --limit_train 64 --limit_eval 16 --batch_size 16 --num_epochs 2 "
        "--width 0.25 --depth 0.3 --ema_decay 0.9 --loader resident --num_workers 1 --device cpu --kernels cpp "
        f"--save_dir {tmp_path}"
    )
    run_cli(f"{line} --run_name whole")
    run_cli(f"{line} --run_name halves --time_budget 0.001")
    assert not checkpoint.load(tmp_path / "halves" / "last.pt")["progress"]["finished"]
    run_cli(f"{line} --run_name halves")
    whole, halves = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "halves"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, halves[part][name]) for name, value in whole[part].items())


def test_without_a_compiler_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library.__wrapped__() is None
    assert capsys.readouterr().err == (
        "effnet_kernels: no C++ kernels, PyTorch's operators serve: there is no C++ compiler (no-such-compiler)\n"
    )


def test_a_compiler_that_does_not_start_is_one_line(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(broken))
    assert build.library.__wrapped__() is None
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith("effnet_kernels: no C++ kernels, PyTorch's operators serve: ")


def test_a_missing_builder_is_one_line(tmp_path, monkeypatch, capsys):
    """As where setuptools, which torch needs to build, is not installed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    monkeypatch.delattr(torch.utils, "cpp_extension", raising=False)
    assert build.library.__wrapped__() is None
    assert "PyTorch's operators serve: import of torch.utils.cpp_extension" in capsys.readouterr().err


def test_a_failed_build_is_not_tried_again(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    broken.write_text(
        "#!/bin/sh\necho 'g++ (GCC) 12.2.0'; case \"$*\" in *-c*) echo no space left >&2; exit 1;; esac\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(broken))
    assert build.library.__wrapped__() is None
    printed = capsys.readouterr().err
    assert "building the C++ kernels" in printed
    assert "the compiler failed, see" in printed
    assert build.library.__wrapped__() is None  # as another process would
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "compiling failed before, see" in printed
    (log,) = tmp_path.glob("*/failed.log")
    assert "no space left" in log.read_text()


SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1"
SANITIZED = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from op_cases import *
torch.set_num_threads(2)
import test_block, test_cpu
for name in test_cpu.NAMES:
    for case in ODD_CASES:
        for dtype in (torch.float32, torch.bfloat16):
            if test_cpu.has_two_values(OPS[name], case):
                run(OPS[name], case, make_inputs(OPS[name], case, dtype), "cpp")
for settings in test_block.BLOCKS:
    test_block.block_step(settings, "cpp", threads=2)
print("clean")
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [None, "avx2", "default"])
def test_under_sanitizers(tmp_path, capability):
    """AddressSanitizer and UndefinedBehaviorSanitizer report nothing on the odd shapes, for each vector length."""
    if capability == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the CPU has no AVX2")
    paths = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
             for name in ("libasan.so", "libubsan.so")]  # fmt: skip
    environment = os.environ | {
        "EFFNET_KERNELS_CXXFLAGS": SANITIZERS,
        "LD_PRELOAD": ":".join(path.strip() for path in paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at exit
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "TRITON_INTERPRET": "0",
        **({} if capability is None else {"ATEN_CPU_CAPABILITY": capability}),
    }
    folder = Path(__file__).parent
    command = [sys.executable, "-c", SANITIZED, str(folder), str(folder.parent / "shared")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "clean\n", result.stderr[-4000:]


def test_another_c_library_is_another_build(monkeypatch):
    """The home folder may be shared with older machines."""
    options = build.flags()
    here = build.folder(options)
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("glibc", "2.17"))
    assert build.folder(options) != here
