"""Makes tests/runtime/tiny_models.py and fused_llama.py beside this file importable by their names."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent

for name, folder in (("tiny_models", HERE.parent / "runtime"), ("fused_llama", HERE)):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
