"""Weights stored in fewer than 16 bits a number, decoded when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

PIECE = 1 << 20
"""Numbers decoded at a time: few enough for the cache, and enough to share among threads."""


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A weight of `shape`, as codes with one row for each of the weight's rows.

    It has what layers use of a weight: `shape`, `numel`, `to`, `device`, and rows by a slice or by
    their numbers.

    codes: in any dtype, [rows, …]. decode: takes rows of codes and returns their numbers, float32,
    [rows, numbers]. scale: what the numbers are multiplied by: None, one number, or [rows, 1].
    """

    codes: Tensor
    decode: Callable[[Tensor], Tensor]
    shape: torch.Size
    scale: Tensor | None = None

    def __getitem__(self, rows: slice) -> Quantised:
        scale = self.scale
        if scale is not None and scale.dim():
            scale = scale[rows]
        codes = self.codes[rows]
        return Quantised(codes, self.decode, torch.Size((len(codes), *self.shape[1:])), scale)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.codes.device

    def rows(self, numbers: Tensor) -> Tensor:
        """Return the rows of these numbers in float32, [*numbers.shape, *shape[1:]]."""
        flat = numbers.reshape(-1)
        raw = self.codes.view(torch.uint8) if self.codes.dtype.itemsize == 1 else self.codes
        found = self.decode(raw[flat].view(self.codes.dtype))
        if self.scale is not None:
            found = found * (self.scale[flat] if self.scale.dim() else self.scale)
        return found.view(*numbers.shape, *self.shape[1:])

    def numel(self) -> int:
        return self.shape.numel()

    def pieces(self) -> Iterator[Tensor]:
        """Yield the numbers in float32, [rows, numbers], some rows at a time."""
        count = len(self.codes)
        step = max(1, PIECE * count // self.numel())
        for start in range(0, count, step):
            piece = self[start : start + step]
            numbers = self.decode(piece.codes)
            yield numbers if piece.scale is None else numbers * piece.scale

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers in `dtype`."""
        count, start = len(self.codes), 0
        out = torch.empty(count, self.numel() // count, dtype=dtype)
        for piece in self.pieces():
            out[start : start + len(piece)] = piece
            start += len(piece)
        return out.view(self.shape)


def joined(pieces: Sequence[Quantised]) -> Quantised:
    """Return the rows of weights of one kind, one after the other."""
    first = pieces[0]
    if len(pieces) == 1:
        return first  # in the mapped file
    codes, scale = torch.cat([piece.codes for piece in pieces]), first.scale
    if scale is not None and scale.dim():
        scale = torch.cat([piece.scale for piece in pieces if piece.scale is not None])
    return Quantised(codes, first.decode, torch.Size((len(codes), *first.shape[1:])), scale)


def of_floats(codes: Tensor, scale: Tensor | None = None) -> Quantised:
    """Return a weight whose codes are floats, such as float8.

    scale: what they are multiplied by: one number, or one for each row; None: 1.
    """
    if scale is not None:
        scale = scale.float().reshape(() if scale.numel() == 1 else (-1, 1))
    return Quantised(codes, _decode_floats, codes.shape, scale)


def _decode_floats(rows: Tensor) -> Tensor:
    """Return the numbers of rows of floats, float32, [rows, numbers]."""
    if rows.dtype.itemsize > 1:
        return rows.float().reshape(len(rows), -1)
    # A table is four times as fast as PyTorch's conversion.
    codes = rows.reshape(-1).view(torch.uint8).int()
    return _table(rows.dtype).index_select(0, codes).view(len(rows), -1)


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """Return the numbers of all codes of a type of 8 bits."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a type of ggml stores numbers: so many in a block of so many bytes.

    decode: takes blocks, uint8 [count, size], and returns their numbers, float32 [count, numbers].
    """

    numbers: int
    size: int
    decode: Callable[[Tensor], Tensor]


def of_ggml(codes: Tensor, kind: str, shape: Sequence[int]) -> Quantised:
    """Return a weight of a type in `GGML`. codes: uint8, its blocks one after the other.

    A row of the weight is a whole number of blocks.
    """
    blocks = GGML[kind]

    def decode(rows: Tensor) -> Tensor:
        return blocks.decode(rows.reshape(-1, blocks.size)).view(len(rows), -1)

    rows = shape[0] if len(shape) > 1 else 1
    return Quantised(codes.reshape(rows, -1), decode, torch.Size(shape))


def _half(codes: Tensor) -> Tensor:
    """Return float16 numbers, two bytes each, in float32."""
    return codes.contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """Return the low four bits of all bytes of the last axis, then the high four."""
    return torch.cat([codes & 15, codes >> 4], dim=-1)


def _bits(codes: Tensor, width: int) -> Tensor:
    """Return [count, 8 // width, bytes]: the lowest `width` bits of all bytes, then the next."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
    return (codes[:, None] >> shifts) & (2**width - 1)


def _fifths(codes: Tensor) -> Tensor:
    """Return 32 bits, those of four bytes, as 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((codes[..., None] >> shifts) & 1).flatten(-2) << 4


def _q4_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).float() + _half(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * ((_nibbles(b[:, 6:]) | _fifths(b[:, 2:6])).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    values = (_nibbles(b[:, 8:]) | _fifths(b[:, 4:8])).float()
    return _half(b[:, :2]) * values + _half(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * b[:, 2:].view(torch.int8).float()


def _spread(factors: Tensor, values: Tensor) -> Tensor:
    """Return values, [count, numbers], times factors, [count, groups], group by group."""
    return (values.unflatten(1, (factors.shape[1], -1)).float() * factors[..., None]).flatten(1)


def _quarters(codes: Tensor) -> Tensor:
    """Return 256 values of two bits from 64 bytes: of each 32 bytes the lowest bits first."""
    return torch.cat([_bits(half, 2).flatten(1) for half in codes.chunk(2, dim=1)], dim=1)


def _q2_k(b: Tensor) -> Tensor:
    d, least = _half(b[:, 80:82]), _half(b[:, 82:84])
    values = _spread(d * (b[:, :16] & 15).float(), _quarters(b[:, 16:80]))
    lower = least * (b[:, :16] >> 4).float()
    return (values.unflatten(1, (16, 16)) - lower[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    high = _bits(b[:, :32], 1).flatten(1)
    low, scales = _quarters(b[:, 32:96]), b[:, 96:108]
    # The lowest four bits of 16 scales in eight bytes, the highest two in four.
    factors = _nibbles(scales[:, :8]) | (_bits(scales[:, 8:], 2).flatten(1) << 4)
    values = low.float() + high.float() * 4 - 4
    return _spread(_half(b[:, 108:110]) * (factors.float() - 32), values)


def _scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors and the minima, [count, 8] each, of a block of Q4_K or Q5_K."""
    d, least, packed = _half(b[:, :2]), _half(b[:, 2:4]), b[:, 4:16]
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    factors = torch.cat([first & 63, (rest & 15) | ((first >> 6) << 4)], dim=1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 6) << 4)], dim=1)
    return d * factors.float(), least * minima.float()


