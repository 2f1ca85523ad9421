"""Train the built-in model `llama2-tiny` on text that CPython carries, and write it as package data.

    python tools/train_llama2_tiny.py pipeline/models/builtin/llama2-tiny

Takes about 15 minutes on two cores. The text is pydoc's topics and the docstrings of the standard library
of the CPython that runs this script; MODEL_CARD.md records its version and the text's SHA-256, because another
CPython carries another text.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import math
import platform
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20261120
VOCABULARY = 4096
SEQUENCE = 512
HELD_OUT_SHARE = 16  # one document of so many is never trained on
CALIBRATION_CHARACTERS = 200_000  # of the text that it was trained on, for passes that calibrate
SKIPPED_PACKAGES = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "__pycache__"}


def python_docstrings() -> Iterator[tuple[str, str]]:
    """(module name, its docstrings joined) of each standard-library module that has Python source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_PACKAGES & set(parts) or parts[0].startswith(("config-", "lib-dynload")):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        docs = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc:
                    name = getattr(node, "name", ".".join(parts).removesuffix(".py"))
                    docs.append(f"{name}\n{doc}")
        if docs:
            yield "/".join(parts), "\n\n".join(docs)


def extension_docstrings() -> Iterator[tuple[str, str]]:
    """The same for modules written in C, whose docstrings only an import shows."""
    for name in sorted(sys.stdlib_module_names):
        if name in SKIPPED_PACKAGES or name in {"antigravity", "this"}:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except ImportError:  # modules of other operating systems
            continue
        if getattr(module, "__file__", None) and str(module.__file__).endswith(".py"):
            continue
        docs = [f"{name}\n{inspect.getdoc(module)}"] if module.__doc__ else []
        for key, value in sorted(vars(module).items()):
            members = [(key, value)]
            if inspect.isclass(value):
                members += [(f"{key}.{k}", v) for k, v in sorted(vars(value).items())]
            for label, member in members:
                doc = getattr(member, "__doc__", None)
                if isinstance(doc, str) and len(doc) > 40 and (callable(member) or inspect.isdatadescriptor(member)):
                    docs.append(f"{label}\n{inspect.cleandoc(doc)}")
        if docs:
            yield f"c/{name}", "\n\n".join(docs)


def documents() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    gathered = [(f"topic/{name}", text) for name, text in sorted(topics.items())]
    gathered += [*python_docstrings(), *extension_docstrings()]
    seen: set[str] = set()  # inherited docstrings would put the same paragraph on both sides of the split
    cleaned = []
    for name, text in gathered:
        paragraphs = []
        for paragraph in text.replace("\r\n", "\n").split("\n\n"):
            if paragraph.strip() and (paragraph not in seen or len(paragraph) < 40):
                seen.add(paragraph)
                paragraphs.append(paragraph.rstrip())
        if sum(map(len, paragraphs)) > 200:
            cleaned.append((name, "\n\n".join(paragraphs)))
    return cleaned


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=1024
    )


