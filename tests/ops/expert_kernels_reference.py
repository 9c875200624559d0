"""The kernels of a mixture's experts against what they stand for, with and without absent rows; a command for a CPU.

TRITON_INTERPRET=1 python tests/ops/expert_kernels_reference.py
"""

import itertools
import sys

import torch
from mixture_reference import poisoned_memory

TOKENS, CHOSEN, EXPERTS, WIDTH = 23, 3, 5, 150  # no multiples of a tile
CLOSE = 1e-5
EIGHT_BIT = 0.1  # the interpreter's rounding to E4M3 loses a carry


def routing(partial):
    """Of 5 experts, or of those of 10 that are here."""
    from posttrain.ops.grouped_experts import Routing

    torch.manual_seed(0)
    scores = torch.randn(TOKENS, 2 * EXPERTS if partial else EXPERTS)
    chosen = torch.zeros_like(scores).bool().scatter(1, scores.topk(CHOSEN, 1).indices, True)
    return Routing.from_map(chosen[:, :EXPERTS], CHOSEN, partial)


def rows_of(where, *shape):
    """Random numbers for the rows that are there, nothing written in the others."""
    values = torch.empty(len(where.token), *shape)
    values[where.token >= 0] = torch.randn(int((where.token >= 0).sum()), *shape)
    return values


def of_present(function, where, *inputs):
    """Its results for the rows that are there."""
    results = function(*inputs)
    if isinstance(results, torch.Tensor):
        results = [results]
    return [result[where.token >= 0] for result in results]


def of_kernel(function, where, *inputs):
    """The same; of the others' rows nothing may have been written."""
    results = function(*inputs)
    matrix = results if isinstance(results, torch.Tensor) else results[0]
    assert matrix[where.token < 0].float().isnan().all()
    return of_present(lambda: results, where)


def cases():
    """Yield (name, found, right) of every kernel."""
    from posttrain.ops import expert_kernels as kernels
    from posttrain.ops import grouped_experts as plain

    for partial, more in itertools.product((False, True), (False, True)):
        where = routing(partial)
        both, weight, upstream = rows_of(where, 2 * WIDTH), torch.rand(len(where.token)), rows_of(where, WIDTH)
        added = of_sum = None
        if more:
            added, of_sum = torch.randn(TOKENS, 2 * WIDTH), torch.randn(TOKENS, WIDTH)
        forward = both, added, where.token, weight, partial
        backward = upstream, of_sum, *forward
        for name, inputs in (("weighted_swiglu", forward), ("weighted_swiglu_backward", backward)):
            found = of_kernel(getattr(kernels, name), where, *inputs)
            yield f"{name} {partial} {more}", found, of_present(getattr(plain, name), where, *inputs)
        summed = upstream, where.rows, partial
        yield f"sum_rows {partial}", [kernels.sum_rows(*summed)], [plain.sum_rows(*summed)]
        values, columns = torch.randn(TOKENS, WIDTH), torch.rand(EXPERTS, WIDTH) + 0.1
        given = [(values, where.token), (upstream, None)]
        for numbers, source in given:
            scaled = [columns, where.expert] if more else [None, None]
            inputs = numbers, source, *scaled, where.present
            found = of_kernel(kernels.quantise_rows, where, *inputs)
            yield f"quantise_rows {partial} {more}", found, of_present(plain.quantise_rows, where, *inputs)
        if partial:
            found = of_kernel(kernels.take_rows, where, values, where.token)
            yield "take_rows", found, of_present(plain.taken, where, values, where.token, True)


def main():
    """Compare; the exit code says whether all are right."""
    wrong = []
    with poisoned_memory():
        for name, found, right in cases():
            for one, other in zip(found, right, strict=True):
                limit = EIGHT_BIT if one.dtype == torch.float8_e4m3fn else CLOSE
                one, other = one.float(), other.float()
                if not (one - other).norm() <= limit * other.norm():
                    wrong.append(name)
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
