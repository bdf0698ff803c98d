"""Every output that a stock model returns, a swapped one returns too: live, loaded, restored, moved and folded.

transformers notes what a class of models can record when one of that class is constructed. A model that changes its
class has to note it itself, which a model of that class that was constructed before would hide: hence a process for
each script.
"""

import pytest

from tests.helpers.models import FAMILIES
from tests.helpers.persistence import run_fresh


# What the scripts share: all outputs of a model by name, for a dict and for a tuple, and of a generation.
_COMMON = """
import sys, torch
from pathlib import Path
from hf_normswap import calibrate, find_norms, fold_norms, restore_norm, set_norm_placement, swap_norm
from tests.helpers.models import heads, tiny_batch, tiny_model

FAMILY = sys.argv[1]
FLAGS = dict(output_hidden_states=True, output_attentions=True)

def stock(head, **overrides):
    return tiny_model(FAMILY, head, attn_implementation="eager", **overrides).eval()

def moved_model(head):
    return set_norm_placement(stock(head), "post" if FAMILY == "gpt2" else "pre", drop_final=True)

def leaves(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from leaves(item, f"{name}.{number}")

@torch.no_grad()
def outputs(model, **flags):
    batch = tiny_batch(model.eval())
    returned = model(**batch, **{**FLAGS, **flags})
    items = returned.items() if hasattr(returned, "items") else enumerate(returned)
    found = {path: value for name, item in items for path, value in leaves(item, str(name))}
    assert found
    return found

def shapes(values):
    return {name: tuple(value.shape) for name, value in values.items()}

def same(left, right, tolerance=0.0):
    assert list(left) == list(right), (sorted(left), sorted(right))
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")
"""

_LIVE = """
for head in heads(FAMILY):
    expected = outputs(stock(head))
    assert any(name.startswith(("hidden_states", "encoder_hidden_states")) for name in expected), head
    assert any("attentions" in name for name in expected), head
    same(outputs(swap_norm(stock(head), "layernorm", where="all")), expected)
    same(outputs(swap_norm(stock(head), "layernorm"), return_dict=False), outputs(stock(head), return_dict=False))
    other = swap_norm(stock(head), "batchnorm", where="all")
    assert shapes(outputs(other)) == shapes(expected), head
    folded = outputs(other)
    if any(site.block for site in find_norms(other)) and fold_norms(other).folded:
        after = outputs(other)
        assert shapes(after) == shapes(expected), head
        same({n: v for n, v in after.items() if n.endswith("logits")},
             {n: v for n, v in folded.items() if n.endswith("logits")}, 1e-4)
    same(outputs(restore_norm(swap_norm(stock(head), "rbn"))), expected)
"""

_MOVED = """
for head in heads(FAMILY):
    expected = outputs(stock(head))
    moved = moved_model(head)
    live = outputs(moved)
    assert shapes(live) == shapes(expected), head
    states = [value for name, value in live.items() if name.startswith(("hidden_states", "decoder_hidden_states"))]
    if "last_hidden_state" in live:
        torch.testing.assert_close(states[-1], live["last_hidden_state"], rtol=0, atol=0)
    swap_norm(moved, "batchnorm")
    assert shapes(outputs(moved)) == shapes(expected), head
    restore_norm(moved)
    same(outputs(moved), live)
    if FAMILY != "gpt2":  # whose final norm is a new one
        same(outputs(set_norm_placement(moved, "post", drop_final=True)), expected)
"""

_SAVE = """
for head in heads(FAMILY):
    for name, model in {"swapped": swap_norm(stock(head), "layernorm", where="all"),
                        "moved": moved_model(head)}.items():
        folder = Path(name, head)
        model.save_pretrained(folder)
        torch.save(outputs(model), folder / "outputs.pt")
"""

# No class of transformers with a head is constructed here: the swapped ones are, and restored.
_LOADED = """
from hf_normswap.modeling import modeling_normswap
for head in heads(FAMILY):
    for name in ("swapped", "moved"):
        folder = Path(name, head)
        model = getattr(modeling_normswap, "NormSwap" + head).from_pretrained(folder, attn_implementation="eager")
        expected = torch.load(folder / "outputs.pt")
        same(outputs(model), expected)
        if name == "swapped":
            same(outputs(restore_norm(model)), expected)
            assert type(model).__name__ == head
"""

_GENERATED = """
HEADS = {
    "bert": "BertLMHeadModel",
    "roberta": "RobertaForCausalLM",
    "marian": "MarianMTModel",
    "gpt2": "GPT2LMHeadModel",
}
WAYS = {
    "beams": dict(num_beams=2, num_return_sequences=2),
    "sampling": dict(do_sample=True, top_k=5),
    "assisted": dict(),
}

def generated(model, way):
    model.eval()
    batch = tiny_batch(model, lengths=(5,) if way == "assisted" else (5, 5), labels=False)
    batch.pop("decoder_input_ids", None)
    extra = dict(assistant_model=stock(HEADS[FAMILY], seed=1)) if way == "assisted" else {}
    torch.manual_seed(0)
    found = model.generate(**batch, **FLAGS, **WAYS[way], **extra, max_new_tokens=4, min_new_tokens=4,
                           return_dict_in_generate=True, output_scores=True)
    items = [(name, item) for name, item in found.items() if name != "past_key_values"]
    return {path: value for name, item in items for path, value in leaves(item, name)}

head = HEADS[FAMILY]
for way in WAYS:
    if way == "assisted" and FAMILY in ("bert", "roberta"):
        continue  # their decoders keep no cache that can be cropped here
    expected = generated(stock(head), way)
    assert any("hidden_states" in name for name in expected) and any("attentions" in name for name in expected)
    same(generated(swap_norm(stock(head), "layernorm", where="all"), way), expected)
    moved = moved_model(head)
    assert {n.split(".")[0] for n in generated(moved, way)} == {n.split(".")[0] for n in expected}
    if way == "beams":
        assert list(generated(moved, way)) == list(expected)
    same(generated(restore_norm(swap_norm(stock(head), "rmsnorm")), way), expected)
"""


# Every script in a fork of one process that has made no model: what it imports takes longer than the scripts do.
_EACH = """
import os, traceback

heads(FAMILY)

failed = []
for name, script in SCRIPTS.items():
    child = os.fork()
    if child == 0:
        try:
            exec(script, globals())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs(family, tmp_path):
    scripts = {"live": _LIVE, "moved": _MOVED, "generated": _GENERATED, "saved": _SAVE, "loaded": _LOADED}
    run_fresh(f"{_COMMON}\nSCRIPTS = {scripts!r}\n{_EACH}", tmp_path, family)
