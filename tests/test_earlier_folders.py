"""Folders that an earlier version saved, in format 1, load and compute what they did, with and without the package.

The archive holds tiny models of four families as that version wrote them, the code that it put beside their weights
(once, as it was the same for all), and the logits that they had.
"""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tests.helpers.persistence import run_fresh


ARCHIVE = Path(__file__).parent / "data" / "saved_in_format_1.zip"
LOAD = """
import json
import sys
from pathlib import Path

import torch
import transformers
{imports}

folder = Path(sys.argv[1])
expected = json.loads((folder / "expected.json").read_text())
inputs = {{name: torch.tensor(expected[name]) for name in ("input_ids", "attention_mask")}}
logits = {{}}
for name in expected["logits"]:
    config = transformers.AutoConfig.from_pretrained(folder / name, trust_remote_code={trusts})
    head = config.architectures[0].removeprefix("NormSwap")
    auto = {{
        "BertForSequenceClassification": "AutoModelForSequenceClassification",
        "RobertaForMaskedLM": "AutoModelForMaskedLM",
        "MarianMTModel": "AutoModelForSeq2SeqLM",
        "GPT2LMHeadModel": "AutoModelForCausalLM",
    }}[head]
    model = getattr(transformers, auto).from_pretrained(folder / name, trust_remote_code={trusts}).eval()
    decoder = {{"decoder_input_ids": inputs["input_ids"]}} if "Marian" in head else {{}}
    with torch.no_grad():
        logits[name] = model(**inputs, **decoder).logits.tolist()
(folder / "found.json").write_text(json.dumps(logits))
"""


@pytest.mark.parametrize("package", [True, False], ids=["with_the_package", "without_it"])
def test_they_compute_what_they_did(package, tmp_path):
    folder = tmp_path / "saved"
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["logits"]
    for name in expected:
        shutil.copytree(folder / "code", folder / name, dirs_exist_ok=True)
    imports = "import hf_normswap" if package else ""
    run_fresh(LOAD.format(imports=imports, trusts=not package), tmp_path, folder, package=package)
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert len(found) == len(expected) == 8
    for name, logits in found.items():
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(expected[name]), rtol=1e-5, atol=1e-6)
