"""Triton kernels of causal attention with soft-capped scores over packed sequences. Import it only where a GPU is.

The keys that a query sees are a range, from `first[query]` up to its own place; the queries that see a key are one as
well, up to `last[key]`. So a block needs no list of the blocks that it meets: those at the ends of its range are
masked, those between them are not.

A score is at most the cap, so its exponential needs no maximum taken off: sums are never scaled again as a maximum
grows, as they are where scores may be any number (FlashAttention-2, arXiv 2307.08691). The number format must have
fp32's range.

Backward, the gradients of queries, keys and values are a kernel each for wide heads, which compute the scores again, so
that the sums of a block stay in registers. No two programs add to one number: results are the same each time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
PRODUCT_ROWS = 16  # of a program of _row_products


@dataclass(frozen=True)
class Tiles:
    """Rows of a program's own, rows of the other side in a turn of its loop, warps, and stages of its loads."""

    own: int
    other: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Choice:
    """Tiles of the kernels; those of keys and values are one kernel where they have the same."""

    forward: Tiles
    queries: Tiles
    keys: Tiles
    values: Tiles


# 16-bit heads of more than 128 features and of fewer on Hopper, as timed on an H200 (`bench/attention.py --tune`).
WIDE_HEADS = Choice(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 1), Tiles(128, 64, 8, 1), Tiles(128, 32, 8, 3))
NARROW_HEADS = Choice(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2))


@triton.jit
def _tanh(x, APPROXIMATE: tl.constexpr):
    """By one instruction of the GPU (relative error at most 2^-11, PTX ISA), or in fp32's precision."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _capped(one, other, squash, APPROXIMATE: tl.constexpr):
    """tanh of the scores of two blocks of rows, [own, other]; the cap itself is not multiplied in."""
    return _tanh(tl.dot(one, tl.trans(other), input_precision="ieee") * squash, APPROXIMATE)


@triton.jit
def _inside(start, total, width, ROWS: tl.constexpr, FEATURES: tl.constexpr, EVEN: tl.constexpr):
    """Which of the rows from `start` on exist, and which features; EVEN: all features do."""
    rows = (start + tl.arange(0, ROWS) < total)[:, None]
    if not EVEN:
        rows = rows & (tl.arange(0, FEATURES) < width)[None, :]
    return rows


@triton.jit
def _rows(
    tensor,
    start,
    stride,
    total,
    width,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    EVEN: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """Rows [ROWS, FEATURES] of a head from `start` on, zeros where there are none; not MASKED: all rows exist."""
    places = tensor + (start + tl.arange(0, ROWS)[:, None]) * stride + tl.arange(0, FEATURES)[None, :]
    if EVEN and not MASKED:
        return tl.load(places)
    return tl.load(places, _inside(start, total, width, ROWS, FEATURES, EVEN), 0)


@triton.jit
def _store(tensor, values, start, stride, total, width, ROWS: tl.constexpr, FEATURES: tl.constexpr, EVEN: tl.constexpr):
    """Write rows of a head from `start` on."""
    places = tensor + (start + tl.arange(0, ROWS)[:, None]) * stride + tl.arange(0, FEATURES)[None, :]
    tl.store(places, values, _inside(start, total, width, ROWS, FEATURES, EVEN))


@triton.jit
def _keys_of(first, start, total, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Of the keys that a block of queries sees: begin, begin and end of the blocks that all of it sees, end."""
    begin = tl.load(first + start) // OTHER * OTHER
    end = tl.minimum(start + OWN, total)
    whole_end = start // OTHER * OTHER
    whole_begin = tl.minimum(tl.cdiv(tl.load(first + end - 1), OTHER) * OTHER, whole_end)
    return begin, whole_begin, whole_end, end


