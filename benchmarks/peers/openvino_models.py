"""OpenVINO, with the weights compressed by NNCF, converted by optimum-intel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.running import Running

if TYPE_CHECKING:
    import numpy as np

MODEL = "openvino_model.xml"


def convert(checkpoint: Path, folder: Path, *, bits: int = 4, group_size: int = 128) -> None:
    """Write OpenVINO's files, the cache inside the model: matrices in `bits`, embedding and head as NNCF has them."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    quantization = OVWeightQuantizationConfig(bits=bits, group_size=group_size, ratio=1.0)
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, quantization_config=quantization, stateful=True
    )
    model.save_pretrained(folder)


def load(
    folder: Path, checkpoint: Path, threads: int, *, last_logits: bool = False, properties: dict[str, str] | None = None
) -> Running:
    """The model on the CPU. `last_logits`: the head sees the last position only, as OpenVINO GenAI has it.

    `properties` are the CPU plugin's, beside the hint LATENCY that optimum-intel gives, too.
    """
    return OpenVino(folder / MODEL, threads, last_logits, properties or {})


class OpenVino(Running):
    def __init__(self, path: Path, threads: int, last_logits: bool, properties: dict[str, str]) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        super().__init__(vocab_size=model.output("logits").partial_shape[2].get_length())
        if last_logits:
            _see_last_position_only(model)
        given = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **properties}
        self._inputs = {name for port in model.inputs for name in port.get_names()}
        self._compiled = core.compile_model(model, "CPU", given)
        self._request = self._compiled.create_infer_request()

    def _empty(self) -> None:
        self._request.reset_state()

    def _run(self, tokens: np.ndarray, past: int) -> np.ndarray:
        import numpy as np

        length = tokens.shape[1]
        given = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, past + length), np.int64),
            "position_ids": np.arange(past, past + length)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: given[name] for name in self._inputs}, share_inputs=True)
        return self._request.get_tensor("logits").data[:, -1].astype(np.float32)

    def described(self) -> dict[str, Any]:
        """What the plugin made of the properties."""
        names = (
            "INFERENCE_PRECISION_HINT",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE",
            "KV_CACHE_PRECISION",
            "INFERENCE_NUM_THREADS",
            "NUM_STREAMS",
        )
        return {name: str(self._compiled.get_property(name)) for name in names}


def _see_last_position_only(model: Any) -> None:
    """Put a slice before the head, so that it is not computed for the positions of a prompt that nobody asks for."""
    import numpy as np
    import openvino.opset13 as operators

    head = model.output("logits").get_node().input_value(0).get_node()
    hidden = head.input(0)
    if head.get_type_name() != "MatMul":
        raise RuntimeError(f"the logits come from {head.get_type_name()}, and not from a product with the head")
    start, stop, step, axis = (np.array([number], np.int64) for number in (-1, np.iinfo(np.int64).max, 1, 1))
    last = operators.slice(hidden.get_source_output(), start, stop, step, axis)
    hidden.replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
