"""singe.kernels.integral: compiled = definition, same bits always, and errors that help."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from singe.errors import KernelError
from singe.kernels import integral, native
from singe.kernels.integral import Norm, accumulate, accumulate_reference

NORMS: list[Norm] = [1, 2, "sum"]
# Rows are summed in float64, so what remains is the rounding of score: 2^-24 = 6e-8 in float32,
# also for 16-bit inputs (their products are exact in float32). float64: K * 2^-53 with K <= 5000.
# `sum` may cancel: the bound is then relative to sum|x|, hence the scale in `assert_matches`.
TOLERANCE = {
    torch.float32: 2e-7,
    torch.float16: 2e-7,
    torch.bfloat16: 2e-7,
    torch.float64: 1e-12,
}
DTYPES = list(TOLERANCE)

no_cuda = "needs a CUDA device" if not torch.cuda.is_available() else native.cuda_problem(0)
gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(no_cuda), reason=no_cuda)]
no_core = native.cpu_problem()
compiled = pytest.mark.skipif(bool(no_core), reason=no_core)
# The compiled and the torch implementation obey the same contract.
IMPLEMENTATIONS = [pytest.param("native", marks=compiled), "torch"]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(
    nodes: int,
    channels: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    weighted: bool = True,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    rng = torch.Generator().manual_seed(nodes * 1_000_003 + channels * 1009 + size)
    grad = torch.randn(nodes, channels, size, generator=rng).to(dtype)
    weight = torch.randn(channels, size, generator=rng).to(dtype) if weighted else None
    omega = torch.rand(nodes, generator=rng).to(wide(dtype))
    score = torch.rand(channels, generator=rng).to(wide(dtype))
    return (
        score.to(device),
        grad.to(device),
        None if weight is None else weight.to(device),
        omega.to(device),
    )


def in_float64(
    score: Tensor, grad: Tensor, weight: Tensor | None, omega: Tensor, p: Norm
) -> tuple[Tensor, Tensor]:
    """The result from numpy, and the size of what was summed."""
    x = grad.double().numpy() * (1 if weight is None else weight.double().numpy())
    size = np.abs(x).sum(-1)
    norm = {1: size, 2: np.sqrt((x * x).sum(-1)), "sum": np.abs(x.sum(-1))}[p]
    start = score.double().numpy()
    factors = omega.double().numpy()
    return torch.from_numpy(start + factors @ norm), torch.from_numpy(start + factors @ size)


def assert_matches(
    score: Tensor, grad: Tensor, weight: Tensor | None, omega: Tensor, p: Norm
) -> None:
    expected, scale = in_float64(score, grad, weight, omega, p)
    accumulate(score, grad, weight, omega, p)
    error = (score.double() - expected).abs()
    assert (error <= TOLERANCE[grad.dtype] * scale).all()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SINGE_INTEGRAL", request.param)
    return str(request.param)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "ones"])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition(implementation, dtype, p, weighted):
    for shape in [(1, 1, 1), (4, 17, 129), (5, 3, 1025), (7, 129, 17), (2, 1, 5000)]:
        assert_matches(*make(*shape, dtype, weighted), p)


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.integers(0, 9),
    channels=st.integers(0, 20),
    size=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from(NORMS),
    weighted=st.booleans(),
)
def test_matches_for_any_shape(nodes, channels, size, dtype, p, weighted):
    assert_matches(*make(nodes, channels, size, dtype, weighted), p)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)], ids=str)
def test_an_empty_dimension_adds_nothing(implementation, shape):
    score, grad, weight, omega = make(*shape)
    before = score.clone()
    for p in NORMS:
        accumulate(score, grad, weight, omega, p)
    assert torch.equal(score, before)


def test_adds_to_what_is_there(implementation):
    score, grad, weight, omega = make(4, 5, 33)
    once = torch.zeros_like(score)
    accumulate(once, grad, weight, omega)
    accumulate(score, grad[:2], weight, omega[:2])
    accumulate(score, grad[2:], weight, omega[2:])
    start, *_ = make(4, 5, 33)
    torch.testing.assert_close(score, start + once, rtol=3e-7, atol=0)  # two roundings more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_exactly(implementation, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    for flush in (False, True):  # subnormal halves survive set_flush_denormal
        torch.set_flush_denormal(flush)
        score = torch.zeros(len(values))
        accumulate(score, values.view(1, -1, 1), None, torch.ones(1), "sum")
        torch.set_flush_denormal(False)
        expected = values.float().abs()
        if flush:  # bfloat16 has float32's subnormals, which are flushed on purpose
            expected[(expected < 2**-126) & (expected > 0)] = 0
            score[(score < 2**-126) & (score > 0)] = 0
        assert torch.equal(torch.nan_to_num(score), torch.nan_to_num(expected))
        assert torch.equal(score.isnan(), values.isnan())


def test_squares_of_small_and_large_floats_survive(implementation):
    for magnitude in (1e-30, 1e30):
        score = torch.zeros(1)
        accumulate(score, torch.full((1, 1, 4), magnitude), None, torch.ones(1), 2)
        torch.testing.assert_close(score, torch.tensor([2 * magnitude]), rtol=2e-7, atol=0)


LAYOUTS = {
    "transposed": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda g: torch.cat([g, g], -1)[..., : g.shape[-1]],
    "every second": lambda g: g.repeat_interleave(2, -1)[..., ::2],
    "nodes last": lambda g: g.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "offset by one element": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_inputs(implementation, layout, p):
    score, grad, weight, omega = make(4, 6, 21)
    other = score.clone()
    accumulate(score, grad, weight, omega, p)
    view = LAYOUTS[layout]
    accumulate(other, view(grad), view(weight[None])[0], omega.repeat_interleave(2)[::2], p)
    assert torch.equal(score, other)


def test_expanded_inputs(implementation):
    score, grad, weight, omega = make(4, 6, 21)
    other = score.clone()
    nodes, channels, size = grad.shape
    row = grad[0, 0]
    accumulate(score, row.repeat(nodes, channels, 1), weight[:1].repeat(channels, 1), omega)
    accumulate(other, row.expand(nodes, channels, size), weight[:1].expand(channels, -1), omega)
    assert torch.equal(score, other)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("place", [0, 8, 20], ids=lambda k: f"k={k}")
@pytest.mark.parametrize("source", ["grad", "weight", "omega", "score"])
def test_nan_reaches_its_channel_and_no_other(implementation, source, place, p):
    score, grad, weight, omega = make(5, 6, 21)
    if source == "grad":
        grad[4, 2, place] = torch.nan
        weight[2, place] = 0.0  # 0 * NaN is NaN
    elif source == "weight":
        weight[2, place] = torch.nan
    elif source == "omega":
        omega[3] = torch.nan
    else:
        score[2] = torch.nan
    accumulate(score, grad, weight, omega, p)
    bad = torch.full((6,), source == "omega")
    bad[2] = True
    assert torch.equal(score.isnan(), bad)


def test_only_score_is_written(implementation):
    """Surrounded by NaN: nothing of it is read, and it is still there afterwards."""
    score, grad, weight, omega = make(3, 7, 19)
    padded = [torch.full((t.numel() + 32,), torch.nan) for t in (score, grad, weight, omega)]
    inner = [
        pad[16:-16].view(t.shape).copy_(t)
        for pad, t in zip(padded, (score, grad, weight, omega), strict=True)
    ]
    accumulate(*inner)
    accumulate(score, grad, weight, omega)
    for pad, part, original in zip(padded, inner, (score, grad, weight, omega), strict=True):
        assert torch.equal(part, original)
        assert pad[:16].isnan().all()
        assert pad[-16:].isnan().all()


@pytest.mark.parametrize("p", NORMS)
def test_same_bits_for_any_number_of_threads(implementation, p):
    inputs = make(4, 65, 700)  # 182,000 elements: above the threshold for threads
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1, 2):
            torch.set_num_threads(count)
            score = inputs[0].clone()
            accumulate(score, *inputs[1:], p)
            results.append(score)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@compiled
def test_offsets_beyond_32_bits(monkeypatch):
    """3 x 2^30 elements; only what is written is ever backed by memory (calloc)."""
    monkeypatch.setenv("SINGE_INTEGRAL", "native")
    size = 2**30
    data = np.zeros(3 * size, dtype=np.int16)
    data[-1] = 0x3C00  # 1.0
    data[2 * size] = 0x4000  # 2.0, at element 2^31
    grad = torch.from_numpy(data).view(torch.float16).view(1, 3, size)
    score = torch.zeros(3)
    accumulate(score, grad, None, torch.ones(1))
    assert score.tolist() == [0.0, 0.0, 3.0]


def test_inputs_that_require_grad_are_just_numbers():
    score, grad, weight, omega = make(2, 3, 4)
    other = score.clone()
    accumulate(score, grad, weight, omega)
    accumulate(other, grad.requires_grad_(), torch.nn.Parameter(weight), omega)
    assert torch.equal(score, other)
    assert not other.requires_grad


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "ones"])
def test_opcheck(implementation, weighted):
    for dtype in DTYPES:
        inputs = make(3, 4, 9, dtype, weighted)
        torch.library.opcheck(torch.ops.singe.accumulate.default, (*inputs, "2"))


def test_compiles_into_one_graph(implementation):
    def score_of(grad: Tensor, weight: Tensor, omega: Tensor) -> Tensor:
        score = torch.zeros(grad.shape[1])
        accumulate(score, grad * 2, weight, omega, 2)
        return score + 1

    _, grad, weight, omega = make(3, 5, 8)
    fused = torch.compile(score_of, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(fused(grad, weight, omega), score_of(grad, weight, omega))


def replaced(**changes):
    score, grad, weight, omega = make(2, 3, 4)
    return {"score": score, "grad": grad, "weight": weight, "omega": omega, "p": 1} | changes


ERRORS = {
    "p": (replaced(p=3), "p is 3; it can be 1, 2 or"),
    "p is a tensor": (replaced(p=torch.ones(2)), "it can be 1, 2 or"),
    "grad has two dimensions": (replaced(grad=torch.ones(3, 4)), r"expected \[S, C, K\]"),
    "integers": (replaced(grad=torch.ones(2, 3, 4).int()), "grad is torch.int32; expected"),
    "score is too short": (replaced(score=torch.zeros(2)), r"score has shape \[2\].* needs \[3\]"),
    "omega is too long": (replaced(omega=torch.zeros(3)), r"omega has shape \[3\].* needs \[2\]"),
    "weight is transposed": (replaced(weight=torch.ones(4, 3)), r"weight has shape .*\[3, 4\]"),
    "weight has another dtype": (replaced(weight=torch.ones(3, 4).half()), "convert it"),
    "score is narrow": (replaced(grad=torch.ones(2, 3, 4).double(), weight=None), "score is"),
    "score is strided": (replaced(score=torch.zeros(6)[::2]), "score is not contiguous"),
    "score requires grad": (replaced(score=torch.zeros(3).requires_grad_()), "requires grad"),
    "device": (replaced(omega=torch.zeros(2, device="meta")), "omega is on meta, grad on cpu"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    arguments, message = ERRORS[case]
    before = arguments["score"].clone()
    with pytest.raises(KernelError, match=message):
        accumulate(**arguments)
    assert torch.equal(arguments["score"], before)


def test_overlapping_memory_is_refused():
    score, grad, weight, _ = make(2, 3, 4)
    buffer = torch.zeros(4)
    accumulate(buffer[:3].copy_(score), grad, weight, torch.zeros(2))
    with pytest.raises(KernelError, match=r"shares memory with omega: pass omega\.clone"):
        accumulate(buffer[:3], grad, weight, buffer[2:])
    with pytest.raises(KernelError, match="shares memory with grad"):
        accumulate(grad[0, 0, :3], grad, weight, torch.zeros(2))


@pytest.mark.parametrize("start", [0, 5])
def test_memory_may_lie_side_by_side(start):
    score, grad, weight, omega = make(2, 3, 4)
    buffer = torch.cat([score, omega, score])
    accumulate(score, grad, weight, omega)
    inner = buffer[start : start + 3]
    accumulate(inner, grad, weight, buffer[3:5])
    assert torch.equal(inner, score)


def test_forcing_an_implementation_that_is_missing(monkeypatch):
    monkeypatch.setenv("SINGE_INTEGRAL", "native")
    monkeypatch.setattr(native, "cpu_problem", lambda: "singe._core was not built")
    with pytest.raises(KernelError, match=r"SINGE_INTEGRAL=native, but: singe\._core was not"):
        accumulate(*make(1, 2, 3))
    monkeypatch.setenv("SINGE_INTEGRAL", "cuda")
    with pytest.raises(KernelError, match="it can be"):
        accumulate(*make(1, 2, 3))


def test_without_the_core_torch_takes_over(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "singe._core was not built"))
    monkeypatch.delenv("SINGE_INTEGRAL", raising=False)
    assert_matches(*make(3, 4, 5), 2)
    status = native.status()
    assert status["cpu"] == {"usable": False, "reason": "singe._core was not built"}
    assert status["build"] == {}


class FakeCore:
    """A build with CUDA 13.0 on a machine of our choice."""

    def __init__(self, driver: int = 13000, cuda: bool = True, problem: str = "") -> None:
        self.driver, self.cuda, self.problem = driver, cuda, problem

    def build_info(self):
        return {"cuda": self.cuda, "cuda_version": 13000, "cuda_note": "no nvcc found"}

    def cuda_driver_version(self):
        return self.driver

    def cuda_device_count(self):
        return 1

    def cuda_problem(self, device: int):
        return self.problem


@pytest.mark.parametrize(
    ("core", "device", "message"),
    [
        (FakeCore(cuda=False), 0, "without CUDA (no nvcc found); rebuild: `SINGE_CUDA=ON pip"),
        (FakeCore(driver=0), 0, "no NVIDIA driver"),
        (FakeCore(driver=12080), 0, "built with CUDA 13.0, the driver only knows 12.8"),
        (FakeCore(), 3, "there is no CUDA device 3: 1 are visible"),
        (
            FakeCore(problem="no kernel image is available"),
            0,
            "is available; the GPU is sm_75, rebuild for it: `SINGE_CUDA_ARCHS=75 SINGE_CUDA=ON pip",
        ),
        (FakeCore(driver=13010), 0, ""),
    ],
)
def test_why_cuda_is_not_usable(monkeypatch, core, device, message):
    pretend(monkeypatch, core)
    said = native.cuda_problem(device)
    assert message in said
    assert bool(message) == bool(said)


def test_a_torch_without_cuda_cannot_name_the_gpu(monkeypatch):
    """Its driver and the core are there all the same."""
    pretend(monkeypatch, FakeCore(problem="no kernel image is available"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native.cuda_problem(0) == "no kernel image is available"


def test_a_card_without_memory_is_asked_again(monkeypatch):
    core = FakeCore(problem="singe: CUDA: out of memory")
    pretend(monkeypatch, core)
    assert native.cuda_problem(0) == "singe: CUDA: out of memory"
    core.problem = ""
    assert not native.cuda_problem(0)
    core.problem = "singe: CUDA: out of memory"
    assert not native.cuda_problem(0), "the kernels have been loaded"


def test_a_gpu_that_the_core_cannot_serve_is_told_of(monkeypatch):
    pretend(monkeypatch, FakeCore(cuda=False))
    monkeypatch.delenv("SINGE_INTEGRAL", raising=False)
    score, grad, weight, omega = make(3, 4, 5)
    expected = score.clone()
    accumulate_reference(expected, grad, weight, omega, 2)
    with pytest.warns(UserWarning, match="plain torch: .*built without CUDA"):
        integral._cuda(score, grad, weight, omega, "2")
    assert torch.equal(score, expected)


def pretend(monkeypatch, core: FakeCore) -> None:
    monkeypatch.setattr(native, "_load", lambda: (core, ""))
    monkeypatch.setattr(native, "_setup_problem", native._setup_problem.__wrapped__)
    monkeypatch.setattr(native, "_ready", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))


class TestCuda:
    pytestmark = gpu

    @pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "ones"])
    @pytest.mark.parametrize("p", NORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equals_cpu_and_repeats(self, monkeypatch, dtype, p, weighted):
        monkeypatch.setenv("SINGE_INTEGRAL", "native")
        # Short rows (a warp each) and long ones (a block each), packed loads (K % 8 = 0) and not.
        for shape in [(1, 1, 1), (4, 17, 129), (5, 3, 1025), (4, 64, 4608), (3, 600, 32)]:
            self.check(dtype, p, *make(*shape, dtype, weighted))

    @pytest.mark.parametrize("shape", [(1, 65_539, 1025), (1, 524_300, 4)], ids=str)
    def test_more_channels_than_a_grid_has_blocks(self, monkeypatch, shape):
        """65,535 blocks, of eight rows where these are short; a block then goes on to the next."""
        monkeypatch.setenv("SINGE_INTEGRAL", "native")
        self.check(torch.float16, 1, *make(*shape, torch.float16))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_any_layout_of_the_inputs(self, monkeypatch, layout):
        """Loads of 16 bytes want an address that is a multiple of them."""
        monkeypatch.setenv("SINGE_INTEGRAL", "native")
        for size in (32, 1032):
            score, grad, weight, omega = (t.cuda() for t in make(4, 6, size))
            other = score.clone()
            accumulate(score, grad, weight, omega)
            view = LAYOUTS[layout]
            accumulate(other, view(grad), view(weight[None])[0], omega)
            assert torch.equal(score, other)

    def check(self, dtype, p, *inputs):
        """Against the CPU, twice."""
        on_gpu = [None if t is None else t.cuda() for t in inputs]
        again = on_gpu[0].clone()
        accumulate(*on_gpu, p)
        accumulate(again, *on_gpu[1:], p)
        assert torch.equal(on_gpu[0], again)
        _, scale = in_float64(*inputs, p)
        accumulate(*inputs, p)
        error = (on_gpu[0].cpu().double() - inputs[0].double()).abs()
        assert (error <= TOLERANCE[dtype] * scale).all()

    def test_empty_and_nan(self):
        for shape in [(0, 3, 5), (2, 0, 5), (2, 3, 0)]:
            inputs = make(*shape, device="cuda")
            before = inputs[0].clone()
            accumulate(*inputs)
            assert torch.equal(inputs[0], before)
        score, grad, weight, omega = make(4, 6, 1030, device="cuda")
        grad[2, 3, 1029] = torch.nan
        accumulate(score, grad, weight, omega)
        assert score.isnan().tolist() == [False, False, False, True, False, False]

    def test_runs_on_the_current_stream(self):
        score, grad, weight, omega = make(4, 64, 4608, device="cuda")
        expected = score.clone()
        accumulate(expected, grad * 3, weight, omega)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # the kernel must wait for what its stream does before
            accumulate(score, grad * 3, weight, omega)
        stream.synchronize()
        assert torch.equal(score, expected)

    def test_offsets_beyond_32_bits(self):
        if torch.cuda.mem_get_info()[0] < 8 * 2**30:
            pytest.skip("needs 8 GiB of free GPU memory")
        grad = torch.zeros(1, 3, 2**30, dtype=torch.float16, device="cuda")
        grad[0, 2, 0], grad[0, 2, -1] = 2.0, 1.0
        score = torch.zeros(3, device="cuda")
        accumulate(score, grad, None, torch.ones(1, device="cuda"))
        assert score.tolist() == [0.0, 0.0, 3.0]

    def test_a_mix_of_devices_is_refused(self):
        score, grad, weight, omega = make(2, 3, 4)
        with pytest.raises(KernelError, match="omega is on cuda:0, grad on cpu"):
            accumulate(score, grad, weight, omega.cuda())
