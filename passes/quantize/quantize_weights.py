"""Constant weights of matrix multiplications as 4- or 8-bit integers in blocks, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from passes.graph.weights_aside import execution_of_graph
from passes.quantize.block_quantization import BlockQuantized, quantize_blocks
from passes.quantize.calibration import calibration_tokens, observe
from passes.quantize.gptq import activation_order, inverse_factor, quantize_gptq
from passes.quantize.hqq import quantize_hqq
from passes.quantize.k_quant import quantize_k_quant
from passes.quantize.products import (
    MICROSOFT,
    Lookup,
    Product,
    add_initializer,
    excluded,
    find_lookups,
    find_products,
    head_of,
    refuse_subgraphs,
    register,
    remove_unused,
    replace,
    report_counts,
    with_bias,
)
from pipeline import (
    Artifact,
    Example,
    Field,
    ModelSize,
    Pass,
    PassContext,
    PassParams,
    PipelineError,
    Prediction,
    load_onnx,
    reshaped_tensor,
    save_onnx,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

Method = Literal["rtn", "hqq", "k_quant", "gptq"]
GPTQ_ONLY = ("samples", "sequence_length", "damping", "act_order")
HESSIAN_BYTES = 2 << 30
"""Second moments of inputs that are gathered in one pass over the calibration text; more take further passes."""

WIDTHS = {"int8": 8, "int4": 4}

LIBRARIES_BYTES = {"rtn": 76 * 10**6, "k_quant": 76 * 10**6, "hqq": 290 * 10**6, "gptq": 290 * 10**6}
"""Memory of the pass's process before any weight is read, by method: the last two import torch. Measured."""

WORKING_BYTES_PER_WEIGHT = {"k_quant": 2.5, "hqq": 12, "gptq": 12}
"""Copies of a weight in float32 while it is quantized, by method."""


