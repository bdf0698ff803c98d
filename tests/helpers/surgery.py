"""What is in a model: all that a refused call must leave alone, and its blends."""

import re

import pytest

from hf_normswap.modeling.replace import LayerNormBlend
from tests.helpers.persistence import clone, is_one_sentence, same


def state(model):
    """What a refused swap must leave alone: modules, values, class, configuration, hooks."""
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    tensors = clone(model.state_dict().items())
    return tensors, [type(model), model.config, model.config.to_dict(), modules, parameters, hooks]


def refuses(model, call, match):
    """`call` raises one sentence that has `match` in it, and the model stays what it was."""
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(match)) as caught:
        call()
    assert is_one_sentence(caught.value), caught.value
    after = state(model)
    assert same(before[0], after[0])
    assert before[1] == after[1]
    return str(caught.value)


def blends(model):
    """The blends of LayerNorm and its successor that are under way."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, LayerNormBlend)]
