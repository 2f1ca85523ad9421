"""llama.cpp, through llama-cpp-python's low-level functions.

A checkpoint becomes GGUF in float16, as llama.cpp's own converter makes it of one in float32, and that is quantized by
`llama_model_quantize`, which the program llama-quantize calls.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.gguf_llama import Shape, gguf_name, in_gguf_order
from benchmarks.peers.running import Running

if TYPE_CHECKING:
    import numpy as np

MODEL = "model.gguf"


def convert(checkpoint: Path, folder: Path, *, kind: str) -> None:
    """Write model.gguf, quantized as `kind` says, such as Q4_K_M.

    Raises: RuntimeError where llama.cpp does not quantize it.
    """
    import llama_cpp

    whole = folder / "float16.gguf"
    write_gguf(checkpoint, whole)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(folder / MODEL).encode(), ctypes.byref(parameters))
    if failed:
        raise RuntimeError(f"llama_model_quantize gave {failed} for {kind}; its log says why")
    whole.unlink()


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write the checkpoint as GGUF: matrices in float16, norms in float32; one tensor in memory at a time."""
    import gguf
    import numpy as np

    shape = Shape.of(json.loads((checkpoint / "config.json").read_text()))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rotary_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("no_vocab")  # the tokens are fed: none is made of text

    def dtype(dimensions: int) -> np.dtype:
        return np.dtype(np.float16 if dimensions > 1 else np.float32)

    for name, tensor in _tensors(checkpoint):
        kind = dtype(tensor.ndim)
        writer.add_tensor_info(gguf_name(name), tensor.shape, kind, tensor.size * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(checkpoint):
        writer.write_tensor_data(in_gguf_order(name, tensor, shape).astype(dtype(tensor.ndim)))
    writer.close()


def _tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint, mapped one at a time, always in the same order."""
    from safetensors import safe_open

    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                yield name, tensors.get_tensor(name)


def load(folder: Path, checkpoint: Path, threads: int, *, flash_attention: bool | None = None) -> Running:
    """A context of llama.cpp over the model. `flash_attention`: None leaves it to llama.cpp.

    Raises: RuntimeError where the model does not load.
    """
    return LlamaCpp(folder / MODEL, threads, flash_attention)


class LlamaCpp(Running):
    def __init__(self, path: Path, threads: int, flash_attention: bool | None) -> None:
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}; its log says why")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        super().__init__(vocab_size=vocabulary)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = self.max_length
        context.n_threads = context.n_threads_batch = threads
        if flash_attention is not None:
            context.flash_attn_type = int(flash_attention)
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context for the model; its log says why")
        self._memory = llama_cpp.llama_get_memory(self._context)

    def _empty(self) -> None:
        self._lib.llama_memory_clear(self._memory, False)

    def _run(self, tokens: np.ndarray, past: int) -> np.ndarray:
        import numpy as np

        ids = tokens[0].astype(np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch = self._lib.llama_batch_get_one(pointer, len(ids))  # its positions follow those that are there
        failed = self._lib.llama_decode(self._context, batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed} on {len(ids)} tokens after {past}")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,))[None].copy()

    def described(self) -> dict[str, Any]:
        return {"system_info": self._lib.llama_print_system_info().decode()}
