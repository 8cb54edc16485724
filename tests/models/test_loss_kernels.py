"""The kernels of the loss: what they compute, in Triton's interpreter, and when they are used."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vltrain.models import loss

VOCABULARY = 10_001  # two blocks and a part of one
ROWS_SHOWN = 5
SCALE = torch.tensor(0.3)
HERE = Path(__file__).parent

COMPILED_FOR_SM90 = """
import sys
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vltrain.models import loss_kernels

for kernel in (loss_kernels._row_losses, loss_kernels._put_gradient):
    for dtype in ("bf16", "fp32"):
        types = {name: "*fp32" for name in kernel.arg_names}
        types |= {"logits": "*" + dtype, "targets": "*i64"}
        types |= {"vocabulary": "i32", "stride": "i32", "size": "constexpr"}
        multiples = {(place,): [["tt.divisibility", 16]] for place in range(len(types) - 1)}
        source = ASTSource(kernel, types, {"size": loss_kernels.BLOCK}, multiples)
        options = {"num_warps": loss_kernels.WARPS}
        compiled = compile(source, GPUTarget("cuda", 90, 32), options)
        Path(sys.argv[1], kernel.__name__ + dtype).write_text(compiled.asm["ptx"])
"""

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def random_case(dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS_SHOWN, VOCABULARY, generator=draw) * factor
    targets = torch.randint(VOCABULARY, (ROWS_SHOWN,), generator=draw)
    targets[0], targets[1] = 0, VOCABULARY - 1
    return logits.to(dtype), targets, SCALE


def all_cases() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    cases = {
        "float32": random_case(torch.float32),
        "bfloat16": random_case(torch.bfloat16),
        "float16": random_case(torch.float16),
        "large": random_case(torch.float32, 1e4),
    }
    logits, targets, _ = random_case(torch.float32)
    holes = logits.clone()
    holes[:, :5_000] = -torch.inf
    cases["holes"] = (holes, targets.clamp(min=5_000), SCALE)
    cases["none"] = (logits[:0].clone(), targets[:0].clone(), SCALE)
    wide = torch.zeros(ROWS_SHOWN, VOCABULARY + 3)
    wide[:, :VOCABULARY] = logits
    cases["apart"] = (wide[:, :VOCABULARY], targets, SCALE)
    odd = torch.zeros(4, 10)
    odd[0, 3], odd[1, 3], odd[2] = torch.inf, torch.nan, -torch.inf
    cases["not finite"] = (odd, torch.zeros(4, dtype=torch.int64), SCALE)
    cases["unknown"] = (torch.zeros(2, 10), torch.tensor([-100, 10]), SCALE)
    return cases


@pytest.fixture(scope="module")
def cases():
    return all_cases()


@pytest.fixture(scope="module")
def found(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save(cases, folder / "cases.pt")
    script = [str(HERE / "interpreted.py"), str(folder / "cases.pt"), str(folder / "found.pt")]
    in_interpreter(*script)
    return torch.load(folder / "found.pt")


def in_interpreter(*command: str) -> None:
    in_process(*command, TRITON_INTERPRET="1")


def in_process(*command: str, **environment: str) -> None:
    """Python, with the package and what lies beside this file."""
    paths = [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def exact(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of rows and the gradient of their scaled sum, in float64."""
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum() * scale.double(), wide)[0]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rounding"),  # of a gradient; the interpreter cuts bfloat16 off where a GPU rounds
    [
        ("float32", 1e-5),
        ("bfloat16", 2**-7),
        ("float16", 2**-10),
        ("large", 1e-5),
        ("holes", 1e-5),
        ("apart", 1e-5),
        ("none", 0),
    ],
)
def test_losses_and_gradients_are_those_of_torch_in_float64(name, rounding, cases, found):
    losses, gradient = exact(*cases[name])

    torch.testing.assert_close(found[name]["losses"].double(), losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found[name]["gradient"].double(), gradient, rtol=rounding, atol=1e-7)


@needs_triton
@pytest.mark.slow
def test_infinite_logits_and_those_that_are_no_number_are_summed_as_torch_does(cases, found):
    torch.testing.assert_close(
        found["not finite"]["norms"], cases["not finite"][0].logsumexp(-1), equal_nan=True
    )


@needs_triton
@pytest.mark.slow
def test_a_target_outside_of_the_vocabulary_has_no_number_for_a_loss(found):
    assert found["unknown"]["losses"].isnan().all()


@needs_triton
@pytest.mark.slow
def test_what_holds_of_the_loss_holds_of_it_by_kernels():
    in_interpreter("-m", "pytest", "-p", "interpreted", str(HERE / "test_loss.py"))


@needs_triton
@pytest.mark.slow
def test_a_gpu_reads_and_writes_sixteen_bytes_at_a_time(tmp_path):
    in_process("-c", COMPILED_FOR_SM90, str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"))

    for dtype, accesses in (("bf16", 2), ("fp32", 4)):  # of a thread to its 16 logits
        reading = (tmp_path / f"_row_losses{dtype}").read_text()
        writing = (tmp_path / f"_put_gradient{dtype}").read_text()
        assert reading.count("ld.global.v4.b32") == accesses
        assert writing.count("ld.global.v4.b32") == accesses
        assert writing.count("st.global.v4.b32") == accesses


def test_logits_on_a_cpu_are_left_to_torch():
    assert loss.kernels_for(torch.zeros(2, 3)) is None


@pytest.mark.parametrize(
    ("there", "triton", "capability", "kernels"),
    [
        (False, None, (0, 0), True),  # some other machine's GPU
        (True, True, (8, 0), True),
        (True, True, (7, 5), False),
        (True, None, (9, 0), False),
    ],
)
def test_a_gpu_is_taken_to_have_kernels_where_triton_serves_it(
    monkeypatch, there, triton, capability, kernels
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(loss, "find_spec", lambda name: triton)

    assert loss.gpus_have_kernels() is kernels


def test_where_triton_does_not_work_the_loss_says_so_and_does_without(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(loss, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it is an ImportError
    monkeypatch.delitem(sys.modules, "vltrain.models.loss_kernels", raising=False)

    assert loss._working_kernels.__wrapped__(torch.device("cpu"), torch.float32) is None
    assert "triton does not work here" in caplog.text


@pytest.mark.slow
def test_the_kernels_are_not_imported_before_a_gpu_asks_for_them():
    code = (
        "import sys, vltrain.models.loss; assert 'vltrain.models.loss_kernels' not in sys.modules"
    )
    in_process("-c", code)
