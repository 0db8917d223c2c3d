"""What each kind of adapter does to a weight: one small class for each kind.

Formulas: LoRA arXiv:2106.09685; LoHa arXiv:2108.06098; LoKr arXiv:2309.14859 (LyCORIS, which also
has LoCon, Tucker's form and IA³ for pictures); DoRA arXiv:2402.09353; GLoRA arXiv:2306.07967;
OFT arXiv:2306.07280; BOFT arXiv:2311.06243; IA³ arXiv:2205.05638.

All tensors are float32. `out`, `inner` and the sides of a convolution are those of the layer's
weight [out, inner, …]; r is the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = Mapping[str, Tensor]


class UnfitError(Exception):
    """A tensor of an adapter does not fit. slot: which; why: in words, with what would fit."""

    def __init__(self, slot: str, why: str) -> None:
        super().__init__(why)
        self.slot, self.why = slot, why


class Algorithm:
    """A kind of adapter. It is never instantiated.

    title: its name for people. needs: the tensors that it consists of; optional: those that it
    may have besides. dora: whether a `dora_scale` may follow it.
    """

    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    dora: ClassVar[bool] = False

    @classmethod
    def check(cls, shapes: Shapes, layer: Shape) -> None:
        """Raise UnfitError unless tensors of these shapes fit a weight of the shape `layer`."""
        raise NotImplementedError

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        """Return what `alpha` is divided by; None if it does not count."""
        return None

    @classmethod
    def delta(cls, found: Tensors, weight: Tensor) -> Tensor:
        """Return what is added to a weight at strength 1 and scale 1, in its shape."""
        raise NotImplementedError

    @classmethod
    def apply(cls, found: Tensors, weight: Tensor, scale: float, strength: float) -> Tensor:
        """Return the changed weight; `weight` itself may be overwritten.

        scale: alpha / rank, or 1.
        """
        delta = cls.delta(found, weight)
        if "dora_scale" not in found:
            return weight.add_(delta, alpha=scale * strength)
        # DoRA: the direction is W + Δ, the length of each row or column is given.
        full = decomposed(weight.add(delta, alpha=scale), found["dora_scale"])
        return full if strength == 1 else weight.lerp_(full, strength)


class LoRA(Algorithm):
    """ΔW = up·down. With `mid`, Tucker's form of a convolution: up·mid·down."""

    title = "LoRA"
    needs, optional, dora = ("up", "down"), ("mid",), True

    @classmethod
    def check(cls, shapes: Shapes, layer: Shape) -> None:
        up, down = shapes["up"], shapes["down"]
        rank = down[0] if down else 0
        inner = layer[1:2] if "mid" in shapes else layer[1:]
        _expect(shapes, "down", (rank, *inner))
        upper = rank
        if "mid" in shapes:
            upper = up[1] if len(up) > 1 else 0
            _expect(shapes, "mid", (upper, rank, *layer[2:]))
        _expect(shapes, "up", (layer[0], upper))

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        return shapes["down"][0]

    @classmethod
    def delta(cls, found: Tensors, weight: Tensor) -> Tensor:
        up, down = found["up"].flatten(1), found["down"].flatten(1)
        if "mid" in found:
            return _tucker(found["mid"], up.T, down, weight)
        return (up @ down).view(weight.shape)

    @classmethod
    def apply(cls, found: Tensors, weight: Tensor, scale: float, strength: float) -> Tensor:
        if found.keys() & {"mid", "dora_scale"}:
            return super().apply(found, weight, scale, strength)
        # One pass over the weight: passes over it take most of a merge's time.
        up, down = found["up"].flatten(1), found["down"].flatten(1)
        weight.view(weight.shape[0], -1).addmm_(up, down, alpha=scale * strength)
        return weight


