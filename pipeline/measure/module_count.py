"""The process that counts modules of checkpoints: `python -P -m pipeline.measure.module_count`.

It reads [{manifest, blobs}, …] from standard input and writes [{class: modules}, …] to standard output. The models are
built on torch's meta device: they have shapes and no weights.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

from pipeline.artifact import Artifact, Manifest
from pipeline.parent import die_with_parent


def main() -> int:
    die_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # what libraries print goes to standard error
        asked = [Artifact(Manifest.model_validate(one["manifest"]), Path(one["blobs"])) for one in json.load(sys.stdin)]
        answer.write(json.dumps([modules_of(artifact) for artifact in asked]))
    return 0


def modules_of(artifact: Artifact) -> Counter[str]:
    """Modules by class. Raises: what transformers, or a module transform, raises for what it does not know."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipeline.runtime.torch import checkpoint_folder, trusts_code
    from pipeline.runtime.transforms import apply_transforms

    trusted = trusts_code(artifact)
    with checkpoint_folder(artifact) as folder, torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        apply_transforms(model.eval(), artifact)
    return Counter(type(module).__name__ for module in model.modules())


if __name__ == "__main__":
    sys.exit(main())
