"""Every Triton configuration compiles for real GPUs (sm_80, sm_90), on a machine that has none.

What is compiled is what the launchers ask for: they run on meta tensors with the kernel replaced
by a recorder. The full product of the options is about 70,000 kernels, so each value of every
option meets each value of every other one (pairwise), on both architectures.

It happens in a process without TRITON_INTERPRET: what triton was imported with decides whether
tl.sum and tl.cdiv are compiled or interpreted, for the whole process. This file is its script:
`python tests/test_triton_aot.py fwd 90`.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
}
V, B = 3, 2
OPTIONS: dict[str, list[Any]] = {
    "act": ["identity", "relu", "relu6", "leaky_relu", "gelu", "silu", "hardswish"],
    "dtype": list(TYPES),
    # (channels-last, C, X): every VEC (1, 4, 16) and the narrow, mixed and wide tiles; of single samples,
    # the low ones too.
    "layout": [
        (False, 5, 7),
        (False, 8, 49),
        (False, 8, 196),
        (False, 8, 256),
        (False, 8, 4096),
        (True, 7, 9),
        (True, 20, 9),
        (True, 64, 9),
        (True, 512, 1),
    ],
    "of_samples": [False, True],
    "y": [1, V],
    "residual": ["none", "shared", "full", "scalar of 1", "scalar of V"],
    "scale": [False, True],
    "shift": [False, True],
}
NEEDS = [n for n in itertools.product([False, True], repeat=3) if any(n)]


def makes_sense(choice: dict[str, Any]) -> bool:
    """No gradient is asked for a residual that is not there."""
    return not (choice.get("residual") == "none" and choice.get("needs", NEEDS[0])[1])


def pairwise(options: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Choices such that each value of every option meets each value of every other one."""
    draw = random.Random(0)

    def pairs(row: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(row, 2)}

    def values(row: dict[str, int]) -> dict[str, Any]:
        return {name: options[name][k] for name, k in row.items()}

    missing = set()
    for a, b in itertools.combinations(options, 2):
        for i, j in itertools.product(range(len(options[a])), range(len(options[b]))):
            if makes_sense(values({a: i, b: j})):
                missing.add((a, i, b, j))
    choices = []
    while missing:
        a, i, b, j = min(missing)
        tries = [{n: draw.randrange(len(options[n])) for n in options} for _ in range(60)]
        rows = [row | {a: i, b: j} for row in tries]
        best = max(
            (row for row in rows if makes_sense(values(row))),
            key=lambda row: len(pairs(row) & missing),
        )
        missing -= pairs(best)
        choices.append(values(best))
    return choices


class Recorder:
    """Stands for a kernel and keeps the arguments of its launch."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.arguments, self.constants = arguments, constants

        return launch


def record(name: str, choice: dict[str, Any]) -> Recorder:
    """What the launcher hands to kernel `name` for these options."""
    from singe.kernels import masked_forward_triton as kernels

    channels_last, c, x = choice["layout"]
    wide = torch.float64 if choice["dtype"] == torch.float64 else torch.float32

    def tensor(leading: int) -> torch.Tensor:
        return torch.empty(leading, B, c, x, dtype=choice["dtype"], device="meta")

    def vector(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=wide, device="meta")

    residual = {
        "none": None,
        "shared": tensor(1),
        "full": tensor(V),
        "scalar of 1": tensor(1).sum(),
        "scalar of V": tensor(1).sum(),
    }[choice["residual"]]
    scale = vector(c) if choice["scale"] else None
    shift = vector(c) if choice["shift"] else None
    y, gate, act = tensor(choice["y"]), vector(V, *[B] * choice["of_samples"], c), choice["act"]
    recorder = Recorder()
    setattr(kernels, name, recorder)
    if "needs" not in choice:
        kernels.masked_forward(tensor(V), y, gate, scale, shift, residual, act, channels_last)
        return recorder
    need_y, need_residual, need_gate = choice["needs"]
    kernels.masked_forward_backward(
        tensor(V),
        y if act != "identity" or need_gate else None,
        gate,
        scale,
        shift,
        residual,
        tensor(choice["y"]) if need_y else None,
        tensor(V if choice["residual"] in ("full", "scalar of V") else 1)
        if need_residual
        else None,
        torch.empty_like(gate) if need_gate else None,
        act,
        channels_last,
        choice["y"] == 1,
    )
    return recorder


def build(function: Any, recorder: Recorder, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    constants = dict(recorder.constants)
    options = {"num_warps": constants.pop("num_warps")}
    signature = dict.fromkeys(names, "constexpr")
    for name, value in zip(names, recorder.arguments, strict=False):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif value is None:
            constants[name] = None
        else:
            signature[name] = "i32"  # sizes are not specialised: see SIZES
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        # What the launch finds out from an aligned pointer; nothing is vectorised without it.
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the only kernel in it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}


def main(direction: str, arch: int) -> None:
    from singe.kernels import masked_forward_triton as kernels

    name = f"masked_forward_{direction}_kernel"
    function = getattr(kernels, name)
    options = OPTIONS if direction == "fwd" else OPTIONS | {"needs": NEEDS}
    most, count = 0, 0
    for choice in pairwise(options):
        recorder = record(name, choice)
        built = build(function, recorder, arch)
        ptx = built.asm["ptx"]
        assert f".target sm_{arch}" in ptx
        used = resources(built.asm["cubin"])
        # STACK holds spills, LOCAL arrays. In float64 ptxas sometimes gives up one register of
        # 48 or 64 to fit one more block on an SM: that is its choice, not a lack of registers.
        spare = 8 if choice["dtype"] == torch.float64 else 0
        assert used["STACK"] <= spare, (choice, used)
        assert used["LOCAL"] == 0, (choice, used)
        most, count = max(most, used["REG"]), count + 1
        if direction == "fwd" and choice["dtype"] == torch.float32:
            # 16-byte accesses wherever the row length allows them.
            vectors = re.findall(r"(ld|st)\.global\S*\.v4", ptx)
            assert ({"ld", "st"} <= set(vectors)) == (recorder.constants["VEC"] > 1), choice
    print(f"{count} kernels, at most {most} registers")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_compiles_without_spills(direction: str, arch: int) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, __file__, direction, str(arch)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert " kernels, " in ran.stdout


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
