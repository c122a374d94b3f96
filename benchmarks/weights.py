"""What a product of one token with a matrix costs, by the format of the matrix: why decoding offers float16 on a CPU.

    python benchmarks/weights.py                    # ten seconds, 1 GB; the matrices of SmolLM2-135M
    python benchmarks/weights.py --rows 8           # eight sequences at once

Formats: float32 (MKL); bfloat16; float16 packed by FBGEMM and summed in float32 (`limbeck generate --fp16`), by the
function that students call on one thread and by the operator that several threads share; int8 weights alone, by the
kernel that torch has for them; int8 with int8 inputs (`--int8-dynamic`). One thread, processor time, medians over
rounds in turns. Each shape has several matrices, 64 MB in float32, so that none stays in cache.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.models.quantization import Float16Linear

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576))
SAMPLE_BYTES = 64e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1, help="tokens that are multiplied at once")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'matrix':14} " + " ".join(f"{name:>15}" for name in FORMATS) + "   microseconds")
    for shape in SHAPES:
        matrices = [torch.randn(shape) for _ in range(max(1, round(SAMPLE_BYTES / (4 * shape[0] * shape[1]))))]
        x = torch.randn(args.rows, shape[1])
        work = {name: [make(matrix, x) for matrix in matrices] for name, make in FORMATS.items()}
        times = take_turns(work, args.rounds)
        print(f"{shape[0]:6} x {shape[1]:5} " + " ".join(f"{1e6 * times[name]:15.0f}" for name in FORMATS), flush=True)


def take_turns(work: dict[str, list[Callable[[], Tensor]]], rounds: int) -> dict[str, float]:
    """Time each list of products once a round; returns the median seconds of one product."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, products in work.items():
            start = time.thread_time()
            for product in products:
                product()
            if turn:  # the first one warms up
                times[name].append((time.thread_time() - start) / len(products))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def make_float32(matrix: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Multiply as every linear layer does."""
    return lambda: F.linear(x, matrix)


def make_bfloat16(matrix: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Multiply in bfloat16, input included."""
    small, input_ = matrix.bfloat16(), x.bfloat16()
    return lambda: F.linear(input_, small)


def make_float16(matrix: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Multiply with a matrix that FBGEMM has packed in float16, as students do on one thread."""
    linear = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(matrix, requires_grad=False)
    packed = Float16Linear(linear)
    return lambda: packed(x)


def make_float16_shared(matrix: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Multiply with the same matrix by the operator that shares the product among threads, here one."""
    packed = torch.ops.quantized.linear_prepack_fp16(matrix, None)
    return lambda: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def make_int8_weights(matrix: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Multiply with int8 weights and a scale per output, in float32."""
    scales = matrix.abs().amax(1) / 127
    small = matrix.div(scales[:, None]).round().to(torch.int8)
    return lambda: torch._weight_int8pack_mm(x, small, scales)


def make_int8_dynamic(matrix: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Multiply in int8, with a scale per output and one for the input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in PyTorch
        zeros, scales = torch.zeros(len(matrix), dtype=torch.long), matrix.abs().amax(1).double() / 127
        small = torch.quantize_per_channel(matrix, scales, zeros, 0, torch.qint8)
    packed: Any = torch.ops.quantized.linear_prepack(small, None)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, True)


FORMATS = {
    "float32": make_float32,
    "bfloat16": make_bfloat16,
    "float16": make_float16,
    "float16, shared": make_float16_shared,
    "int8 weights": make_int8_weights,
    "int8 dynamic": make_int8_dynamic,
}

if __name__ == "__main__":
    main()
