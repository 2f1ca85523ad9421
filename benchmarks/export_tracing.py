"""What export_onnx saves where torch's program is taken apart by looking at it instead of by tracing it anew.

    python benchmarks/export_tracing.py [--layers 22] [--rounds 3]

A Llama of that many layers, narrow because tracing sees no weights, is traced in processes of their own, in turns with
and without. Both graphs are compared: they have to have the same operators after they are simplified.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.table import Table


def trace(folder: Path, looking: bool) -> None:
    """Print the seconds of tracing and of simplifying, and the operators, as JSON."""
    from passes.export import export_onnx
    from pipeline.models.source import find_source, source_artifact
    from pipeline.store import Store

    with tempfile.TemporaryDirectory() as store:
        artifact = source_artifact(find_source("path", str(folder), relative_to=folder), Store(Path(store)))
        with nullcontext() if looking else mock.patch.object(export_onnx, "by_looking", nullcontext):
            began = time.perf_counter()
            model, _, _ = export_onnx.trace(artifact, 23)
            traced = time.perf_counter()
            export_onnx.simplify(model)
        operators = Counter(node.op_type for node in model.graph)
        print(json.dumps([traced - began, time.perf_counter() - traced, sorted(operators.items())]))


def make_model(folder: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trace:
        trace(Path(given.trace[0]), given.trace[1] == "looking")
        return
    taken: dict[str, list[tuple[float, float]]] = defaultdict(list)
    graphs = set()
    draw = random.Random(0)  # noqa: S311 (an order, not a secret)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), given.layers)
        for _ in range(given.rounds):
            for how in draw.sample(["looking", "tracing"], 2):
                command = [sys.executable, __file__, "--trace", folder, how]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                traced, simplified, operators = json.loads(done.stdout.splitlines()[-1])
                taken[how].append((traced, simplified))
                graphs.add(json.dumps(operators))
    table = Table("taken apart by", "tracing it all", "simplifying")
    for how, rounds in taken.items():
        table.add_row(how, *(f"{statistics.median(seconds):.1f} s" for seconds in zip(*rounds, strict=True)))
    pairs = zip(taken["tracing"], taken["looking"], strict=True)
    ratios = [sum(slow) / sum(quick) for slow, quick in pairs]
    console = Console()
    console.print(table)
    console.print(f"{given.layers} layers; ratio of both together {min(ratios):.2f} to {max(ratios):.2f}")
    console.print("the same operators" if len(graphs) == 1 else "[red]other operators")
    sys.exit(len(graphs) != 1)


if __name__ == "__main__":
    main()
