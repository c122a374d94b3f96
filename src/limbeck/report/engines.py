"""The model card's section on other engines: which files run where, how near they are to the student, how to run each.

    text = describe_engines("owner/name", [("export/gguf", record)])        # Markdown; "" without exports

Figures come from the exports' records (`limbeck.models.export.record`). What was not measured is said.
"""

from collections.abc import Sequence

from limbeck.core.console import format_bytes
from limbeck.models.export.record import ExportRecord
from limbeck.report.privacy import strip_local_paths
from limbeck.report.text_tables import format_code_span, format_markdown_table

PROMPT = "Once upon a time"
PLAIN = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {{"subfolder": "{folder}"}}
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", **folder)
model = AutoModelForCausalLM.from_pretrained("{repo_id}", **folder)
ids = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```"""
LLAMA_CPP = """```
hf download {repo_id} {file} --local-dir .
llama-completion -m {file} -p "{prompt}" -n 40       # continues a text
llama-cli -m {file}                                  # a conversation
```"""
ONNX = """```
pip install onnxruntime tokenizers huggingface_hub
hf download {repo_id} --include "{folder}/*" --local-dir .
```

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("{folder}/tokenizer.json")
session = onnxruntime.InferenceSession("{folder}/model.onnx")
kinds = {{"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}}
names = [output.name for output in session.get_outputs()]
state = {{
    i.name: np.zeros([{{"batch": 1, "past": 0}}.get(n, n) for n in i.shape], kinds[i.type])
    for i in session.get_inputs()
    if i.name.startswith("past.")
}}
ids = tokenizer.encode("{prompt}").ids
tokens = np.array([ids])
for _ in range(40):
    inputs = {{"input_ids": tokens, "attention_mask": np.ones_like(tokens), **state}}
    results = dict(zip(names, session.run(names, inputs)))
    state = {{name: results[name.replace("past.", "present.")] for name in state}}
    tokens = results["logits"][:, -1:].argmax(-1)
    ids.append(int(tokens[0, 0]))
print(tokenizer.decode(ids))
```"""
# by format: its name in a heading, and the commands
COMMANDS = {
    "gguf": ("llama.cpp", LLAMA_CPP),
    "qwen3_5": ("transformers without limbeck", PLAIN),
    "onnx": ("onnxruntime", ONNX),
}


def describe_engines(repo_id: str, exports: Sequence[tuple[str, ExportRecord]]) -> str:
    """Write the section for exports, given as folders in the repository and records; "" without any."""
    if not exports:
        return ""
    rows = [
        [
            COMMANDS[record.format][0],
            format_code_span(f"{folder}/{name_main_file(record)}"),
            record.quantization,
            format_bytes(record.size),
            _format_difference(record),
            _format_perplexity(record),
        ]
        for folder, record in exports
    ]
    columns = ["engine", "file", "weights", "size", "difference of a logit", "perplexity"]
    parts = [
        "## Other engines",
        "The same model in other formats, written by `limbeck export`. Differences are from the student in this "
        "repository, with the tokens read at once and one by one.",
        format_markdown_table(columns, rows, num_text_columns=3).rstrip(),
    ]
    parts += [_describe_scores(exports)] if any(record.score for _, record in exports) else []
    for kind in dict.fromkeys(record.format for _, record in exports):
        folder, record = next((folder, record) for folder, record in exports if record.format == kind)
        engine, commands = COMMANDS[kind]
        file = f"{folder}/{name_main_file(record)}"
        text = commands.format(repo_id=repo_id, folder=folder, file=file, prompt=PROMPT)
        parts.append(f"{engine[0].upper() if kind != 'gguf' else engine[0]}{engine[1:]}:\n\n{text}")
    return "\n\n".join(parts)


def name_main_file(record: ExportRecord) -> str:
    """Return the name of an export's largest file, the one with the weights."""
    return max(record.files, key=lambda name: record.files[name]["bytes"])


def _format_difference(record: ExportRecord) -> str:
    found = record.verification
    if found is None:
        return "not verified"
    largest = max(found.prompt_difference, found.step_difference)
    return f"{largest:.2g}, typically {found.typical_difference:.2g} (standard deviation {found.logit_deviation:.2g})"


def _format_perplexity(record: ExportRecord) -> str:
    return "not measured" if record.score is None else f"{record.score.perplexity:.2f}"


def _describe_scores(exports: Sequence[tuple[str, ExportRecord]]) -> str:
    scores = [record.score for _, record in exports if record.score is not None]
    # a text may be a file on this machine, which is named without its folder
    texts = {(strip_local_paths(s.text), s.targets, s.student_perplexity) for s in scores}
    return " ".join(
        f"Perplexity is of {targets:,} tokens of {format_code_span(text)}, computed by the engine; the student's own "
        f"on the same tokens is {own:.2f}."
        for text, targets, own in sorted(texts)
    )
