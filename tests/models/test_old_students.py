"""Students and a run that Limbeck 0.1 saved, before its modules moved, open, generate and resume."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.paths import ROOT
from limbeck import LimbeckError, Recipe, distill
from limbeck.core.storage import read_manifest

STUDENTS = ROOT / "tests" / "fixtures" / "students_of_0.1"
RUN = ROOT / "tests" / "fixtures" / "run_of_0.1"
NAMES = sorted(path.parent.name for path in STUDENTS.glob("*/config.json"))
REMOTE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
assert "limbeck" not in sys.modules
said = {}
for folder, tokens in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    ids = torch.tensor([tokens])
    said[folder] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)[0, ids.shape[1]:].tolist()
print(json.dumps(said))
"""


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_old_students_say_what_they_said(name):
    expected = json.loads((STUDENTS / "expected" / f"{name}.json").read_text(encoding="utf-8"))
    tensors = load_file(STUDENTS / "expected" / f"{name}.safetensors")
    folder = STUDENTS / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=name == "own_mixer")
    ids = AutoTokenizer.from_pretrained(folder)(expected["prompt"], return_tensors="pt").input_ids
    assert ids[0].tolist() == expected["input_ids"]
    torch.testing.assert_close(model(ids).logits, tensors["logits"], atol=1e-4, rtol=1e-4)
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    new = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
    assert new.tolist() == expected["new_tokens"]


@pytest.mark.slow
def test_old_students_open_by_the_code_beside_them_alone(tmp_path):
    """Their file imports `limbeck.model.student`, a module that there is no more."""
    expected = {}
    for name in NAMES:
        assert "limbeck.model.student" in (STUDENTS / name / "modeling_limbeck.py").read_text(encoding="utf-8")
        expected[str(STUDENTS / name)] = json.loads(
            (STUDENTS / "expected" / f"{name}.json").read_text(encoding="utf-8")
        )
    prompts = {folder: one["input_ids"] for folder, one in expected.items()}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", REMOTE, json.dumps(prompts)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said == {folder: one["new_tokens"] for folder, one in expected.items()}


def test_an_old_run_is_known_as_complete(tmp_path, monkeypatch, capsys):
    """Its recipe has the old keys: the recipe is read under today's, and the run is neither repeated nor refused."""
    run = tmp_path / "old_run"
    shutil.copytree(RUN, run)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(LimbeckError, match="unknown key"):
        Recipe.load(str(shutil.copy(run / "recipe.yaml", tmp_path / "mine.yaml")))
    recipe = Recipe.load(str(run / "recipe.yaml"), stored=True)
    assert recipe.stages[-1].batch_size
    summary = distill(recipe)
    assert summary["run"] == "old_run"
    assert "not checked for changes" in capsys.readouterr().err  # teacher and text are not here
    assert all(path.read_bytes() == text for path, text in before.items())
    assert read_manifest(run)["teacher"]["tensors"]
