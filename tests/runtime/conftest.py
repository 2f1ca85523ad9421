"""Makes tests/runtime/tiny_models.py importable as `tiny_models`."""

import importlib.util
import sys
from pathlib import Path

if "tiny_models" not in sys.modules:
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny_models.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tiny_models"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tiny_models"])
