"""Triton kernels that take queries, keys and values out of a layer's joint output. Import it only where there is a GPU.

A row of the joint output has, for each group, its queries' heads, its key and its value. Arithmetic is in fp32, rounded
once.
"""

import torch
import triton
import triton.language as tl

HEADS = 16  # of a program


@triton.jit
def _load(first, columns, width, inside):
    """Numbers [heads, columns] of heads that begin at `first`."""
    return tl.load(first[:, None] + columns[None, :], inside[:, None] & (columns < width)[None, :], 0).to(tl.float32)


@triton.jit
def _gamma(query_gamma, key_gamma, columns, end, is_query):
    """Norm weights [heads, columns]."""
    of_query = tl.load(query_gamma + columns, columns < end, 0).to(tl.float32)
    of_key = tl.load(key_gamma + columns, columns < end, 0).to(tl.float32)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :])


@triton.jit
def _place(head, heads, token, PER: tl.constexpr, WIDTH: tl.constexpr):
    """Which part of its group a head is, and where it begins among the queries and among the keys or values."""
    group = head // (PER + 2)
    part = head % (PER + 2)
    groups = heads // (PER + 2)
    query = (token * groups * PER + group * PER + part) * WIDTH
    key = (token * groups + group) * WIDTH
    return part, query, key