class LoHa(Algorithm):
    """ΔW = (w1_a·w1_b) ∘ (w2_a·w2_b). With `t1` and `t2`, each factor in Tucker's form."""

    title = "LoHa"
    needs, optional, dora = ("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2"), True

    @classmethod
    def check(cls, shapes: Shapes, layer: Shape) -> None:
        for n in "12":
            a, b, t = f"w{n}_a", f"w{n}_b", f"t{n}"
            rank = shapes[b][0] if shapes[b] else 0
            if t not in shapes:
                _expect(shapes, a, (layer[0], rank))
                _expect(shapes, b, (rank, *layer[1:]))
                continue
            upper = shapes[a][0] if shapes[a] else 0
            _expect(shapes, a, (upper, layer[0]))
            _expect(shapes, b, (rank, layer[1]))
            _expect(shapes, t, (upper, rank, *layer[2:]))

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        return shapes["w1_b"][0]

    @classmethod
    def delta(cls, found: Tensors, weight: Tensor) -> Tensor:
        factors: list[Tensor] = []
        for n in "12":
            a, b = found[f"w{n}_a"].flatten(1), found[f"w{n}_b"].flatten(1)
            t = found.get(f"t{n}")
            factors.append((a @ b).view(weight.shape) if t is None else _tucker(t, a, b, weight))
        return factors[0] * factors[1]


class LoKr(Algorithm):
    """ΔW = w1 ⊗ w2, Kronecker's product. Each factor is whole, or of low rank; `t2` is Tucker's."""

    title = "LoKr"
    needs = ()  # `check` decides by those that are there
    optional = ("kr1", "kr1_a", "kr1_b", "kr2", "kr2_a", "kr2_b", "kr_t2")
    dora = True

    @classmethod
    def check(cls, shapes: Shapes, layer: Shape) -> None:
        first, second = cls._factor(shapes, "kr1"), cls._factor(shapes, "kr2")
        size = math.prod(layer)
        sides = second[2:] in ((), layer[2:]) and len(first) == 2
        if first[0] * second[0] != layer[0] or math.prod((*first, *second)) != size or not sides:
            raise UnfitError(
                next(slot for slot in ("kr2", "kr2_b") if slot in shapes),
                f"{first} ⊗ {second} does not make {layer}",
            )

    @classmethod
    def _factor(cls, shapes: Shapes, name: str) -> Shape:
        """Return the shape of a factor, after a check that its parts fit one another."""
        a, b = f"{name}_a", f"{name}_b"
        if name in shapes and not {a, b} & shapes.keys():
            if len(shapes[name]) < 2:
                raise UnfitError(name, f"has the shape {shapes[name]}; a matrix is needed")
            return shapes[name]
        if name in shapes or not {a, b} <= shapes.keys():
            there = next(slot for slot in cls.optional if slot in shapes)
            raise UnfitError(there, f"{name.replace('kr', 'lokr_w')} must be whole or of two parts")
        if name == "kr2" and "kr_t2" in shapes:
            left, right, t = shapes[a], shapes[b], shapes["kr_t2"]
            if len(t) < 3 or len(left) != 2 or len(right) != 2 or t[:2] != (left[0], right[0]):
                raise UnfitError("kr_t2", f"{t} does not fit {left} and {right}")
            return (left[1], right[1], *t[2:])
        left, right = shapes[a], shapes[b]
        if len(left) != 2 or len(right) < 2 or left[1] != right[0]:
            raise UnfitError(b, f"{right} does not fit {left}: two matrices of one rank are needed")
        return (left[0], math.prod(right[1:]))

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        low = [slot for slot in ("kr2_b", "kr1_b") if slot in shapes]
        return shapes[low[0]][0] if low else None

    @classmethod
    def delta(cls, found: Tensors, weight: Tensor) -> Tensor:
        first = found["kr1"] if "kr1" in found else found["kr1_a"] @ found["kr1_b"].flatten(1)
        if "kr2" in found:
            second = found["kr2"]
        elif "kr_t2" in found:
            core = found["kr_t2"]
            second = torch.einsum(
                "i j ..., i p, j r -> p r ...", core, found["kr2_a"], found["kr2_b"]
            )
        else:
            second = found["kr2_a"] @ found["kr2_b"].flatten(1)
        first = first.reshape(*first.shape, *[1] * (second.dim() - first.dim()))
        return torch.kron(first, second.contiguous()).view(weight.shape)


