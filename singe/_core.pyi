def accumulate_cpu(
    score: int,
    grad: int,
    weight: int,
    omega: int,
    S: int,
    C: int,
    K: int,
    dtype: int,
    norm: int,
    num_threads: int,
) -> None: ...
def accumulate_cuda(
    score: int,
    grad: int,
    weight: int,
    omega: int,
    S: int,
    C: int,
    K: int,
    dtype: int,
    norm: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_device_count() -> int: ...
def cuda_driver_version() -> int: ...
def cuda_problem(device: int) -> str: ...
def build_info() -> dict[str, object]: ...
