"""The notebooks of examples/: what is committed is small and clean, and each runs in a small setting."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MAX_BYTES = 150_000
PRIVATE = re.compile(r"(?<![\w.])/(?:root|home|tmp|Users|work|opt|usr)/|\x1b\[")  # absolute paths, terminal codes
# for a random teacher and the project's own documents as text
SMALL = {
    "distill_your_own_model.ipynb": {"DOCUMENTS": 8, "TOKENS": 256, "LENGTH": 64},
    "compare_mixers.ipynb": {"TOKENS": 3072, "SEEDS": [0]},
    "write_a_mixer.ipynb": {"TOKENS": 3072, "FAMILIES": ["llama"]},
}


def read(name):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def cells_of(notebook, kind):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def tags_of(cell):
    return cell["metadata"].get("tags", [])


def test_there_are_notebooks():
    assert set(NOTEBOOKS) == set(SMALL)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_whole_and_clean(name):
    assert (FOLDER / name).stat().st_size < MAX_BYTES
    cells = cells_of(read(name), "code")
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]  # run once, from top to bottom
    for cell in cells:
        for output in cell["outputs"]:
            text = json.dumps(output, ensure_ascii=False)
            assert not PRIVATE.search(text), text[:300]
            assert output.get("name") != "stderr", text[:300]
            if output["output_type"] == "error":
                assert "raises-exception" in tags_of(cell)
                assert len(output["traceback"]) < 8
    assert sum("parameters" in tags_of(cell) for cell in cells) == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(name):
    for cell in cells_of(read(name), "markdown"):
        for target in re.findall(r"\]\(([^)#]+)\)", "".join(cell["source"])):
            assert target.startswith("https://") or (FOLDER / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path, own_cache, teacher_folder):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    import nbformat

    notebook = nbformat.read(FOLDER / name, as_version=4)
    texts = str(ROOT / "docs" / "guides")
    values = {"TEACHER": str(teacher_folder), "TEXT": texts, **SMALL[name]}
    if name == "compare_mixers.ipynb":
        values["TEXT"] = [texts]
    (parameters,) = (cell for cell in notebook.cells if "parameters" in tags_of(cell))
    assert set(re.findall(r"^(\w+) =", parameters.source, re.M)) == set(values)
    parameters.source = "\n".join(f"{key} = {value!r}" for key, value in values.items())
    paths = [str(ROOT / "src"), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LIMBECK_CACHE": str(own_cache), "OMP_NUM_THREADS": "1"}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=env)  # a cell that fails, and is not marked to, raises
    assert Path(tmp_path / "runs").is_dir()
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells], ensure_ascii=False)
    assert "stderr" not in shown
    assert "already complete" not in shown
    if name == "compare_mixers.ipynb":  # a study's log has a line for each arm, not one for each of its bars
        assert "arms done" in shown
        assert not re.search(r"(calibrate|hidden|logits|evaluate): \d", shown)
