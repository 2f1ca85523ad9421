"""Has transformers load the checkpoints that Olive quantized, whose weights are packed in a way of its own."""

from __future__ import annotations

import os


def register() -> None:
    """Tell transformers of the quantization method `olive`."""
    os.environ["CI"] = "1"  # before the import: without, Olive sends telemetry
    from olive.common.quant.hf_utils import OliveHfQuantizationConfig, OliveHfQuantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    AUTO_QUANTIZATION_CONFIG_MAPPING["olive"] = OliveHfQuantizationConfig
    AUTO_QUANTIZER_MAPPING["olive"] = OliveHfQuantizer
