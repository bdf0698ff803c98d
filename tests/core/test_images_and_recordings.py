"""Images and recordings as batches: what the processor makes of them, alone; of a wrong kind, what to pass."""

import importlib.util

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from transformers import (
    BertTokenizer,
    CLIPProcessor,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

from hf_normswap import calibrate, make_batches, swap_norm
from hf_normswap.core.data import complete_batches
from tests.helpers.architectures import tiny_architecture
from tests.helpers.calibration import WORDS, states
from tests.helpers.models import tiny_model
from tests.helpers.persistence import is_one_sentence


RATE = 16000
RNG = np.random.default_rng(0)
IMAGES = [Pictures.fromarray(RNG.integers(0, 256, (9 + row, 12, 3), dtype=np.uint8)) for row in range(5)]
WAVES = [RNG.standard_normal(length).astype(np.float32) for length in (300, 200, 420)]
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})
# Three frames of ten samples each, as the tiny Whisper reads twenty of them.
MELS = WhisperFeatureExtractor(feature_size=8, hop_length=10, chunk_length=1, n_fft=40, sampling_rate=200)
EXTRACTOR = Wav2Vec2FeatureExtractor(return_attention_mask=True)
TOKENIZER = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=24)


@pytest.fixture(scope="module")
def vit():
    return tiny_architecture("vit")[0]


def picture_set(images=IMAGES, **more):
    columns = {"image": images, "label": list(range(len(images))), **more}
    return Dataset.from_dict(columns).cast_column("image", Image())


# Images


def test_images_become_what_the_processor_makes_of_them(vit):
    """In their order; a list, and a data set with other columns."""
    expected = PROCESSOR(images=IMAGES, return_tensors="pt")["pixel_values"]
    for data in (IMAGES, tuple(IMAGES), iter(IMAGES), picture_set(), picture_set(caption=["word1"] * 5)):
        batches = make_batches(vit, data, PROCESSOR, batch_size=2)
        assert [len(batch["pixel_values"]) for batch in batches] == [2, 2, 1]
        assert all(batch.keys() == {"pixel_values"} for batch in batches)
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_colours_are_those_of_the_model(vit, mode):
    images = [image.convert(mode) for image in IMAGES]
    (batch,) = make_batches(vit, images, PROCESSOR)
    expected = PROCESSOR(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


def test_a_model_of_grey_images():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4, num_channels=1
    )
    vit = swap_norm(ViTForImageClassification(config).eval(), "batchnorm", where="all")
    grey = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.25])
    (batch,) = make_batches(vit, IMAGES, grey)
    assert batch["pixel_values"].shape == (5, 1, 16, 16)
    small = np.asarray(IMAGES[0].convert("L").resize((16, 16), Pictures.Resampling.BILINEAR), dtype=np.float32)
    torch.testing.assert_close(batch["pixel_values"][0, 0], torch.from_numpy((small / 255 - 0.5) / 0.25))
    assert len(calibrate(vit, IMAGES, tokenizer=grey)) == 5


def test_pixels_of_a_data_set_stay_as_they_are(vit):
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for style in (None, "torch", "numpy"):
        data = Dataset.from_dict({"pixel_values": pixels.numpy(), "label": range(5)}).with_format(style)
        batches = make_batches(vit, data, batch_size=3)
        assert [len(batch["pixel_values"]) for batch in batches] == [3, 2]
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), pixels)


@pytest.mark.parametrize("name", ["vit", "convnext", "siglip"])
def test_calibration_on_images_is_that_on_their_batches(name):
    found, expected = (swap_norm(tiny_architecture(name)[0], "batchnorm", where="all") for _ in range(2))
    calibrate(found, picture_set(), tokenizer=PROCESSOR)
    calibrate(expected, [dict(PROCESSOR(images=IMAGES, return_tensors="pt"))])
    assert all(torch.equal(value, states(expected)[key]) for key, value in states(found).items())


# Recordings