@triton.jit
def _queries_of(last, start, total, OWN: tl.constexpr, OTHER: tl.constexpr):
    """The same of the queries that see a block of keys."""
    begin = start // OTHER * OTHER
    end = tl.load(last + tl.minimum(start + OWN, total) - 1)
    whole_begin = tl.minimum(tl.cdiv(start + OWN - 1, OTHER), tl.cdiv(end, OTHER)) * OTHER
    whole_end = tl.maximum(tl.load(last + start) // OTHER * OTHER, whole_begin)
    return begin, whole_begin, whole_end, end


@triton.jit
def _turns(begin, whole_begin, whole_end, end, MASKED: tl.constexpr):
    """From where to where a loop goes over the blocks that are not masked, or over those on both sides of them."""
    if MASKED:
        return begin, end - (whole_end - whole_begin)
    return whole_begin, whole_end


@triton.jit
def _place(turn, whole_begin, whole_end, MASKED: tl.constexpr):
    """Where the block of a turn begins."""
    if MASKED:
        return turn + tl.where(turn < whole_begin, 0, whole_end - whole_begin)
    return turn


@triton.jit(do_not_specialize=["total", "heads", "groups"])
def _forward(
    query,
    key,
    value,
    first,
    out,
    logs,
    total,
    width,
    heads,
    groups,
    squash,
    height,
    FEATURES: tl.constexpr,
    EVEN: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    head = tl.program_id(0) % heads
    start = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * OWN  # those that see most keys come first
    row = start + tl.arange(0, OWN)
    of_group = head // (heads // groups) * width
    q = _rows(query + head * width, start, heads * width, total, width, OWN, FEATURES, EVEN)
    lowest = tl.load(first + row, row < total, 0)
    sums = tl.zeros([OWN], tl.float32)
    result = tl.zeros([OWN, FEATURES], tl.float32)
    begin, whole_begin, whole_end, end = _keys_of(first, start, total, OWN, OTHER)
    for MASKED in tl.static_range(2):
        turn_begin, turn_end = _turns(begin, whole_begin, whole_end, end, MASKED)
        for turn in tl.range(turn_begin, turn_end, OTHER):
            place = _place(turn, whole_begin, whole_end, MASKED)
            k = _rows(key + of_group, place, groups * width, total, width, OTHER, FEATURES, EVEN, MASKED)
            v = _rows(value + of_group, place, groups * width, total, width, OTHER, FEATURES, EVEN, MASKED)
            share = tl.exp2(_capped(q, k, squash, APPROXIMATE) * height)
            if MASKED:
                column = place + tl.arange(0, OTHER)
                share = tl.where((column >= lowest[:, None]) & (column <= row[:, None]), share, 0.0)
            sums += tl.sum(share, 1)
            result = tl.dot(share.to(v.dtype), v, result, input_precision="ieee")
    _store(out + head * width, result / sums[:, None], start, heads * width, total, width, OWN, FEATURES, EVEN)
    tl.store(logs + head * total + row, tl.log2(sums), row < total)


@triton.jit(do_not_specialize=["total", "heads"])
def _row_products(
    one, other, products, total, width, heads, FEATURES: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr
):
    """The product of each row of [t, heads, d] with the same of another, [heads, t]."""
    head = tl.program_id(0) % heads
    start = tl.program_id(0) // heads * ROWS
    row = start + tl.arange(0, ROWS)
    x = _rows(one + head * width, start, heads * width, total, width, ROWS, FEATURES, EVEN)
    y = _rows(other + head * width, start, heads * width, total, width, ROWS, FEATURES, EVEN)
    tl.store(products + head * total + row, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), row < total)


@triton.jit(do_not_specialize=["total", "heads", "groups"])
def _backward_queries(
    query,
    key,
    value,
    first,
    upstream,
    logs,
    products,
    gradient,
    total,
    width,
    heads,
    groups,
    squash,
    height,
    scale,
    FEATURES: tl.constexpr,
    EVEN: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    head = tl.program_id(0) % heads
    start = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * OWN
    row = start + tl.arange(0, OWN)
    of_group = head // (heads // groups) * width
    q = _rows(query + head * width, start, heads * width, total, width, OWN, FEATURES, EVEN)
    u = _rows(upstream + head * width, start, heads * width, total, width, OWN, FEATURES, EVEN)
    lowest = tl.load(first + row, row < total, 0)
    log = tl.load(logs + head * total + row, row < total, 0.0)
    product = tl.load(products + head * total + row, row < total, 0.0)
    result = tl.zeros([OWN, FEATURES], tl.float32)
    begin, whole_begin, whole_end, end = _keys_of(first, start, total, OWN, OTHER)
    for MASKED in tl.static_range(2):
        turn_begin, turn_end = _turns(begin, whole_begin, whole_end, end, MASKED)
        for turn in tl.range(turn_begin, turn_end, OTHER):
            place = _place(turn, whole_begin, whole_end, MASKED)
            k = _rows(key + of_group, place, groups * width, total, width, OTHER, FEATURES, EVEN, MASKED)
            v = _rows(value + of_group, place, groups * width, total, width, OTHER, FEATURES, EVEN, MASKED)
            capped = _capped(q, k, squash, APPROXIMATE)
            slope = tl.dot(u, tl.trans(v), input_precision="ieee") - product[:, None]
            share = tl.exp2(capped * height - log[:, None])
            if MASKED:
                column = place + tl.arange(0, OTHER)
                share = tl.where((column >= lowest[:, None]) & (column <= row[:, None]), share, 0.0)
            slope *= share * (1.0 - capped * capped)
            result = tl.dot(slope.to(k.dtype), k, result, input_precision="ieee")
    _store(gradient + head * width, result * scale, start, heads * width, total, width, OWN, FEATURES, EVEN)


@triton.jit(do_not_specialize=["total", "heads", "groups"])
def _backward_keys_values(
    query,
    key,
    value,
    first,
    last,
    upstream,
    logs,
    products,
    key_gradient,
    value_gradient,
    total,
    width,
    heads,
    groups,
    squash,
    height,
    scale,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    FEATURES: tl.constexpr,
    EVEN: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    head = tl.program_id(0) % heads
    start = tl.program_id(0) // heads * OWN  # those that are seen by most queries come first
    column = start + tl.arange(0, OWN)
    stride = heads * width
    of_group = head // (heads // groups) * width
    k = _rows(key + of_group, start, groups * width, total, width, OWN, FEATURES, EVEN)
    if KEYS:
        v = _rows(value + of_group, start, groups * width, total, width, OWN, FEATURES, EVEN)
    of_key = tl.zeros([OWN, FEATURES], tl.float32)
    of_value = tl.zeros([OWN, FEATURES], tl.float32)
    begin, whole_begin, whole_end, end = _queries_of(last, start, total, OWN, OTHER)
    for MASKED in tl.static_range(2):
        turn_begin, turn_end = _turns(begin, whole_begin, whole_end, end, MASKED)
        for turn in tl.range(turn_begin, turn_end, OTHER):
            place = _place(turn, whole_begin, whole_end, MASKED)
            row = place + tl.arange(0, OTHER)
            here = row < total
            q = _rows(query + head * width, place, stride, total, width, OTHER, FEATURES, EVEN, MASKED)
            u = _rows(upstream + head * width, place, stride, total, width, OTHER, FEATURES, EVEN, MASKED)
            capped = _capped(k, q, squash, APPROXIMATE)
            share = tl.exp2(capped * height - tl.load(logs + head * total + row, here, 0.0)[None, :])
            if MASKED:
                lowest = tl.load(first + row, here, total)  # a query that does not exist sees no key
                share = tl.where((column[:, None] >= lowest) & (column[:, None] <= row), share, 0.0)
            if VALUES:
                of_value = tl.dot(share.to(u.dtype), u, of_value, input_precision="ieee")
            if KEYS:
                slope = tl.dot(v, tl.trans(u), input_precision="ieee")
                slope -= tl.load(products + head * total + row, here, 0.0)[None, :]
                slope *= share * (1.0 - capped * capped)
                of_key = tl.dot(slope.to(q.dtype), q, of_key, input_precision="ieee")
    if KEYS:
        _store(key_gradient + head * width, of_key * scale, start, stride, total, width, OWN, FEATURES, EVEN)
    if VALUES:
        _store(value_gradient + head * width, of_value, start, stride, total, width, OWN, FEATURES, EVEN)


def choose(states: torch.Tensor) -> Choice:
    """Tiles for heads of at most 256 features in this number format on this GPU."""
    width, size = states.size(-1), states.element_size()
    if size == 2 and states.is_cuda and torch.cuda.get_device_capability(states.device) == (9, 0):
        return WIDE_HEADS if width > 128 else NARROW_HEADS
    least = small_tiles(size)
    return Choice(least, least, least, least)


def small_tiles(size: int) -> Tiles:
    """For numbers of `size` bytes on any GPU that Triton compiles for: a program has 99 KB of shared memory or more."""
    side = max(16, 64 // size)
    return Tiles(side, side, warps=4, stages=1)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: torch.Tensor, softcap: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(softcap tanh(QK^T scale / softcap)) V over the keys that each query sees.

    Args:
        query: [t, heads, d]; key, value: [t, groups, d]; contiguous.
        first: int32[t], the first key that each query sees; non-decreasing.

    Returns:
        [t, heads, d], and float32[heads, t]: the logarithms to base 2 of what each row was divided by.
    """
    total, heads, width = query.shape
    out = torch.empty_like(query)
    logs = query.new_empty(heads, total, dtype=torch.float32)
    tiles = choose(query).forward
    _forward[(triton.cdiv(total, tiles.own) * heads,)](
        query,
        key,
        value,
        first,
        out,
        logs,
        total,
        width,
        heads,
        key.size(1),
        scale / softcap,
        softcap * LOG2_E,
        **_options(query, tiles),
    )
    return out, logs


def backward(
    upstream: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logs: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    softcap: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value.

    Args:
        upstream: of the output, [t, heads, d], contiguous as all are.
        query, key, value, first, softcap, scale: see `forward`; out, logs: what it gave.
        last: int32[t], the end of the queries that see each key.
    """
    total, heads, width = query.shape
    groups = key.size(1)
    choice = choose(query)
    products = torch.empty_like(logs)
    _row_products[(triton.cdiv(total, PRODUCT_ROWS) * heads,)](
        out,
        upstream,
        products,
        total,
        width,
        heads,
        FEATURES=_padded(width),
        EVEN=_padded(width) == width,
        ROWS=PRODUCT_ROWS,
    )
    sizes = (total, width, heads, groups, scale / softcap, softcap * LOG2_E, scale)
    of_query = torch.empty_like(query)
    _backward_queries[(triton.cdiv(total, choice.queries.own) * heads,)](
        query, key, value, first, upstream, logs, products, of_query, *sizes, **_options(query, choice.queries)
    )
    of_key, of_value = torch.empty_like(query), torch.empty_like(query)  # for each of a group's heads
    for keys, values, tiles in _kernels(choice):
        _backward_keys_values[(triton.cdiv(total, tiles.own) * heads,)](
            query,
            key,
            value,
            first,
            last,
            upstream,
            logs,
            products,
            of_key,
            of_value,
            *sizes,
            KEYS=keys,
            VALUES=values,
            **_options(query, tiles),
        )
    return of_query, _sum_of_group(of_key, groups), _sum_of_group(of_value, groups)


def _kernels(choice: Choice) -> list[tuple[bool, bool, Tiles]]:
    """Whether a kernel is of keys, and of values, and its tiles."""
    if choice.keys == choice.values:
        return [(True, True, choice.keys)]
    return [(False, True, choice.values), (True, False, choice.keys)]


def _sum_of_group(gradient: torch.Tensor, groups: int) -> torch.Tensor:
    """[t, heads, d] -> [t, groups, d]."""
    if gradient.size(1) == groups:
        return gradient
    return gradient.unflatten(1, (groups, -1)).sum(2)


def _options(states: torch.Tensor, tiles: Tiles) -> dict[str, int | bool]:
    """What a kernel is compiled for."""
    width = states.size(-1)
    return {
        "FEATURES": _padded(width),
        "EVEN": _padded(width) == width,
        "APPROXIMATE": states.element_size() == 2 and states.is_cuda,  # their own rounding is coarser
        "OWN": tiles.own,
        "OTHER": tiles.other,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _padded(width: int) -> int:
    """Tensor cores multiply at least 16 by 16."""
    return max(16, triton.next_power_of_2(width))