class QuantizeWeights(Pass):
    """Quantize the weights of matrix multiplications to 4 or 8 bits in blocks (MatMulNBits)."""

    name, version = "quantize_weights", 2
    accepts, produces = frozenset({"onnx"}), "onnx"
    libraries = ("numpy", "scipy", "onnx", "onnx-ir", "onnxruntime", "tokenizers", "torch")
    examples = (
        Example(params={"bits": 8}, tolerance=0.5),
        Example(tolerance=4.0),
        Example(params={"method": "gptq", "samples": 8, "sequence_length": 32}, tolerance=4.0),
    )

    class Params(PassParams):
        method: Method = Field(
            "rtn",
            description="rtn: round to nearest. hqq: zero points are real numbers, chosen by half-quadratic "
            "optimization; closer to the weights, but ONNX Runtime on a CPU has no fast kernel for it (about 100 times "
            "slower). k_quant: scales and zero points by weighted least squares, as llama.cpp does. gptq: errors made "
            "up for by other weights, as the calibration text needs it",
        )
        bits: Literal[4, 8] = Field(4, description="bits of a weight; hqq takes 4")
        block_size: Literal[16, 32, 64, 128, 256] = Field(
            32,
            description="weights along the input dimension that share a scale; larger is faster and less exact. Where "
            "it does not divide the dimension, the last block is filled up with zeros",
        )
        symmetric: bool | None = Field(
            None,
            description="true: scales only; false adds a zero point to each block, which fits skewed weights better. "
            "Default: true for rtn and gptq; hqq and k_quant always have zero points",
        )
        accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
            4,
            description="how ONNX Runtime may compute: 0 unset, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations, "
            "which is the fast one on CPUs",
        )
        exclude: list[str] = Field(
            default_factory=list,
            description="weights to leave as they are: names of weights or nodes, or patterns such as *.down_proj.*",
        )
        head: Literal["same", "keep", "int8", "int4"] = Field(
            "same",
            description="the language model's head: same as the rest, keep it as it is, or round it to nearest with "
            "bits of its own",
        )
        embedding: Literal["keep", "int8", "int4"] = Field(
            "keep",
            description="the table that token ids are looked up in: keep it as it is, or round it to nearest in blocks "
            "(GatherBlockQuantized); one that the head shares stays one where both get the same bits",
        )
        samples: int = Field(64, ge=1, description="gptq: pieces of the calibration text")
        sequence_length: int = Field(512, ge=2, description="gptq: tokens of each")
        damping: float = Field(
            0.01, gt=0, le=1, description="gptq: share of the mean second moment added to all, for stability"
        )
        act_order: bool = Field(False, description="gptq: columns with the largest inputs first")

        @model_validator(mode="after")
        def _fit_together(self) -> QuantizeWeights.Params:
            if self.method in ("hqq", "k_quant") and self.symmetric:
                raise ValueError(f"{self.method} always has zero points: leave `symmetric` out, or use rtn or gptq")
            if self.method == "hqq" and self.bits != 4:
                raise ValueError(
                    f"hqq takes 4 bits, not {self.bits}: MatMulNBits has no kernel for real zero points with others"
                )
            if self.method != "gptq":
                given = [n for n in GPTQ_ONLY if getattr(self, n) != type(self).model_fields[n].default]
                if given:
                    raise ValueError(f"{', '.join(given)}: for `method: gptq` only, and this is {self.method}")
            return self

        def facets(self) -> tuple[str, ...]:
            return ("calibration_text", "seed", "threads") if self.method == "gptq" else ()

        def is_symmetric(self) -> bool:
            """`symmetric`, or the method's default."""
            return self.method in ("rtn", "gptq") if self.symmetric is None else self.symmetric

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Replace each MatMul or Gemm that has a constant weight by MatMulNBits.

        Raises: PipelineError where a pattern in `exclude` matches nothing, nothing is left to quantize, a weight holds
        values that are not finite, the graph has no such embedding, or it cannot be calibrated.
        """
        model = load_onnx(artifact)
        products = find_products(model)
        if not products:
            raise PipelineError("the graph multiplies by no constant float weight: there is nothing to quantize")
        lookups = _lookups(model, artifact, params)
        skipped = excluded(params.exclude, [*products, *lookups])
        head = None
        if params.head != "same":
            head = head_of(model, artifact, products)
        chosen = [p for p in products if p.node not in skipped and not (p.node is head and params.head == "keep")]
        if not chosen:
            raise PipelineError(f"all {len(products)} weights are excluded: there is nothing to quantize")
        if params.method == "gptq":
            refuse_subgraphs(chosen, model)
        writer = _Writer(model, params, context)
        plan = _plan([p for p in chosen if p.node is not head], [p for p in chosen if p.node is head], params)
        for done, step in enumerate(_solved(plan, artifact, params, context)):
            context.progress(done / len(chosen), step.product.weight_name)
            writer.product(step)
        for lookup in lookups:
            if lookup.node not in skipped:
                writer.lookup(lookup, WIDTHS[params.embedding])
        model.graph.opset_imports[MICROSOFT] = 1
        remove_unused(model)
        kind = f"{params.method}, {params.bits} bits in blocks of {params.block_size}"
        report_counts(context, kind, len(chosen), [p for p in products if p not in chosen])
        return save_onnx(model, context.output, like=artifact, execution=execution_of_graph(artifact))

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """Codes, and in each block a scale and perhaps a zero point; `exclude` is not foreseen."""
        widths: dict[str, int] = {"linear": params.bits}
        if params.head != "keep":
            widths["head"] = WIDTHS.get(params.head, params.bits)
        if params.embedding != "keep":
            widths["embedding"] = WIDTHS[params.embedding]
        after = model
        for bits in sorted(set(widths.values())):
            kinds = [kind for kind, width in widths.items() if width == bits]
            after = after.with_weights(kinds, f"int{bits}", _bytes_per_weight(params, bits))
        return Prediction(model=after, conversion_bytes=_peak_bytes(params, model))


def _bytes_per_weight(params: QuantizeWeights.Params, bits: int) -> float:
    zero_point = 0.0 if params.is_symmetric() else 4.0 if params.method == "hqq" else bits / 8
    return bits / 8 + (4.0 + zero_point) / params.block_size


def _peak_bytes(params: QuantizeWeights.Params, model: ModelSize) -> int:
    """Of the process: its libraries, and what the largest weight needs while it is quantized."""
    libraries = LIBRARIES_BYTES[params.method]
    result = model.largest * _bytes_per_weight(params, params.bits)
    if params.method == "rtn":
        return round(libraries + result)
    working = model.largest * WORKING_BYTES_PER_WEIGHT[params.method]
    moments = 0
    if params.method == "gptq" and (decoder := model.decoder) is not None:
        layer = 4 * (3 * decoder.hidden**2 + decoder.intermediate**2)
        moments = min(HESSIAN_BYTES, decoder.layers * layer + 4 * decoder.hidden**2)
    return round(libraries + result + working + moments)


@dataclass(frozen=True)
class Step:
    """A product to replace: by which method, with how many bits, and what quantizes its weight [N, K]."""

    product: Product
    method: Method
    bits: int
    solve: Callable[[np.ndarray], BlockQuantized] | None = None
    """None until the calibration text has been read, for gptq."""


def _plan(rest: list[Product], head: list[Product], params: QuantizeWeights.Params) -> list[Step]:
    steps = [Step(product, params.method, params.bits) for product in rest]
    return [*steps, *(Step(product, "rtn", WIDTHS[params.head]) for product in head)]


def _solved(
    steps: list[Step], artifact: Artifact, params: QuantizeWeights.Params, context: PassContext
) -> Iterator[Step]:
    """The steps with what solves them: those that need the calibration text first, group by group."""
    yield from _calibrated([step for step in steps if step.method == "gptq"], artifact, params, context)
    if params.method == "hqq":
        context.logger.warning("ONNX Runtime has no fast CPU kernel for hqq's zero points: expect slow products")
    threads, symmetric, block_size = context.threads, params.is_symmetric(), params.block_size
    for step in steps:
        bits = step.bits
        if step.method == "rtn":
            solve: Callable[..., BlockQuantized] = partial(
                quantize_blocks, bits=bits, block_size=block_size, symmetric=symmetric, threads=threads
            )
        elif step.method == "hqq":
            solve = partial(quantize_hqq, bits=bits, block_size=block_size)
        elif step.method == "k_quant":
            solve = partial(quantize_k_quant, bits=bits, block_size=block_size, threads=threads)
        else:
            continue
        yield dataclasses.replace(step, solve=solve)


def _calibrated(
    steps: list[Step], artifact: Artifact, params: QuantizeWeights.Params, context: PassContext
) -> Iterator[Step]:
    """Steps of gptq with what solves them, in groups whose second moments fit HESSIAN_BYTES.

    Each group reads the calibration text through the part of the graph that its inputs need. Weights that were
    quantized before do not change what later ones see: all inputs are those of the graph as it came.

    Raises: PipelineError where the graph or the text cannot be used to calibrate.
    """
    import numpy as np

    if not steps:
        return
    tokens = calibration_tokens(artifact, context, samples=params.samples, length=params.sequence_length)
    by_input: dict[str, list[Step]] = {}
    for step in steps:
        by_input.setdefault(str(step.product.input.name), []).append(step)
    widths = {name: group[0].product.shape[1] for name, group in by_input.items()}
    for names in _groups(widths):
        moments = {name: np.zeros((widths[name], widths[name]), np.float32) for name in names}
        for values in observe(artifact, names, tokens, threads=context.threads, decode=False):
            for name, value in values.items():
                x = value.reshape(-1, value.shape[-1]).astype(np.float32, copy=False)  # [tokens, K]
                moments[name] += x.T @ x
        for name in names:
            hessian = moments.pop(name)
            order = activation_order(hessian) if params.act_order else None
            try:
                factor = inverse_factor(hessian, damping=params.damping, order=order)
            except ValueError as error:
                raise PipelineError(
                    f"{by_input[name][0].product.weight_name!r} cannot be calibrated: {error}"
                ) from None
            del hessian
            for step in by_input[name]:
                solve = partial(
                    quantize_gptq,
                    factor=factor,
                    bits=step.bits,
                    block_size=params.block_size,
                    symmetric=params.is_symmetric(),
                    order=order,
                )
                yield dataclasses.replace(step, solve=solve)


def _groups(widths: dict[str, int]) -> Iterator[list[str]]:
    """Names in order, in groups of which the matrices [width, width] take at most HESSIAN_BYTES, or one by one."""
    group: list[str] = []
    size = 0
    for name, width in widths.items():
        own = 4 * width * width
        if group and size + own > HESSIAN_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield group


def _lookups(model: ir.Model, artifact: Artifact, params: QuantizeWeights.Params) -> list[Lookup]:
    """The embeddings to quantize.

    Raises: PipelineError where there is none, or its rows do not fill whole bytes.
    """
    if params.embedding == "keep":
        return []
    found = find_lookups(model, artifact.interface.inputs.get("tokens", "input_ids"))
    if not found:
        raise PipelineError("the graph looks no token up in a constant float table: leave `embedding` out")
    for lookup in found:
        if params.embedding == "int4" and lookup.shape[1] % 2:
            raise PipelineError(f"the rows of {lookup.weight_name!r} have an odd length: use `embedding: int8`")
    return found


class _Writer:
    """Quantizes weights one at a time, writes them, and puts the operators that take them into the graph."""

    def __init__(self, model: ir.Model, params: QuantizeWeights.Params, context: PassContext) -> None:
        self._model = model
        self._params = params
        self._context = context
        self._done: dict[Hashable, list[ir.Value]] = {}

    def product(self, step: Step) -> None:
        """Replace a product by MatMulNBits."""
        import onnx_ir as ir

        product, old = step.product, step.product.node
        assert step.solve is not None
        weights = self._weights(product, product.dtype, step.method, step.bits, step.solve)
        count, depth = product.shape
        attributes = {
            "K": depth,
            "N": count,
            "bits": step.bits,
            "block_size": self._params.block_size,
            "accuracy_level": self._params.accuracy_level,
        }
        new = ir.node("MatMulNBits", [old.inputs[0], *weights], attributes, domain=MICROSOFT, name=old.name, version=1)
        replace(old, with_bias(old, new, product.bias))

    def lookup(self, lookup: Lookup, bits: int) -> None:
        """Replace a Gather by GatherBlockQuantized, whose result is float32 where the table was bfloat16."""
        import onnx_ir as ir

        old, table = lookup.node, Product(lookup.node, lookup.weight, transposed=True)
        stored = old.outputs[0].dtype or ir.DataType.FLOAT
        dtype = ir.DataType.FLOAT if stored == ir.DataType.BFLOAT16 else stored
        size = self._params.block_size
        solve = partial(
            quantize_blocks,
            bits=bits,
            block_size=size,
            symmetric=self._params.is_symmetric(),
            threads=self._context.threads,
        )
        codes, *others = self._weights(table, dtype, "rtn", bits, solve)
        rows, columns = table.shape
        assert codes.const_value is not None
        name = f"{codes.name}.rows"
        if columns % size:  # the operator wants no padding
            cut = codes.const_value.numpy().reshape(rows, -1)[:, : columns * bits // 8]
            flat = add_initializer(self._model, name, cut, self._context)
        else:  # the same bytes
            shape = (rows, columns * bits // 8)
            flat = register(self._model, name, reshaped_tensor(name, codes.const_value, shape))
        new = ir.node(
            "GatherBlockQuantized",
            [flat, old.inputs[1], *others],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": size, "bits": bits},
            domain=MICROSOFT,
            name=old.name,
            version=1,
        )
        nodes = [new]
        if stored != dtype:
            new.outputs[0].dtype, new.outputs[0].shape = dtype, old.outputs[0].shape
            new.outputs[0].name = f"{old.outputs[0].name}.{dtype.name.lower()}"
            nodes.append(ir.node("Cast", [new.outputs[0]], {"to": stored}, name=f"{old.name}.cast"))
        replace(old, nodes)

    def _weights(
        self,
        product: Product,
        dtype: ir.DataType,
        method: str,
        bits: int,
        solve: Callable[[np.ndarray], BlockQuantized],
    ) -> list[ir.Value]:
        """The initializers codes, scales and, where there are some, zero points; each weight's only once."""
        key = (product.identity, dtype.name, method, bits)
        if key not in self._done:
            try:
                result = solve(product.matrix())
            except ValueError as error:
                raise PipelineError(f"the weight {product.weight_name!r} cannot be quantized: {error}") from None
            float_type = dtype.numpy()
            arrays = {f"q{bits}": result.codes, "scales": result.scales.astype(float_type, copy=False)}
            if result.zero_points is not None:
                real = result.zero_points.dtype.kind == "f"
                arrays["zero_points"] = result.zero_points.astype(float_type) if real else result.zero_points
            self._done[key] = [
                add_initializer(self._model, f"{product.weight_name}.{part}", array, self._context)
                for part, array in arrays.items()
            ]
        return self._done[key]