def test_recordings_become_what_the_feature_extractor_makes_of_them():
    """Of similar length together, padded to the longest of a batch."""
    model, _ = tiny_architecture("wav2vec2")
    ordered = [WAVES[1], WAVES[0], WAVES[2]]
    expected = [
        EXTRACTOR(group, sampling_rate=RATE, padding=True, return_tensors="pt") for group in (ordered[:2], ordered[2:])
    ]
    lists = Dataset.from_dict({"wave": WAVES}, Features({"wave": List(Value("float32"))}))
    dictionaries = [{"array": wave, "sampling_rate": RATE, "path": None} for wave in WAVES]
    tensors = list(map(torch.from_numpy, WAVES))
    for data in (WAVES, tensors, [wave.tolist() for wave in WAVES], dictionaries, lists):
        batches = make_batches(model, data, EXTRACTOR, batch_size=2)
        assert len(batches) == 2
        for batch, other in zip(batches, expected):
            assert batch.keys() == {"input_values", "attention_mask"}
            torch.testing.assert_close(batch["input_values"], other["input_values"])
            assert torch.equal(batch["attention_mask"].long(), other["attention_mask"].long())


def test_whisper_gets_the_length_that_it_needs():
    model, _ = tiny_architecture("whisper")
    (batch,) = make_batches(model, [wave[:150] for wave in WAVES], MELS)
    assert batch["input_features"].shape == (3, 8, 20)
    processor = WhisperProcessor(MELS, TOKENIZER)
    (other,) = make_batches(model, [wave[:150] for wave in WAVES], processor)
    assert torch.equal(other["input_features"], batch["input_features"])


def test_features_of_a_data_set_are_padded_and_labels_kept():
    waves = {"input_values": [wave.tolist() for wave in WAVES], "labels": [[5], [6, 7], [8]]}
    (batch,) = make_batches(tiny_architecture("wav2vec2")[0], Dataset.from_dict(waves), EXTRACTOR)
    assert batch["input_values"].shape == (3, 420)
    assert batch["attention_mask"].sum(-1).tolist() == [200, 300, 420]
    mels = {"input_features": RNG.standard_normal((3, 8, 20)), "labels": [[5], [6, 7], [8]]}
    (batch,) = make_batches(tiny_architecture("whisper")[0], Dataset.from_dict(mels), MELS)
    assert batch["labels"].tolist() == [[5, -100], [6, 7], [8, -100]]
    torch.testing.assert_close(batch["input_features"], torch.tensor(mels["input_features"]).float())


@pytest.mark.parametrize("name", ["whisper", "t5", "bart", "marian"])
def test_a_decoder_without_labels_reads_its_own_greedy_output(name):
    """The reference asks the model for the next token, one at a time."""
    model, batch = tiny_architecture(name, seed=2)
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "decoder_input_ids")}
    (completed,) = complete_batches(model, [inputs])
    labels = completed["labels"]
    tokens = torch.full((len(labels), 1), model.config.decoder_start_token_id)
    ended = torch.zeros(len(labels), dtype=torch.bool)
    for step in range(labels.shape[1]):
        with torch.no_grad():
            best = model(**inputs, decoder_input_ids=tokens).logits[:, -1].argmax(-1)
        if name in ("bart", "marian") and step == labels.shape[1] - 1:  # forced to end at the limit
            break
        right = labels[:, step] == best.masked_fill(best == model.config.pad_token_id, -100)
        assert bool((right | ended).all()), step
        ended |= best == model.config.eos_token_id
        tokens = torch.cat([tokens, best.masked_fill(ended, model.config.pad_token_id)[:, None]], 1)
    assert len(calibrate(swap_norm(model, "batchnorm", where="all"), [inputs])) > 0


def test_texts_of_models_without_a_limit_and_of_those_that_count_behind_the_padding():
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0)
    (batch,) = make_batches(T5ForConditionalGeneration(config), [" ".join(["word1"] * 60)], TOKENIZER)
    assert batch["input_ids"].shape == (1, 24)  # what the tokenizer says
    endless = BertTokenizer(vocab=TOKENIZER.get_vocab())
    for name, limit in {"camembert": 38, "mpnet": 38, "xlm-roberta": 38, "bert": 40, "gpt2": 40, "llama": 40}.items():
        model, _ = tiny_architecture(name)
        (batch,) = make_batches(model, [" ".join(["word1"] * 60)], endless)
        assert batch["input_ids"].shape == (1, limit), name
        model(**batch)


