"""A Hub for each test."""

import pytest

from tests.helpers.hub.server import LoopbackHub


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub
