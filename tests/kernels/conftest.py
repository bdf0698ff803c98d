import pytest

from hf_normswap.kernels import cpu
from hf_normswap.modeling.paths import PATHS


@pytest.fixture(scope="session")
def compiled():
    try:
        cpu.load_library()
    except OSError as error:
        pytest.skip(f"The passes cannot be compiled here: {error}")


@pytest.fixture
def paths_as_before():
    before = dict(PATHS)
    yield
    PATHS.clear()
    PATHS.update(before)
