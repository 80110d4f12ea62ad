"""`QuantizedWeight`, the container of a quantized weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import ceil_div, check_blocksize
from .errors import bad, bad_type, check_float_dtype, check_memory, is_dtensor, named
from .formats import CODEBOOKS
from .layouts import E4M3, LAYOUTS, Layout
from .mapped import before_use
from .microscaling import MICROSCALED, check_scale_table, check_scales, mxfp4_fields, nvfp4_fields
from .ops import OpArguments
from .quant_state import bitsandbytes_entries, bitsandbytes_fields


def check_finite(name: str, tensor: Tensor) -> float:
    """The largest absolute value of a tensor of scales or of a table; 0, unchecked, if it has bytes or no values.

    Raises:
        ValueError: a value is NaN or Inf.
    """
    check_memory(name, tensor)
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return 0.0
    low, high = (value.item() for value in torch.aminmax(tensor.detach()))  # one pass; one NaN makes both NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise bad(name, "finite values", "NaN or Inf")
    return max(abs(low), abs(high))


def check_e4m3(name: str, codes: Tensor) -> None:
    """Raise ValueError if one of the bytes is NaN in FP8 E4M3."""
    check_memory(name, codes)
    if not codes.is_meta and any(((part & 0x7F) == 0x7F).any() for part in codes.detach().view(-1).split(1 << 20)):
        raise bad(name, "numbers of E4M3", "NaN, the byte 0x7F or 0xFF")


def check_e4m3_scales(name: str, scales: Tensor, table: Tensor | None) -> None:
    """Raise ValueError unless the scales lie below 2^120, as kernels multiply them by 256.

    With a table, `nested_code` [256], they are bytes, which ascend with the values of the table.
    """
    largest = check_finite(name, scales)
    if table is not None and not scales.is_meta and not table.is_meta and scales.numel() > 0:
        check_scales(name, scales, "mxfp4")
        largest = table[scales.max().int()].item()
    if largest >= 2.0**120:
        raise bad(name, "scales below 2^120", f"{largest:.9g}")


@dataclass(slots=True, eq=False, repr=False)
class QuantizedWeight:
    """A quantized weight W [N, K]: its codes, its scales, and the tables that decode them. Tensors are never copied.

    Elements are numbered e = n * K + k, and the elements of block e // blocksize share a scale, as in bitsandbytes. The
    weights of a layer's experts are one weight [E, N, K], with the bytes of a weight [E * N, K]. An element is

        level * scale + minimum         in fp32, with the minimum only in formats that have one

    `qlora_native.quantize` makes weights of "nf4", "fp4", "int4", "int8", "mxfp4", "nvfp4" and "codebook" (16 values of
    the user's own). The other formats are those of files, whose values they keep to the bit (docs/formats.md):
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs", "q2_k", "q3_k", "q4_k", "q5_k" and "q6_k" of GGUF,
    "affine4" and "affine8" of GPTQ, AWQ, compressed-tensors and auto-round, and "fp8".

    Attributes:
        codes: uint8, contiguous. Of 4 bits: [N, K/2], or [ceil(N*K/2), 1] if K is odd; element e is in the high half of
            byte e // 2 if e is even, else in the low half. Of 8 bits: [N, K], a signed byte for each element, or in
            "fp8" an E4M3 number. Experts have [E, N, K/2] and [E, N, K].
        absmax: the scales: fp32 [blocks], in formats of files also fp16 or bf16; or uint8 [blocks] if they are
            double-quantized.
        nested_absmax: fp32 [ceil(blocks/256)], the scales of the double-quantized scales, else None. In GGUF's K-quants
            and "iq4_xs" there is one for each 256 elements.
        nested_code: fp32 [256], the values of the bytes of `absmax`; None without double quantization. In "mxfp4" these
            are the values of E8M0, in "nvfp4" those of E4M3 times the scale of the tensor; nested_absmax is then 1.
        offset: fp32, one element, added to each decoded scale; None without double quantization.
        code: fp32 [16], the values of the codes; None with 8 bits. The unit of a byte of "int8" is scale / 127.
        shape: (N, K), or (E, N, K).
        blocksize: elements that share a scale: a power of two in 32 ... 4096, or the one of a format of files or
            of microscaling.
        format: one of those above.
        dtype: the dtype of the weight that was quantized, and by default of `dequantize()`.
        minimum: the minima, in the dtype of `absmax`: fp16 [blocks] in "q4_1" and "q5_1"; uint8 [blocks] in "q2_k",
            "q4_k" and "q5_k", where a minimum is nested_code[byte] * nested_minimum; else None.
        nested_minimum: fp32, in the shape of `nested_absmax`, where the minima are bytes; else None.
        zero_point: int8 [blocks], or None. The minimum of a block of "affine4" or "affine8" is -zero_point * scale.
        column_order: int32 [K], or None. Column i of the codes is column column_order[i] of W, as in GPTQ's files with
            desc_act.

    Raises:
        TypeError, ValueError: a field has the wrong dtype, length, layout or device, or requires gradients.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    code: Tensor | None
    shape: tuple[int, ...]
    blocksize: int
    format: str
    dtype: torch.dtype
    minimum: Tensor | None = None
    nested_minimum: Tensor | None = None
    zero_point: Tensor | None = None
    column_order: Tensor | None = None

    def __post_init__(self) -> None:
        if self.format not in LAYOUTS:
            raise bad("format", "one of " + ", ".join(LAYOUTS), repr(self.format))
        check_blocksize(self.blocksize, self.format)
        check_float_dtype("dtype", self.dtype)
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            raise bad("shape", "(N, K) or (E, N, K), each at least 1", tuple(self.shape))
        elements = math.prod(self.shape)
        layout, blocks = self.layout, ceil_div(elements, self.blocksize)
        nested = layout.nested and (self.nested_absmax is not None or not layout.scales)
        nested_blocks = ceil_div(blocks, layout.nested_blocksize) if nested else None
        scales = (torch.uint8,) if nested else layout.scales
        self._check("codes", (torch.uint8,), elements if layout.bits == 8 else ceil_div(elements, 2))
        self._check("absmax", scales, blocks)
        self._check("nested_absmax", (torch.float32,), nested_blocks)
        self._check("nested_code", (torch.float32,), 256 if nested else None)
        self._check("offset", (torch.float32,), 1 if nested else None)
        self._check("code", (torch.float32,), None if layout.bits == 8 else 16)
        self._check("minimum", (self.absmax.dtype,), blocks if layout.minimum in ("stored", "nested") else None)
        self._check("nested_minimum", (torch.float32,), nested_blocks if layout.minimum == "nested" else None)
        if self.zero_point is not None:
            self._check("zero_point", (torch.int8,), blocks if layout.minimum == "zero_point" else None)
        if self.column_order is not None:
            self._check("column_order", (torch.int32,), self.shape[-1])

    def _check(self, name: str, dtypes: tuple[torch.dtype, ...], numel: int | None) -> None:
        tensor = getattr(self, name)
        if tensor is None and numel is None:
            return
        if numel is None:
            needs = {"code": "a 4-bit format", "zero_point": "affine4 or affine8"}.get(name, "nested_absmax")
            needs = "a format that has it" if name.endswith("minimum") else needs
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise bad(name, f"None without {needs}", got)
        if not isinstance(tensor, Tensor):
            raise bad_type(name, "a tensor", type(tensor).__name__)
        if tensor.dtype not in dtypes:
            raise bad_type(name, " or ".join(map(str, dtypes)), tensor.dtype)
        if tensor.numel() != numel:
            raise bad(name, f"{numel} elements", f"{tensor.numel()}")
        if not tensor.is_contiguous():
            raise bad(name, "a contiguous tensor", f"strides {tensor.stride()}")
        if tensor.device != self.codes.device:
            raise bad(name, f"a tensor on {self.codes.device}, where codes is", tensor.device)
        if tensor.requires_grad:
            raise bad(name, "a tensor that does not require gradients", "requires_grad=True")
        check_memory(name, tensor)

    def __repr__(self) -> str:
        how = f"format={self.format}, blocksize={self.blocksize}, double_quant={self.nested_absmax is not None}"
        where = f"dtype={self.dtype}, device={self.device}, nbytes={self.nbytes}"
        return f"QuantizedWeight(shape={self.shape}, {how}, {where})"

    def check_values(self) -> QuantizedWeight:
        """Check that scales and tables are finite, and that no code of "fp8" is NaN. The constructor does not.

        Use it for a weight that comes from a file or from another library. It waits for a GPU. It decodes the weight, a
        part at a time, only if the largest scale times the largest level exceeds fp32.

        Returns:
            The weight itself.

        Raises:
            ValueError: a scale, a table or the offset is NaN or Inf, an element decodes to one, a byte is not a scale
                of "mxfp4" or "nvfp4", or `column_order` is not a permutation. A value of MXFP4 may exceed fp32; it
                decodes to infinity then, as in transformers.
        """
        if self.column_order is not None:
            check_permutation("column_order", self.column_order)
        if self.format in MICROSCALED:
            check_scale_table("nested_code", self.nested_code, self.format)
            check_scales("absmax", self.absmax, self.format)
            for name in ("nested_absmax", "offset", "code"):
                check_finite(name, getattr(self, name))
            return self
        if self.layout.byte_format == E4M3:
            check_e4m3("codes", self.codes)
            if self.nested_code is not None:
                check_scale_table("nested_code", self.nested_code, "mxfp4")
                check_finite("nested_absmax", self.nested_absmax)
                check_finite("offset", self.offset)
            check_e4m3_scales("absmax", self.absmax, self.nested_code)
            return self
        sizes = {name: check_finite(name, tensor) for name, tensor in self.tensors().items()}
        scale, minimum = sizes["absmax"], sizes.get("minimum", 0.0)
        if self.nested_absmax is not None:
            scale = sizes["nested_code"] * sizes["nested_absmax"] + sizes["offset"]
            minimum = sizes["nested_code"] * sizes.get("nested_minimum", 0.0)
        # The largest level, where 127 * (scale / 127) of int8 is rounded twice.
        level = sizes.get("code", 1 + 2**-22 if self.format == "int8" else 448.0) + 128 * (self.zero_point is not None)
        if level * scale + minimum > torch.finfo(torch.float32).max and not self._decodes_to_finite():
            raise bad("absmax", "scales whose products with the codebook are finite in fp32", f"up to {scale:.1e}")
        return self

    def _decodes_to_finite(self) -> bool:
        """Whether all elements decode to finite numbers of fp32. They are decoded some rows at a time."""
        matrix = as_matrix(self)
        rows, columns = matrix.shape
        parts = torch.arange(rows, device=self.device).split(max(1, (1 << 20) // columns))
        decode = partial(torch.ops.qlora_native.dequantize_rows, *op_arguments(matrix), torch.float32)
        return all(decode(part).isfinite().all() for part in parts)

    @property
    def bits(self) -> int:
        """The bits of a code: 4 or 8."""
        return self.layout.bits

    @property
    def layout(self) -> Layout:
        """How the format stores a weight."""
        return LAYOUTS[self.format]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, of which tables are at most 1.1 KB."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """The stored bits for each element of W, with scales and tables."""
        return 8 * self.nbytes / math.prod(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {name: value for name, value in self._fields().items() if isinstance(value, Tensor)}

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight: fp32 code * fp32 scale, rounded once. Not differentiable.

        Args:
            dtype: fp32, bf16 or fp16; None is `self.dtype`.

        Returns:
            W in `shape`.

        Raises:
            TypeError: `dtype` is not fp32, bf16 or fp16.
        """
        dtype = self.dtype if dtype is None else dtype
        check_float_dtype("dtype", dtype)
        w = torch.ops.qlora_native.dequantize(*op_arguments(as_matrix(self)), dtype).view(self.shape)
        return w if self.column_order is None else in_order(w, self.column_order)

    def to(self, device: torch.device | str | int) -> QuantizedWeight:
        """Move the weight to a device.

        Args:
            device: where to.

        Returns:
            A weight whose tensors are on `device`; those that were there already are shared, not copied.
        """
        for name, tensor in self.tensors().items():
            check_memory(name, tensor)
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @classmethod
    def from_mxfp4(cls, blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
        """Make a weight from the tensors of an MXFP4 file; it decodes to the same values.

        The tensors are gpt-oss' `*_blocks` and `*_scales`, or compressed-tensors' `weight_packed` and `weight_scale`.
        `dequantize()` returns what transformers' `convert_moe_packed_tensors` computes, before it transposes.

        Args:
            blocks: uint8 [N, K/32, 16] or [N, K/2], with the first of two codes in the low half of a byte. The experts
                of a layer, [E, N, K/32, 16], make a weight [E, N, K]; further leading dimensions become rows.
            scales: uint8 [..., N, K/32], E8M0.
            dtype: the `dtype` of the weight.

        Raises:
            TypeError, ValueError: another dtype or shape; a scale is NaN, the byte 255.
        """
        fields = mxfp4_fields(blocks, scales)
        return cls(**fields, code=CODEBOOKS["mxfp4"].to(blocks.device, copy=True), dtype=dtype)

    @classmethod
    def from_nvfp4(
        cls,
        codes: Tensor,
        scales: Tensor,
        *,
        weight_global_scale: Tensor | None = None,
        weight_scale_2: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> QuantizedWeight:
        """Make a weight from the tensors of an NVFP4 file; it decodes to the same values.

        The tensors are compressed-tensors' `weight_packed`, `weight_scale` and `weight_global_scale`, by which it
        divides a scale, or ModelOpt's `weight`, `weight_scale` and `weight_scale_2`, by which it multiplies a scale.

        Args:
            codes: uint8 [N, K/2], with the first of two codes in the low half of a byte.
            scales: float8_e4m3fn [N, K/16], or its bytes.
            weight_global_scale, weight_scale_2: exactly one of them: fp32, one element, above 0.
            dtype: the `dtype` of the weight.

        Raises:
            TypeError, ValueError: a wrong dtype or shape; a scale that is NaN or negative; or none or both of the
                scales of the tensor.
        """
        fields = nvfp4_fields(codes, scales, weight_global_scale, weight_scale_2)
        return cls(**fields, code=CODEBOOKS["nvfp4"].to(codes.device, copy=True), dtype=dtype)

    def to_bitsandbytes(self, prefix: str = "", name: str = "weight", transposed: bool = False) -> dict[str, Tensor]:
        """Make the entries of a state dict that bitsandbytes' Linear4bit would write, byte for byte.

        Args:
            prefix: put in front of every key, as in `nn.Module.state_dict`: "model.layers.0.mlp.up_proj.".
            name: the name of the parameter, as in `bitsandbytes.nn.parametrize.replace_parameter_4bit`: "down_proj".
            transposed: record in quant_state that the parameter is W transposed, as that of experts [E, K, N] is.
                bitsandbytes ignores the record.

        Returns:
            `weight` uint8 [elements/2, 1], `weight.absmax`, `weight.quant_map`, with double quantization
            `weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4` (or
            `__fp4`), the bytes of a JSON object. Tables are copies: safetensors refuses shared memory.

        Raises:
            ValueError: bitsandbytes does not have the format, or would decode other values, because it ignores `code`.
        """
        entries = bitsandbytes_entries(self._fields(), transposed)
        return {f"{prefix}{name}{suffix}": tensor for suffix, tensor in entries.items()}

    @classmethod
    def from_bitsandbytes(
        cls, state_dict: Mapping[str, Tensor], prefix: str = "", name: str = "weight"
    ) -> QuantizedWeight:
        """Read a weight that bitsandbytes' Linear4bit has written. The tensors are shared, not copied.

        Any `quant_storage` dtype is read. The stored maps and the stored offset are used, never recomputed.

        Args:
            state_dict: the entries that `to_bitsandbytes` describes, among others.
            prefix, name: as in `to_bitsandbytes`.

        Raises:
            ValueError, TypeError: an entry is missing, or its length, dtype or content is wrong.
        """
        name = f"{prefix}{name}"
        fields = bitsandbytes_fields(state_dict, name)
        with named(f"{name}, "):
            return cls(**fields).check_values()


def unchecked(*values: Any) -> QuantizedWeight:
    """Make a weight from all fields, in order, without checks, as a layer does at each call."""
    q = object.__new__(QuantizedWeight)
    (
        q.codes, q.absmax, q.nested_absmax, q.nested_code, q.offset, q.code, q.shape, q.blocksize, q.format, q.dtype,
        q.minimum, q.nested_minimum, q.zero_point, q.column_order,
    ) = values  # fmt: skip
    return q


def op_arguments(q: QuantizedWeight) -> OpArguments:
    """The arguments of a torch op that are this weight.

    Mapped codes are read from their file (mapped.py), because an op that takes these arguments follows.
    """
    before_use(q.codes)
    layout = LAYOUTS[q.format]
    return OpArguments(
        q.codes, q.absmax, q.nested_absmax, q.nested_code, q.offset, q.code, q.minimum, q.nested_minimum, q.zero_point,
        *q.shape[-2:], layout.bits, q.blocksize, layout.nested_blocksize, layout.byte_format,
    )  # fmt: skip


def in_order(w: Tensor, column_order: Tensor) -> Tensor:
    """The columns of `w` [..., K], which are stored in `column_order`, in the order of the weight."""
    return torch.empty_like(w).index_copy_(-1, column_order.long(), w)


def check_permutation(name: str, order: Tensor) -> None:
    """Raise ValueError unless `order` [K] has each of 0 ... K-1 once. A DTensor, which has a part, is not checked."""
    check_memory(name, order)
    if order.is_meta or is_dtensor(order):
        return
    if not torch.equal(order.detach().long().sort().values, torch.arange(order.numel(), device=order.device)):
        raise bad(name, f"each of 0 ... {order.numel() - 1} once", "others")


def as_matrix(q: QuantizedWeight) -> QuantizedWeight:
    """The same weight with two dimensions: experts [E, N, K] become [E * N, K]. The tensors are shared."""
    return q if len(q.shape) == 2 else replace(q, shape=(math.prod(q.shape[:-1]), q.shape[-1]))


def check_quantized(q: Any, shape: str, dimensions: int) -> None:
    """Raise unless `q` is a QuantizedWeight of that many dimensions. `shape` describes them in the error."""
    if not isinstance(q, QuantizedWeight):
        raise bad_type("q", "a QuantizedWeight", type(q).__name__)
    if len(q.shape) != dimensions:
        raise bad("q", shape, list(q.shape))
