"""Generate text with an exported student: onnxruntime, tokenizers and NumPy, no torch and no Limbeck.

limbeck export runs/quickstart --to onnx --out student-onnx
python examples/onnx/generate.py student-onnx "The history of the bridge begins" --tokens 40
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


def generate(session: onnxruntime.InferenceSession, ids: list[int], count: int) -> Iterator[int]:
    """Yield `count` tokens, the likeliest one each time: the prompt is read once, then one token a call."""
    names = [output.name for output in session.get_outputs()]
    # before the first token all states are zeros; "batch" is one text, "past" no token yet
    state = {
        i.name: np.zeros([{"batch": 1, "past": 0}.get(n, n) for n in i.shape], KINDS[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past.")
    }
    tokens = np.array([ids])
    for _ in range(count):
        inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **state}
        results = dict(zip(names, session.run(names, inputs)))
        state = {name: results[name.replace("past.", "present.")] for name in state}
        tokens = results["logits"][:, -1:].argmax(-1)
        yield int(tokens[0, 0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(args.folder / "model.onnx")
    ids = tokenizer.encode(args.prompt).ids
    print(tokenizer.decode(ids + list(generate(session, ids, args.tokens))))