# What is wrong


REFUSED = {
    "no processor": ("vit", IMAGES, None, r"An image processor is needed to read images: pass tokenizer="),
    "no processor, of a set": ("vit", picture_set(), None, r"An image processor is needed"),
    "no extractor": ("wav2vec2", WAVES, None, r"A feature extractor is needed to read recordings"),
    "images for a model of texts": ("bert", IMAGES, TOKENIZER, r"has images, and a NormSwapBert\w+ reads texts"),
    "images for a model of sound": (
        "wav2vec2",
        IMAGES,
        EXTRACTOR,
        r"has images, and a NormSwapWav2Vec2ForCTC reads record",
    ),
    "sound for a model of texts": ("bert", WAVES, TOKENIZER, r"has recordings, and a NormSwapBert\w+ reads texts"),
    "sound for a model of images": ("vit", WAVES, PROCESSOR, r"has recordings, and a NormSwapViT\w+ reads images"),
    "texts for a model of images": ("vit", ["word1"], TOKENIZER, r"has texts, and a NormSwapViT\w+ reads images"),
    "texts for a model of sound": (
        "whisper",
        ["word1"],
        TOKENIZER,
        r"has texts, and a NormSwapWhisper\w+ reads recordings",
    ),
    "tokenizer for images": (
        "vit",
        IMAGES,
        TOKENIZER,
        r"A BertTokenizer does not make pixel_values, which a NormSwapViT",
    ),
    "image processor for texts": ("bert", ["word1"], PROCESSOR, r"ViTImageProcessorPil does not make input_ids"),
    "extractor of another model": ("wav2vec2", WAVES, MELS, r"WhisperFeatureExtractor does not make input_values"),
    "processor of a text model": ("bert", IMAGES, PROCESSOR, r"has images, and a NormSwapBert\w+ reads texts"),
    "images and texts": ("vit", [IMAGES[0], "word1"], PROCESSOR, r"and a str for images: pass a list of PIL images"),
    "a missing image": ("vit", [IMAGES[0], None], PROCESSOR, r"and None for images"),
    "a missing image of a set": ("vit", picture_set([IMAGES[0], None]), PROCESSOR, r"and None for images"),
    "images and sound": (
        "wav2vec2",
        [WAVES[0], IMAGES[0]],
        EXTRACTOR,
        r"a ndarray and a Image for recordings: pass a list of one",
    ),
    "a missing recording": ("wav2vec2", [WAVES[0], None], EXTRACTOR, r"a ndarray and None for recordings"),
    "stereo": ("wav2vec2", [WAVES[0], np.zeros((2, 9))], EXTRACTOR, r"for recordings: pass a list of one-dimensional"),
    "another rate": (
        "wav2vec2",
        [{"array": WAVES[0], "sampling_rate": 8000}],
        EXTRACTOR,
        r"has 8000 samples a second, and the feature extractor takes 16000: resample",
    ),
    "an image alone": ("vit", IMAGES[0], PROCESSOR, r"is a single image: pass a list"),
    "two columns of images": (
        "vit",
        picture_set().add_column("other", [0] * 5).map(lambda row: {"mirrored": row["image"]}),
        PROCESSOR,
        r"has columns image, label, other, mirrored: keep the one of images",
    ),
    "a set of texts": ("vit", Dataset.from_dict({"text": ["word1"]}), PROCESSOR, r"columns text: keep the one of ima"),
    "a set of images": ("bert", picture_set(), TOKENIZER, r"has columns image, label: keep the one or two of text"),
    "images for two towers": (
        "clip",
        IMAGES,
        PROCESSOR,
        r"A NormSwapCLIPModel reads texts together with images: pass batches",
    ),
    "texts for two towers": ("clip", ["word1"], TOKENIZER, r"A NormSwapCLIPModel reads texts together with images"),
    "a set for two towers": (
        "clip",
        picture_set(),
        PROCESSOR,
        r"A NormSwapCLIPModel reads texts together with images",
    ),
    "arrays of pixels": (
        "vit",
        [{"pixel_values": np.zeros((1, 3, 16, 16))}],
        None,
        r"pixel_values of a batch is a nda",
    ),
    "lists of waves": ("wav2vec2", [{"input_values": [[0.0]]}], None, r"input_values of a batch is a list of 1 list"),
    "ids for a model of images": ("vit", [{"input_ids": torch.ones(1, 3)}], None, r"no tensor pixel_values: pass inp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_kinds_say_what_to_pass(case):
    name, data, processor, message = REFUSED[case]
    model = tiny_model("bert") if name == "bert" else tiny_architecture(name)[0]
    model = swap_norm(model.eval(), "batchnorm", where="all")
    before = states(model)
    with pytest.raises(ValueError, match=message) as caught:
        calibrate(model, data, tokenizer=processor)
    assert is_one_sentence(caught.value), caught.value
    assert all(torch.equal(value, before[name]) for name, value in states(model).items())


def test_two_towers_take_batches_of_their_processor():
    model, _ = tiny_architecture("clip")
    processor = CLIPProcessor(PROCESSOR, TOKENIZER)
    batch = processor(text=["word1", "word2 word3"], images=IMAGES[:2], padding=True, return_tensors="pt")
    (made,) = make_batches(model, [batch])
    assert made.keys() == {"input_ids", "attention_mask", "pixel_values"}
    # A tower of it reads images alone, with the same processor.
    (pixels,) = make_batches(model.vision_model, IMAGES[:2], processor)
    assert torch.equal(pixels["pixel_values"], made["pixel_values"])


class Decoder:
    """What `datasets` gives for a recording, without decoding one."""

    def __init__(self, **items):
        self.items = items

    def __getitem__(self, name):
        return self.items[name]

    def get_all_samples(self):
        raise AssertionError("its items have the samples")


def test_decoders_of_recordings():
    model, _ = tiny_architecture("wav2vec2")
    decoders = [Decoder(array=wave, sampling_rate=RATE) for wave in WAVES]
    (batch,), (expected,) = (make_batches(model, data, EXTRACTOR) for data in ([*decoders[:1], *WAVES[1:]], WAVES))
    assert torch.equal(batch["input_values"], expected["input_values"])
    with pytest.raises(ValueError, match="has 8000 samples a second"):
        make_batches(model, [WAVES[0], Decoder(array=WAVES[1], sampling_rate=8000)], EXTRACTOR)
    assert len(make_batches(model, decoders, EXTRACTOR, batch_size=2)) == 2


def sound_files(folder, rate):
    import wave

    paths = []
    for number, samples in enumerate(WAVES):
        paths.append(str(folder / f"{number}.wav"))
        with wave.open(paths[-1], "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes((8000 * samples.clip(-3, 3)).astype("<i2").tobytes())
    return Dataset.from_dict({"audio": paths}).cast_column("audio", Audio())


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is None, reason="needs torchcodec")
def test_recordings_of_a_data_set_are_resampled(tmp_path):
    model, _ = tiny_architecture("wav2vec2")
    (batch,) = make_batches(model, sound_files(tmp_path, RATE), EXTRACTOR)
    assert batch["input_values"].shape == (3, 420)
    (batch,) = make_batches(model, sound_files(tmp_path, RATE // 2), EXTRACTOR)
    assert batch["input_values"].shape[1] == pytest.approx(840, abs=2)


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is not None, reason="torchcodec is here")
def test_without_a_decoder_of_sound_the_sentence_names_it(tmp_path):
    with pytest.raises(ImportError, match="install 'torchcodec'") as caught:
        make_batches(tiny_architecture("wav2vec2")[0], sound_files(tmp_path, RATE), EXTRACTOR)
    assert is_one_sentence(caught.value)
