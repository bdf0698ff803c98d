import pytest

from hf_normswap.kernels import cpu
from hf_normswap.modeling.backends import BACKENDS


@pytest.fixture(scope="session")
def compiled():
    try:
        cpu.load_library()
    except OSError as error:
        pytest.skip(f"The passes cannot be compiled here: {error}")


@pytest.fixture
def paths_as_before():
    before = dict(BACKENDS)
    yield
    BACKENDS.clear()
    BACKENDS.update(before)