@triton.jit
def _rotate(
    mixed,
    query,
    key,
    value,
    cos,
    sin,
    query_gamma,
    key_gamma,
    eps,
    heads,
    PER: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < heads
    part, query_at, key_at = _place(head, heads, token, PER, WIDTH)
    is_query = part < PER
    turns = part <= PER
    half: tl.constexpr = ROTATED // 2
    first = mixed + (token * heads + head) * WIDTH
    column = tl.arange(0, HALF)
    rest = ROTATED + tl.arange(0, REST)
    a = _load(first, column, half, inside)
    b = _load(first + half, column, half, inside)
    if ROTATED < WIDTH:
        c = _load(first, rest, WIDTH, inside)
    if NORM:
        total = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if ROTATED < WIDTH:
            total += tl.sum(c * c, 1)
        scale = tl.rsqrt(total / WIDTH + eps)[:, None]
        a = tl.where(turns[:, None], a * scale * _gamma(query_gamma, key_gamma, column, half, is_query), a)
        b_gamma = _gamma(query_gamma, key_gamma, half + column, ROTATED, is_query)
        b = tl.where(turns[:, None], b * scale * b_gamma, b)
        if ROTATED < WIDTH:
            c = tl.where(turns[:, None], c * scale * _gamma(query_gamma, key_gamma, rest, WIDTH, is_query), c)
    cosine = tl.load(cos + token * half + column, column < half, 0)[None, :]
    sine = tl.load(sin + token * half + column, column < half, 0)[None, :]
    turned_a = tl.where(turns[:, None], a * cosine - b * sine, a)
    turned_b = tl.where(turns[:, None], b * cosine + a * sine, b)
    for kind in tl.static_range(3):
        if kind == 0:
            target = query + query_at
            chosen = inside & is_query
        elif kind == 1:
            target = key + key_at
            chosen = inside & (part == PER)
        else:
            target = value + key_at
            chosen = inside & (part > PER)
        stored = chosen[:, None] & (column < half)[None, :]
        tl.store(target[:, None] + column[None, :], turned_a, stored)
        tl.store(target[:, None] + half + column[None, :], turned_b, stored)
        if ROTATED < WIDTH:
            tl.store(target[:, None] + rest[None, :], c, chosen[:, None] & (rest < WIDTH)[None, :])


@triton.jit
def _load_of(query, query_at, key, key_at, value, part, columns, width, inside, PER: tl.constexpr):
    """Gradients [heads, columns] of each head, from the tensor that it went to."""
    of_query = _load(query + query_at, columns, width, inside & (part < PER))
    of_key = _load(key + key_at, columns, width, inside & (part == PER))
    of_value = _load(value + key_at, columns, width, inside & (part > PER))
    return of_query + of_key + of_value  # of which two are 0


@triton.jit
def _rotate_backward(
    query,
    key,
    value,
    mixed,
    out,
    cos,
    sin,
    query_gamma,
    key_gamma,
    eps,
    heads,
    PER: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < heads
    part, query_at, key_at = _place(head, heads, token, PER, WIDTH)
    is_query = part < PER
    turns = (part <= PER)[:, None]
    half: tl.constexpr = ROTATED // 2
    first = (token * heads + head) * WIDTH
    column = tl.arange(0, HALF)
    rest = ROTATED + tl.arange(0, REST)
    grad_a = _load_of(query, query_at, key, key_at, value, part, column, half, inside, PER)
    grad_b = _load_of(query + half, query_at, key + half, key_at, value + half, part, column, half, inside, PER)
    cosine = tl.load(cos + token * half + column, column < half, 0)[None, :]
    sine = tl.load(sin + token * half + column, column < half, 0)[None, :]
    a = tl.where(turns, grad_a * cosine + grad_b * sine, grad_a)
    b = tl.where(turns, grad_b * cosine - grad_a * sine, grad_b)
    if ROTATED < WIDTH:
        c = _load_of(query, query_at, key, key_at, value, part, rest, WIDTH, inside, PER)
    if NORM:
        x_a = _load(mixed + first, column, half, inside)
        x_b = _load(mixed + first + half, column, half, inside)
        normed_a = a * _gamma(query_gamma, key_gamma, column, half, is_query)
        normed_b = b * _gamma(query_gamma, key_gamma, half + column, ROTATED, is_query)
        squares = tl.sum(x_a * x_a, 1) + tl.sum(x_b * x_b, 1)
        products = tl.sum(x_a * normed_a, 1) + tl.sum(x_b * normed_b, 1)
        if ROTATED < WIDTH:
            x_c = _load(mixed + first, rest, WIDTH, inside)
            normed_c = c * _gamma(query_gamma, key_gamma, rest, WIDTH, is_query)
            squares += tl.sum(x_c * x_c, 1)
            products += tl.sum(x_c * normed_c, 1)
        scale = tl.rsqrt(squares / WIDTH + eps)
        share = (products * scale * scale / WIDTH)[:, None]
        scale = scale[:, None]
        a = tl.where(turns, scale * (normed_a - x_a * share), a)
        b = tl.where(turns, scale * (normed_b - x_b * share), b)
        if ROTATED < WIDTH:
            c = tl.where(turns, scale * (normed_c - x_c * share), c)
    stored = inside[:, None] & (column < half)[None, :]
    tl.store(out + first[:, None] + column[None, :], a, stored)
    tl.store(out + first[:, None] + half + column[None, :], b, stored)
    if ROTATED < WIDTH:
        tl.store(out + first[:, None] + rest[None, :], c, inside[:, None] & (rest < WIDTH)[None, :])


def _blocks(width: int, rotated: int) -> dict[str, int]:
    """Powers of two for half of the rotated features, and for those that are not."""
    return {
        "WIDTH": width,
        "ROTATED": rotated,
        "HALF": triton.next_power_of_2(rotated // 2),
        "REST": triton.next_power_of_2(max(1, width - rotated)),
        "HEADS": HEADS,
    }


def split_and_rotate(
    mixed: torch.Tensor,
    groups: int,
    width: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    gammas: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [t, heads, d], keys and values [t, groups, d]; see posttrain.ops.query_key_value."""
    tokens = mixed.size(0)
    heads = mixed.size(1) // width
    per = heads // groups - 2
    query = mixed.new_empty(tokens, groups * per, width)
    key, value = (mixed.new_empty(tokens, groups, width) for _ in range(2))
    of_query, of_key = gammas or (cos, cos)
    grid = (tokens, triton.cdiv(heads, HEADS))
    _rotate[grid](
        mixed,
        query,
        key,
        value,
        cos,
        sin,
        of_query,
        of_key,
        eps,
        heads,
        PER=per,
        NORM=gammas is not None,
        **_blocks(width, 2 * cos.size(1)),
    )
    return query, key, value


def split_and_rotate_backward(
    upstream: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mixed: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    gammas: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """Gradient [t, (heads + 2 groups) d] of `mixed`, which is needed with norms alone."""
    query, key, value = (gradient.contiguous() for gradient in upstream)
    tokens, groups, width = key.shape
    per = query.size(1) // groups
    heads = groups * (per + 2)
    out = query.new_empty(tokens, heads * width)
    of_query, of_key = gammas or (cos, cos)
    grid = (tokens, triton.cdiv(heads, HEADS))
    _rotate_backward[grid](
        query,
        key,
        value,
        query if mixed is None else mixed,
        out,
        cos,
        sin,
        of_query,
        of_key,
        eps,
        heads,
        PER=per,
        NORM=gammas is not None,
        **_blocks(width, 2 * cos.size(1)),
    )
    return out