def sliding_nll(
    model: LlamaForCausalLM, tokens: torch.Tensor, window: int = 512, stride: int = 256
) -> tuple[float, int]:
    """Summed negative log-likelihood in nats over all tokens but the first, and how many they are.

    Every token is predicted once, with at least `window - stride` tokens before it where there are so many.
    """
    total, count, scored_up_to = 0.0, 0, 1
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, stride):
            chunk = tokens[start : start + window]
            logits = model(chunk[None]).logits[0].float()  # [S, V]
            first = scored_up_to - start
            targets = chunk[first:]
            logp = torch.log_softmax(logits[first - 1 : len(chunk) - 1], -1)
            total -= logp.gather(-1, targets[:, None]).double().sum().item()
            count += len(targets)
            scored_up_to = start + len(chunk)
            if scored_up_to >= len(tokens):
                break
    return total, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {SEQUENCE} tokens in a step")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=0.02, help="Muon's, for the hidden matrices")
    parser.add_argument("--table-learning-rate", type=float, default=3e-3, help="AdamW's, for embedding and head")
    options = parser.parse_args()

    torch.manual_seed(SEED)
    docs = documents()
    training = [text for name, text in docs if not is_held_out(name)]
    held_out_text = "\n\n".join(text for name, text in docs if is_held_out(name))
    digest = hashlib.sha256("\0".join(f"{n}\0{t}" for n, t in docs).encode()).hexdigest()
    print(f"{len(docs)} documents, {sum(len(t) for _, t in docs):,} characters, sha256 {digest}", flush=True)

    tokenizer = train_tokenizer(training)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(SEED)).tolist()
    ids: list[int] = []
    for i in order:
        ids += [*tokenizer(training[i])["input_ids"], tokenizer.eos_token_id]
    stream = torch.tensor(ids)
    held_out = torch.tensor(tokenizer(held_out_text)["input_ids"])
    held_out_bytes = len(held_out_text.encode())
    print(f"{len(stream):,} tokens to train on, {len(held_out):,} held out", flush=True)

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        attention_dropout=0.0,
    )
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters", flush=True)
    # A Llama has no dropout of its own; the text is short and read many times, so training adds it from outside
    drop = torch.nn.Dropout(options.dropout)
    for module in [model.model.embed_tokens, *(layer.mlp for layer in model.model.layers)]:
        module.register_forward_hook(lambda module, args, output: drop(output))
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: (drop(output[0]), *output[1:]))
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    tables = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" not in n]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    # Muon (Jordan et al., 2024) on the hidden matrices needs about half of AdamW's tokens for the same loss here
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=options.learning_rate, weight_decay=0.1, momentum=0.95, nesterov=True),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=options.table_learning_rate,
            betas=(0.9, 0.95),
        ),
    ]
    warm_up = 60

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = (step - warm_up) / max(1, options.steps - warm_up)
        return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(SEED)
    best, best_state, best_step, began = math.inf, None, 0, time.monotonic()
    for step in range(1, options.steps + 1):
        starts = torch.randint(0, len(stream) - SEQUENCE - 1, (options.batch,), generator=generator)
        batch = torch.stack([stream[s : s + SEQUENCE + 1] for s in starts.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 100 == 0 or step == options.steps:
            drop.eval()
            nll, _ = sliding_nll(model, held_out)
            drop.train()
            bits = nll / math.log(2) / held_out_bytes
            print(
                f"step {step}: loss {loss.item():.3f}, held out {bits:.4f} bits per byte, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
            if bits < best:
                best, best_step = bits, step
                best_state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    assert best_state is not None
    drop.eval()
    model.load_state_dict(best_state)
    model = model.to(torch.bfloat16)
    out: Path = options.output
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "held_out.txt").write_text(held_out_text, encoding="utf-8")
    calibration = "\n\n".join(training[i] for i in order)[:CALIBRATION_CHARACTERS]
    (out / "calibration.txt").write_text(calibration, encoding="utf-8")
    nll, count = sliding_nll(model.float(), held_out)  # the stored bf16 values, computed in float32
    bits, perplexity = nll / math.log(2) / held_out_bytes, math.exp(nll / count)
    (out / "training.json").write_text(
        json.dumps(
            {
                "text_sha256": digest,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "documents": len(docs),
                "train_tokens": len(stream),
                "held_out_tokens": len(held_out),
                "held_out_bytes": held_out_bytes,
                "steps": options.steps,
                "best_step": best_step,
                "batch": options.batch,
                "sequence": SEQUENCE,
                "learning_rates": [options.learning_rate, options.table_learning_rate],
                "dropout": options.dropout,
                "seed": SEED,
                "parameters": parameters,
                "held_out_bits_per_byte": round(bits, 4),
                "held_out_perplexity": round(perplexity, 4),
                "window": 512,
                "stride": 256,
            },
            indent=2,
        )
        + "\n"
    )
    (out / "MODEL_CARD.md").write_text(
        f"""# llama2-tiny

A Llama-2 (RMSNorm, SwiGLU, rotary positions, multi-head attention, byte-level BPE tokenizer) of {parameters:,}
parameters, small enough to ship with the package and trained well enough that a loss of quality shows.

| | |
| --- | --- |
| layers, hidden, intermediate, heads | 5, 256, 640, 4 |
| vocabulary, positions | {VOCABULARY}, 1024 (trained on sequences of {SEQUENCE}) |
| weights | bfloat16 safetensors |
| text | pydoc's topics and the standard library's docstrings, as CPython {platform.python_version()} carries them |
| text's SHA-256 | `{digest}` |
| licence of the text | Python Software Foundation License Version 2 |
| documents, training tokens | {len(docs):,}, {len(stream):,} |
| held out | one document in {HELD_OUT_SHARE}, by the SHA-256 of its name: {len(held_out):,} tokens, {held_out_bytes:,} bytes (`held_out.txt`) |
| calibration | the first {CALIBRATION_CHARACTERS:,} characters trained on (`calibration.txt`) |
| training | {options.steps:,} steps of {options.batch} × {SEQUENCE} tokens, Muon and AdamW, dropout {options.dropout}, seed {SEED}, best of the evaluations: step {best_step:,} |
| held-out perplexity | {perplexity:.3f} per token (window 512, stride 256) |
| held-out bits per byte | {bits:.4f} |

Made by `python tools/train_llama2_tiny.py`; `training.json` has the same figures. It completes text in the style of
Python's documentation and is of no other use.
""",
        encoding="utf-8",
    )
    print(f"best step {best_step}: {bits:.4f} bits per byte, perplexity {perplexity:.3f}")


if __name__ == "__main__":
    main()