class GLoRA(Algorithm):
    """ΔW = W·a1·a2 + b1·b2; files from before LyCORIS 2 have W·a2·a1 + b2·b1."""

    title = "GLoRA"
    needs, dora = ("a1", "a2", "b1", "b2"), True

    @classmethod
    def check(cls, shapes: Shapes, layer: Shape) -> None:
        first = "a2", "a1", "b2", "b1"
        wide_a, thin_a, wide_b, thin_b = first if cls._is_old(shapes) else cls.needs
        ranks = [shapes[thin][0] if shapes[thin] else 0 for thin in (thin_a, thin_b)]
        _expect(shapes, wide_a, (layer[1], ranks[0]))
        _expect(shapes, thin_a, (ranks[0], layer[1]))
        _expect(shapes, wide_b, (layer[0], ranks[1]))
        _expect(shapes, thin_b, (ranks[1], *layer[1:]))

    @classmethod
    def _is_old(cls, shapes: Shapes) -> bool:
        """Return whether the first factors are the narrow ones, as in old files.

        Square factors do not show their order, and are read as in new files.
        """
        return any(
            shapes[one][0] < math.prod(shapes[one][1:]) for one in ("a1", "b1") if shapes[one]
        )

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        return shapes["a1" if cls._is_old(shapes) else "a2"][0]

    @classmethod
    def delta(cls, found: Tensors, weight: Tensor) -> Tensor:
        a1, a2, b1, b2 = (found[slot].flatten(1) for slot in cls.needs)
        if cls._is_old({slot: tuple(found[slot].shape) for slot in cls.needs}):
            a1, a2, b1, b2 = a2, a1, b2, b1
        product = torch.einsum("o i ..., i r, r j -> o j ...", weight, a1, a2)
        return product + (b1 @ b2).view(weight.shape)


class Full(Algorithm):
    """ΔW itself is in the file, for the weight or bias of a layer or a norm."""

    title = "full difference"
    needs = ("diff",)

    @classmethod
    def check(cls, shapes: Shapes, layer: Shape) -> None:
        _expect(shapes, "diff", layer)

    @classmethod
    def delta(cls, found: Tensors, weight: Tensor) -> Tensor:
        return found["diff"].reshape(weight.shape)


class SetWeight(Algorithm):
    """The new weight itself is in the file; a strength below 1 goes part of the way to it."""

    title = "weight to set"
    needs = ("set",)

    @classmethod
    def check(cls, shapes: Shapes, layer: Shape) -> None:
        _expect(shapes, "set", layer)

    @classmethod
    def delta(cls, found: Tensors, weight: Tensor) -> Tensor:
        return found["set"].reshape(weight.shape) - weight


class IA3(Algorithm):
    """ΔW = W·w, a number for each output; with `on_input`, for each input."""

    title = "IA³"
    needs = ("ia3", "on_input")

    @classmethod
    def check(cls, shapes: Shapes, layer: Shape) -> None:
        if math.prod(shapes["ia3"]) not in layer[:2]:
            raise UnfitError("ia3", f"has the shape {shapes['ia3']}; the layer is {layer}")

    @classmethod
    def delta(cls, found: Tensors, weight: Tensor) -> Tensor:
        axis = int(bool(found["on_input"].flatten()[0]))
        factors = found["ia3"].flatten()
        if len(factors) != weight.shape[axis]:
            side = ("outputs", "inputs")[axis]
            raise UnfitError("ia3", f"{len(factors)} numbers for the {side} of {weight.shape}")
        return weight * factors.view([-1 if i == axis else 1 for i in range(weight.dim())])


