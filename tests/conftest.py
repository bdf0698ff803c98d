"""What every test has: no network, a fixed seed, one thread."""

import os


# Read on import, hence before anything of Hugging Face is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402


# Tiny tensors: further threads only wait for each other, and for those of the other test processes.
torch.set_num_threads(1)

try:
    from hypothesis import settings
except ImportError:
    pass  # tests/gpu needs none, and a machine with a GPU may not have it
else:
    # A shared machine is slow at times: that is no failure.
    settings.register_profile("hf_normswap", deadline=None, max_examples=30, print_blob=True)
    settings.load_profile("hf_normswap")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def plain_pytorch(monkeypatch):
    """The passes of batch norms as a compiled graph, or a device, computes them."""
    from hf_normswap.modeling import backends

    monkeypatch.setattr(backends, "BACKENDS", {})
    monkeypatch.setattr(backends, "COMPILED_BACKENDS", {})


@pytest.fixture
def no_kernels():
    """The passes of batch norms as they are without the package."""
    from hf_normswap import use_kernels

    use_kernels("none")
    yield
    use_kernels("auto")


@pytest.fixture(params=["auto", "none"])
def kernels(request):
    """The passes of norms on both paths of a CPU."""
    from hf_normswap import use_kernels

    use_kernels(request.param)
    yield
    use_kernels("auto")
