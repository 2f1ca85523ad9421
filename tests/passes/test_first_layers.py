"""The first layers of a graph compute what they do in the whole one."""

from __future__ import annotations

import numpy as np

from passes.graph.agreement import largest_difference, outputs_of
from passes.graph.first_layers import keep_first_layers, widened_bytes
from passes.graph.offline import open_session, session_options
from pipeline import load_onnx


def test_the_first_layer_alone_fills_its_cache_as_in_the_whole(exported_llama):
    whole, cut, interface = load_onnx(exported_llama), load_onnx(exported_llama), exported_llama.interface
    first = keep_first_layers(cut, interface, 1)
    assert len(list(cut.graph)) < len(list(whole.graph)) / 2
    expected, given = (
        outputs_of(open_session(model, session_options(1)), how) for model, how in ((whole, interface), (cut, first))
    )
    kept = [{role: step[role] for role in first.outputs} for step in expected]
    assert set(first.outputs) == {"present.k[0]", "present.v[0]"}
    assert largest_difference(kept, given) < 1e-6


def test_weights_that_are_cast_count_as_float32(exported_llama):
    model = load_onnx(exported_llama)
    half = [ref for ref in exported_llama.component.tensors.values() if ref.dtype == "bfloat16"]
    table = next(ref for name, ref in exported_llama.component.tensors.items() if "embed_tokens" in name)
    everything = sum(4 * int(np.prod(ref.shape)) for ref in half)
    assert everything - 4 * int(np.prod(table.shape)) <= widened_bytes(model) <= everything