def _q4_k(b: Tensor) -> Tensor:
    factors, minima = _scales(b)
    values = _nibbles(b[:, 16:].unflatten(1, (4, 32))).flatten(1)
    return _lowered(_spread(factors, values), minima)


def _q5_k(b: Tensor) -> Tensor:
    factors, minima = _scales(b)
    low = _nibbles(b[:, 48:].unflatten(1, (4, 32))).flatten(1)
    return _lowered(_spread(factors, low | (_bits(b[:, 16:48], 1).flatten(1) << 4)), minima)


def _lowered(values: Tensor, minima: Tensor) -> Tensor:
    """Return values less the minimum of their group."""
    return (values.unflatten(1, (minima.shape[1], -1)) - minima[..., None]).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, :128].unflatten(1, (2, 64))).flatten(1)
    values = low | (_quarters(b[:, 128:192]) << 4)
    factors = _half(b[:, 208:210]) * b[:, 192:208].view(torch.int8).float()
    return _spread(factors, values.float() - 32)


_CURVE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of a code of IQ4, which are denser near 0."""


def _curved(codes: Tensor) -> Tensor:
    return torch.tensor(_CURVE, dtype=torch.float32)[_nibbles(codes).int()]


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _curved(b[:, 2:])


def _iq4_xs(b: Tensor) -> Tensor:
    high = _bits(b[:, 2:4], 2).transpose(1, 2).flatten(1)
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], dim=2).flatten(1)
    factors = _half(b[:, :2]) * ((low | (high << 4)).float() - 32)
    return _spread(factors, _curved(b[:, 8:].unflatten(1, (8, 16))).flatten(1))


GGML = {
    "Q4_0": Blocks(32, 18, _q4_0),
    "Q4_1": Blocks(32, 20, _q4_1),
    "Q5_0": Blocks(32, 22, _q5_0),
    "Q5_1": Blocks(32, 24, _q5_1),
    "Q8_0": Blocks(32, 34, _q8_0),
    "Q2_K": Blocks(256, 84, _q2_k),
    "Q3_K": Blocks(256, 110, _q3_k),
    "Q4_K": Blocks(256, 144, _q4_k),
    "Q5_K": Blocks(256, 176, _q5_k),
    "Q6_K": Blocks(256, 210, _q6_k),
    "IQ4_NL": Blocks(32, 18, _iq4_nl),
    "IQ4_XS": Blocks(256, 136, _iq4_xs),
}
"""Types by their names. Layouts: github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h."""
