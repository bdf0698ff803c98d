"""What tests of masks share."""

import logging

import pytest
from transformers.utils import logging as transformers_logging

from hf_normswap.modeling import padding_mask
from tests.helpers.persistence import is_one_sentence


@pytest.fixture
def warnings(caplog):
    """A function that returns the warnings about masks, as if none had been given before."""
    transformers_logging.warning_once.cache_clear()

    def messages():
        records = [record for record in caplog.records if record.name == padding_mask.__name__]
        assert all(record.levelno == logging.WARNING and is_one_sentence(record.getMessage()) for record in records)
        return [record.getMessage() for record in records]

    return messages