class OFT(Algorithm):
    """W with each block of its outputs turned by an orthogonal matrix, R = (I + Q)·(I − Q)⁻¹.

    Four dimensions are BOFT's: several turns, one after another, over interleaved blocks. `alpha`
    times the number of outputs bounds the norm of Q. Strength s turns by s·R + (1 − s)·I.
    """

    title = "OFT"
    needs, optional = ("oft",), ("rescale",)

    @classmethod
    def check(cls, shapes: Shapes, layer: Shape) -> None:
        blocks = shapes["oft"]
        if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
            raise UnfitError("oft", f"has the shape {blocks}; square blocks are needed")
        if blocks[-3] * blocks[-1] != layer[0]:
            raise UnfitError("oft", f"has the shape {blocks}; the layer is {layer}")
        if len(blocks) == 4 and (blocks[-1] % 2 or blocks[1] % 2 ** min(blocks[0] - 1, 64)):
            raise UnfitError("oft", f"has the shape {blocks}, which no butterfly has")
        if "rescale" in shapes and math.prod(shapes["rescale"]) != layer[0]:
            raise UnfitError("rescale", f"has the shape {shapes['rescale']}; the layer is {layer}")

    @classmethod
    def apply(cls, found: Tensors, weight: Tensor, scale: float, strength: float) -> Tensor:
        blocks = found["oft"]
        q = blocks - blocks.transpose(-1, -2)
        bound = scale * weight.shape[0]
        if bound > 0:
            length = q.norm() + 1e-8
            q = q * (bound / length) if length > bound else q
        eye = torch.eye(q.shape[-1], device=q.device)
        turns = (eye + q) @ torch.linalg.inv(eye - q)
        turns = torch.lerp(eye.expand_as(turns), turns, strength)
        turned = weight
        for i, turn in enumerate(turns if turns.dim() == 4 else [turns]):
            turned = _butterfly(turn, turned, i) if turns.dim() == 4 else _turned(turn, turned)
        if "rescale" in found:
            by = found["rescale"].reshape(-1, *[1] * (weight.dim() - 1))
            turned = turned * torch.lerp(torch.ones_like(by), by, strength)
        return turned


ALGORITHMS: tuple[type[Algorithm], ...] = (LoRA, LoHa, LoKr, GLoRA, Full, SetWeight, IA3, OFT)


def decomposed(weight: Tensor, lengths: Tensor) -> Tensor:
    """Return a weight whose rows, or columns, have the given lengths.

    lengths: [out, 1, …] of rows, or [1, inner, 1, …] of columns.
    """
    out = weight.shape[0]
    if lengths.dim() < 2 or lengths.shape[0] == out:
        axes, shape = tuple(range(1, weight.dim())), (out, *[1] * (weight.dim() - 1))
    else:
        axes, shape = (0, *range(2, weight.dim())), (1, -1, *[1] * (weight.dim() - 2))
    norm = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    return weight * (lengths.reshape(shape) / norm.clamp_min(torch.finfo(norm.dtype).eps))


def check_dora(lengths: Shape, layer: Shape) -> None:
    """Raise UnfitError unless a `dora_scale` of this shape fits a layer."""
    by_rows = math.prod(lengths) == layer[0] and (len(lengths) < 2 or lengths[0] == layer[0])
    by_columns = len(lengths) > 1 and lengths[0] == 1 and math.prod(lengths) == layer[1]
    if not (by_rows or by_columns):
        raise UnfitError("dora_scale", f"has the shape {lengths}; the layer is {layer}")


def _expect(shapes: Shapes, slot: str, wanted: Shape) -> None:
    """Raise UnfitError unless a tensor has the wanted shape; sides of 1 at its end may be missing.

    A convolution's inner side and its kernel may be flattened into one side.
    """
    there, flat = shapes[slot], (*wanted[:1], math.prod(wanted[1:]))
    matrix = len(there) > 1 or len(wanted) < 2
    if 0 in wanted or not matrix or _bare(there) not in (_bare(wanted), _bare(flat)):
        raise UnfitError(slot, f"has the shape {there}; {wanted} would fit")


def _bare(shape: Shape) -> Shape:
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def _tucker(core: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Return Tucker's product in a weight's shape: core [i, j, …], a [i, out], b [j, inner]."""
    core = core.reshape(len(a), len(b), *weight.shape[2:])
    return torch.einsum("i j ..., i p, j r -> p r ...", core, a, b)


def _turned(turn: Tensor, weight: Tensor) -> Tensor:
    """Return a weight with each block of its outputs turned. turn: [blocks, side, side]."""
    blocks = weight.view(*turn.shape[:2], -1)
    return torch.einsum("k n m, k n c -> k m c", turn, blocks).reshape(weight.shape)


def _butterfly(turn: Tensor, weight: Tensor, i: int) -> Tensor:
    """Return a weight after turn i of BOFT, whose blocks join outputs 2ⁱ half blocks apart."""
    rest, apart = weight.flatten(1), turn.shape[-1] // 2 * 2**i
    mixed = rest.view(-1, 2, apart, rest.shape[1]).transpose(1, 2).reshape(rest.shape)
    turned = _turned(turn.transpose(-1, -2), mixed)
    back = turned.view(-1, apart, 2, rest.shape[1]).transpose(1, 2)
    return back.reshape(weight.shape)
