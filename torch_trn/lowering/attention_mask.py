"""Masks of attention scores in PSUM: additive, boolean and causal; and the scale before exp."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.attention_heads import Heads, Operand, Place
from torch_trn.lowering.call import TensorSpec
from torch_trn.lowering.layout import PARTITIONS
from torch_trn.lowering.run import spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Affine, Index, Pool, TileRef, affine
from torch_trn.program import Builder

__all__ = ["NO_MAXIMUM", "Mask"]

#: Above any maximum: a row without a key has exp(-inf + this) = 0 for its weights.
NO_MAXIMUM = 1e30


@dataclass
class Mask:
    """What happens to scores between their product and exp.

    ``factor`` is what exp still multiplies them with: the scale, or 1 where VectorE has applied it
    (together with a mask, or because the maximum of scores times a scale below 0 is another one).
    """

    b: Builder
    heads: Heads
    core: CoreSpec
    bias: Operand | None
    factor: float
    pools: dict[str, Pool] = field(default_factory=dict)
    hides_rows: bool = False
    before: int = 0

    @classmethod
    def of(cls, b: Builder, heads: Heads, given: dict[str, object], core: CoreSpec) -> Mask:
        """From the call's arguments by name."""
        name = "attn_mask" if "attn_mask" in given else "attn_bias"
        spec, bias = given.get(name), None
        if isinstance(spec, TensorSpec) and spec.numel:
            sizes = (heads.batch, heads.kv_heads * heads.group, heads.queries, heads.keys)
            bias = Operand.of(b, heads, "mask", f"in{given[f'{name}#']}", spec, sizes)
        plain = bias is None and heads.scale > 0
        return cls(b, heads, core, bias, heads.scale if plain else 1.0, {}, bias is not None)

    def allocate(self, columns: int, span: int) -> None:
        """Tiles for ``columns`` of a mask; ``span`` query blocks meet the diagonal together.

        With a span of 0 nothing is hidden here.
        """
        b = self.b
        if self.bias is not None:
            nbytes = columns * self.bias.dtype.itemsize
            self.pools["mask"] = b.sbuf("mask_tile", free_bytes=nbytes, slots=2)
            if self.bias.dtype == torch.bool:
                self.pools["log"] = b.sbuf("mask_log", free_bytes=columns * 4, slots=2)
        if self.heads.causal and span and self.core.name == "NeuronCore-v2":
            # Before v3 there is no range_select: one tile of 0 and -inf, read from where it fits.
            self.before = (span - 1) * PARTITIONS
            width = self.before + span * PARTITIONS
            tile = self.pools["diagonal"] = b.sbuf("diagonal", free_bytes=width * 2)
            b.memset(tile, n=width, dtype=torch.bfloat16)
            b.affine_select(tile, tile, n=width, op="is_le", fill=-math.inf, base=-self.before,
                            channel=-1, dtype=torch.bfloat16)  # fmt: skip

    def add(
        self, scores: TileRef, head: Place, query: Index, key: Index, count: Index, rows: int,
        keys: int, hidden: int,
    ) -> None:  # fmt: skip
        """Scales and masks ``scores`` [rows, keys] of query block ``query`` and keys ``key``...

        count: number of the step, which chooses slots. hidden: columns at the end of the block
            that the causal mask touches.
        """
        if self.bias is not None:
            mask = self._load(head, query, key, count, rows, keys)
            self.b.scalar_tensor_tensor(scores, scores, mask, op="multiply,add", n=keys,
                                        scalar=self.heads.scale, partitions=rows)  # fmt: skip
        elif self.factor != self.heads.scale:
            self.b.tensor_scalar(scores, scores, op="multiply", operands=(self.heads.scale,),
                                 n=keys, partitions=rows)  # fmt: skip
        if hidden:
            self._hide(scores.view(FP32, (1, hidden), offset=keys - hidden), rows, hidden,
                       affine(key) + (keys - hidden) - affine(query) * PARTITIONS)  # fmt: skip

    def _load(
        self, head: Place, query: Index, key: Index, count: Index, rows: int, keys: int
    ) -> TileRef:
        """The mask of a block, one number for all keys where it is the same for all."""
        bias, b = self.bias, self.b
        assert bias is not None
        wide = 1 if bias.width[1] == 0 else keys
        tile = self.pools["mask"][count]
        total, nbytes = bias.runs(rows, wide)
        source = bias.natural(
            self.heads.place(*head), affine(query) * PARTITIONS, rows, 1, wide, key
        )
        b.load(tile.view(bias.dtype, (1, wide), partitions=rows), source, rows=total,
               row_bytes=nbytes, partitions=spread_over(rows, total), queue="mask")  # fmt: skip
        step = 1 if wide == keys else 0
        if bias.dtype != torch.bool:
            return tile.view(bias.dtype, (step, keys))
        log = self.pools["log"][count]
        b.activation(log, tile.view(torch.bool, (1, wide)), op="log", n=wide, partitions=rows,
                     dtype=torch.bool, out_dtype=FP32)  # fmt: skip
        return log.view(FP32, (step, keys))

    def _hide(self, scores: TileRef, rows: int, columns: int, ahead: Affine) -> None:
        """-inf where a key comes after its query; ``ahead`` is the first key minus first query."""
        b = self.b
        if self.core.name != "NeuronCore-v2":
            b.range_select(scores, scores, n=columns, op="is_le,is_ge", low=0, high=-(2**30),
                           fill=-math.inf, base=ahead, channel=-1, partitions=rows)  # fmt: skip
            return
        offset = ahead + self.before
        mask = self.pools["diagonal"][0].view(torch.bfloat16, (1, columns), offset=offset)
        b.tensor_tensor(scores, scores, mask, op="add", n=columns, partitions=rows)
