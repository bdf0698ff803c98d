"""Modules around swapped models: statistics estimated afresh, and the progressive swap, of every part."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from transformers import EncoderDecoderModel, Trainer, TrainerCallback

from hf_normswap import (
    BatchNorm,
    NormSwapTrainer,
    ProgressiveSwapCallback,
    find_norms,
    reestimate_statistics,
    swap_norm,
)
from hf_normswap.core.statistics import statistic_norms
from hf_normswap.modeling.replace import layer_norm_shares, set_layer_norm_share
from tests.helpers.calibration import batches, states
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import is_one_sentence, train
from tests.helpers.surgery import blends
from tests.helpers.trainer import arguments


def tower(seed=0, norm="batchnorm"):
    return swap_norm(tiny_model("bert", "BertModel", seed=seed).double(), norm, where="all")


class Towers(nn.Module):
    """Two models, with inputs of their own names."""

    def __init__(self, *towers):
        super().__init__()
        self.towers = nn.ModuleList(towers or (tower(1), tower(2)))  # so that their names have numbers

    def encode(self, index, ids, mask):
        return self.towers[index](ids, attention_mask=mask).pooler_output

    def forward(self, query, query_mask, passage=None, passage_mask=None):
        queries = self.encode(0, query, query_mask)
        if passage is None:
            return {"logits": queries}
        scores = queries @ self.encode(1, passage, passage_mask).T
        return {"loss": nn.functional.cross_entropy(scores, torch.arange(len(scores)))}


class Siamese(Towers):
    """One model that is called twice."""

    def __init__(self):
        super().__init__(tower())

    def encode(self, index, ids, mask):
        return super().encode(0, ids, mask)


class Chained(Towers):
    """The second model reads what the first one returns."""

    def forward(self, query, query_mask, **others):
        inside = self.towers[0](query, attention_mask=query_mask).last_hidden_state
        return self.towers[1](inputs_embeds=inside, attention_mask=query_mask).last_hidden_state


class Headed(Towers):
    """With norms of its own on top, which read the same with masks of their own."""

    def __init__(self):
        super().__init__(tower())
        self.norm, self.first = BatchNorm(16).double(), BatchNorm(16).double()

    def forward(self, query, query_mask, **others):
        x = self.towers[0](query, attention_mask=query_mask).last_hidden_state
        return self.norm(x, query_mask.bool()) + self.first(x, mask=of_first(query_mask).bool())


def of_first(mask):
    """Of the first two tokens alone."""
    return mask * (torch.arange(mask.shape[1]) < 2)


def tower_batches(count=4):
    result = []
    for seed in range(count):
        queries = tiny_batch(tower(), (6, 3, 5), seed=seed, labels=False)
        passages = tiny_batch(tower(), (9, 7, 4), columns=11, filler=7, seed=seed + 20, labels=False)
        batch = {"query": queries["input_ids"], "query_mask": queries["attention_mask"]}
        result.append({**batch, "passage": passages["input_ids"], "passage_mask": passages["attention_mask"]})
    return result


@torch.no_grad()
def assert_statistics_are_those_of_inputs(model, data, masks_of):
    """Running values are the moments of what reaches the norms; `masks_of(name, batch)` has the mask of each call."""
    norms = {name: module for name, module in model.named_modules() if module in statistic_norms(model)}
    seen = {name: [] for name in norms}

    def note(module, args, name):
        mask = masks.pop(0) if (masks := pending[name]) else None
        seen[name].append(args[0].flatten(0, -2) if mask is None else args[0][mask.bool()])

    handles = [
        norm.register_forward_pre_hook(lambda module, args, name=name: note(module, args, name))
        for name, norm in norms.items()
    ]
    for batch in data:
        pending = {name: list(masks_of(name, batch)) for name in norms}
        model(**batch)
        assert not any(pending.values())
    for handle in handles:
        handle.remove()
    for name, norm in norms.items():
        x = torch.cat(seen[name]).numpy()
        np.testing.assert_allclose(norm.running_mean, x.mean(0), rtol=1e-9, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(norm.running_var, x.var(0), rtol=1e-9, atol=1e-9, err_msg=name)
    assert norms


def of_towers(name, batch):
    masks = [batch["query_mask"]] if name.startswith("towers.0") else []
    return [*masks, batch["passage_mask"]] if name.startswith("towers.1") and "passage" in batch else masks


# Statistics


def test_two_towers():
    model, data = Towers().eval(), tower_batches()
    reestimate_statistics(model, data)
    assert_statistics_are_those_of_inputs(model, data, of_towers)
    assert all(norm.num_batches_tracked == 1 for norm in statistic_norms(model))
    again = copy.deepcopy(model)
    reestimate_statistics(again, iter(data[::-1]), memory_budget=0)  # in another order, and with all of it on disk
    for name, value in states(model).items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(states(again)[name], value, rtol=1e-9, atol=1e-11)


def test_every_call_of_a_model_counts():
    model, data = Siamese().eval(), tower_batches()
    reestimate_statistics(model, data)
    assert_statistics_are_those_of_inputs(model, data, lambda name, b: [b["query_mask"], b["passage_mask"]])


def test_a_model_that_not_every_batch_reaches():
    model, data = Towers().eval(), tower_batches()
    for batch in (data[0], data[2]):
        del batch["passage"], batch["passage_mask"]
    reestimate_statistics(model, data)
    assert_statistics_are_those_of_inputs(model, data, of_towers)


def test_a_model_that_reads_what_another_returns():
    model, data = Chained().eval(), tower_batches()
    reestimate_statistics(model, data)
    assert_statistics_are_those_of_inputs(model, data, lambda name, batch: [batch["query_mask"]])


def test_norms_beside_the_models_and_their_masks():
    model, data = Headed().eval(), tower_batches()
    reestimate_statistics(model, data)

    def masks_of(name, batch):
        return [of_first(batch["query_mask"]) if name == "first" else batch["query_mask"]]

    assert_statistics_are_those_of_inputs(model, data, masks_of)


def test_a_part_that_was_swapped_alone():
    model = tiny_model("bert").double().eval()
    swap_norm(model.bert, "batchnorm", where="all")
    data = batches(model)
    reestimate_statistics(model, data)
    assert_statistics_are_those_of_inputs(model, data, lambda name, batch: [batch["attention_mask"]])


def pair(norm="batchnorm"):
    """An encoder-decoder pair of two models that were swapped."""
    encoder = swap_norm(tiny_model("bert", "BertModel", seed=1).double(), norm, where="all")
    decoder = tiny_model("bert", "BertLMHeadModel", seed=2, add_cross_attention=True).double()
    model = EncoderDecoderModel(encoder=encoder, decoder=swap_norm(decoder, norm, where="all"))
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model.eval()


def pair_batches(count=3):
    result = []
    for seed in range(count):
        batch = tiny_batch(tower(), (6, 3, 5), seed=seed, labels=False)
        ids = tiny_batch(tower(), (7, 7, 7), seed=seed + 20, labels=False)["input_ids"]
        mask = {"decoder_attention_mask": torch.ones_like(ids)}
        result.append({**batch, "decoder_input_ids": ids, "labels": ids.roll(-1, 1), **mask})
    return result


def test_an_encoder_decoder_pair():
    model, data = pair(), pair_batches()
    reestimate_statistics(model, data)

    def masks_of(name, batch):
        return [batch["attention_mask" if name.startswith("encoder.") else "decoder_attention_mask"]]

    assert_statistics_are_those_of_inputs(model, data, masks_of)
    assert len([name for name, _ in model.named_modules() if name.endswith("crossattention.output.LayerNorm")]) == 2
    assert model.config.to_dict() == pair().config.to_dict()


def test_an_adapter_around_a_swapped_model():
    peft = pytest.importorskip("peft", minversion="0.21")
    base = swap_norm(tiny_model("bert").double(), "batchnorm", where="all")
    names = [site.name for site in find_norms(base)]
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], modules_to_save=names)).double().eval()
    data = batches(base)
    before = states(base)
    reestimate_statistics(model, data)
    for name, value in states(base).items():
        is_statistic = "modules_to_save" in name and not name.endswith(("weight", "bias"))
        assert torch.equal(value, before[name]) != is_statistic, name
    expected = states(base)
    reestimate_statistics(base, data)
    for name, value in states(base).items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_what_fails_in_one_model_leaves_all_as_they_were():
    model, data = train_towers(Towers()), tower_batches()
    with torch.no_grad():
        model.towers[1].encoder.layer[1].output.dense.weight.fill_(torch.nan)
    before = states(model)
    with pytest.raises(ValueError, match=r"towers\.1\.encoder\.layer\.1\.output\.LayerNorm are not finite") as caught:
        reestimate_statistics(model, data)
    assert is_one_sentence(caught.value)
    assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in states(model).items())


def train_towers(model):
    for batch in tower_batches():
        model.train()(**batch)
    return model.eval()


def empty(batch):
    return {name: torch.zeros_like(value) if "mask" in name else value for name, value in batch.items()}


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        (lambda model: model.towers[1].train(), None, "training mode"),
        (lambda model: set_layer_norm_share(model.towers[1], 0.5), None, "finish the progressive swap"),
        (lambda model: model.to("meta"), None, "on the meta device"),
        (lambda model: None, [], "data is empty"),
        (lambda model: None, [empty(batch) for batch in tower_batches(1)], "No real token reaches towers.0.embed"),
        (lambda model: None, ["some text"], "pass batches, dictionaries"),
    ],
)
def test_bad_input_is_refused_and_the_models_untouched(change, data, message):
    model = train_towers(Towers())
    change(model)
    before = states(model)
    with pytest.raises(ValueError, match=message) as caught:
        reestimate_statistics(model, tower_batches() if data is None else data)
    assert is_one_sentence(caught.value)
    assert all(value.is_meta or torch.equal(value, before[name]) for name, value in states(model).items())


def test_what_has_no_swapped_model_in_it_is_refused():
    stock = tiny_model("bert")
    for model in (nn.Linear(2, 2), Towers(stock, stock), stock):
        with pytest.raises(ValueError, match="model of transformers, not of|no swapped norms") as caught:
            reestimate_statistics(model.eval(), tower_batches())
        assert is_one_sentence(caught.value)


# Averages of weights


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}], ids=["SWA", "EMA"])
def test_an_average_of_weights_has_the_statistics_of_its_own(average):
    model = swap_norm(tiny_model("bert").double(), "batchnorm", where="all")
    averaged, data = AveragedModel(model, **average), batches(model)
    for _ in range(3):
        train(model, batches=1)
        averaged.update_parameters(model)
    before = states(averaged)
    update_bn([batch["input_ids"] for batch in data], averaged)  # looks for the classes of PyTorch
    assert all(torch.equal(value, before[name]) for name, value in states(averaged).items())
    reestimate_statistics(averaged.eval(), data)
    assert_statistics_are_those_of_inputs(averaged.module, data, lambda name, batch: [batch["attention_mask"]])


def test_an_average_of_two_towers():
    averaged, data = AveragedModel(Towers()).eval(), tower_batches()
    reestimate_statistics(averaged, data)
    assert_statistics_are_those_of_inputs(averaged.module, data, of_towers)


# The progressive swap


class Shares(TrainerCallback):
    """λ of the norms of every model, in every step."""

    def __init__(self, *names):
        self.names, self.seen = names, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parts = [model.get_submodule(name) for name in self.names]
        self.seen.append([list(layer_norm_shares(part).values()) for part in parts])


def progress(model, examples, tmp_path, cls=NormSwapTrainer, names=("towers.0", "towers.1"), collate=None, **options):
    shares = Shares(*names)
    callbacks = [ProgressiveSwapCallback(ratio=1.0, **options), shares]
    settings = arguments(tmp_path, max_steps=4, remove_unused_columns=False, learning_rate=1e-3)
    trainer = cls(model, settings, train_dataset=examples, callbacks=callbacks, data_collator=collate)
    trainer.train()
    return trainer, shares.seen


def examples_of(data):
    return [{name: value[row] for name, value in batch.items()} for batch in data for row in range(3)]


@pytest.mark.parametrize("cls", [Trainer, NormSwapTrainer])
def test_layernorm_gives_way_in_both_towers(cls, tmp_path):
    model = Towers()
    model.towers[1].embeddings.eval()  # a part that stays in evaluation, if its user says so
    data = tower_batches(4)
    trainer, seen = progress(model, examples_of(data), tmp_path, cls)
    assert seen == [2 * [5 * [share]] if share else 2 * [[]] for share in (1.0, 0.75, 0.5, 0.25)]
    assert not blends(model)
    assert not any("layer_norm_share" in tower.config.norm_swap for tower in model.towers)
    if cls is NormSwapTrainer:
        logged = [entry["layer_norm_share"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged == [1.0, 0.75, 0.5, 0.25]
    # All examples are in the batches of the end.
    assert_statistics_are_those_of_inputs(model.eval(), data, of_towers)


def test_one_norm_after_the_other_goes_on_from_tower_to_tower(tmp_path):
    _, seen = progress(Towers(), examples_of(tower_batches()), tmp_path, order="forward")
    assert [[len(shares) for shares in step] for step in seen] == [[5, 5], [3, 5], [0, 5], [0, 3]]
    _, seen = progress(Towers(), examples_of(tower_batches()), tmp_path, order="backward")
    assert [[len(shares) for shares in step] for step in seen] == [[5, 5], [5, 3], [5, 0], [3, 0]]


def test_the_progressive_swap_of_an_encoder_decoder_pair(tmp_path):
    model, data = pair(), pair_batches(4)
    _, seen = progress(model, examples_of(data), tmp_path, names=("encoder", "decoder"))
    assert [[len(shares) for shares in step] for step in seen] == 4 * [[5, 8]]
    assert not blends(model)

    def masks_of(name, batch):
        return [batch["attention_mask" if name.startswith("encoder.") else "decoder_attention_mask"]]

    assert_statistics_are_those_of_inputs(model.eval(), data, masks_of)


def test_a_pair_that_is_saved_on_the_way_is_a_mixture(tmp_path):
    model = pair()
    for part in (model.encoder, model.decoder):
        set_layer_norm_share(part, 0.5)
    model.save_pretrained(tmp_path)
    loaded = EncoderDecoderModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    (batch,) = pair_batches(1)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert set(layer_norm_shares(loaded.decoder).values()) == {0.5}


class Contrastive(NormSwapTrainer):
    """Calls the model by itself, with inputs that its forward does not know."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        left, right = (model(inputs[name]).pooler_output for name in ("query", "passage"))
        return (left - right).square().mean()


class WithoutForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([tower(1), tower(2)])


def calibrated_second():
    model = Towers()
    model.towers[1].config.norm_swap["calibration"] = {}
    return model


def adapted_second():
    peft = pytest.importorskip("peft", minversion="0.21")
    return Towers(tower(1), peft.get_peft_model(tower(2), peft.LoraConfig(target_modules=["query"])))


@pytest.mark.parametrize(
    ("model", "cls", "message"),
    [
        (tower, Contrastive, "its forward cannot read them"),
        (WithoutForward, Contrastive, "its forward cannot read them"),
        (calibrated_second, NormSwapTrainer, "Calibration has fitted"),
        (adapted_second, NormSwapTrainer, "share of LayerNorm"),
        (lambda: Towers(tiny_model("bert"), tiny_model("bert")), NormSwapTrainer, "has no swapped norms"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_before_the_first_step(model, cls, message, tmp_path):
    model = model()
    before = states(model)
    with pytest.raises(ValueError, match=message) as caught:
        progress(model, examples_of(tower_batches()), tmp_path, cls)
    assert is_one_sentence(caught.value), caught.value
    assert all(torch.equal(value, before[name]) for name, value in states(model).items())
    assert not blends(model)


def test_looking_at_an_example_changes_no_random_state(tmp_path):
    """Batches, which are drawn at random too, are those of a run without the callback."""
    drawn = []

    def draw(rows):
        drawn[-1].append(torch.rand(()).item() + np.random.rand() + random.random())
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    for callbacks in ([], [ProgressiveSwapCallback(statistics_batches=1)]):
        drawn.append([])
        model = swap_norm(tiny_model("bert", "BertForSequenceClassification"), "batchnorm")
        examples = examples_of([tiny_batch(model, (6, 3, 5))])
        settings = arguments(tmp_path, remove_unused_columns=False)
        Trainer(model, settings, train_dataset=examples, data_collator=draw, callbacks=callbacks).train()
    without, within = drawn
    assert len(without) == 2
    assert within[1:3] == without  # behind the example that is looked at
