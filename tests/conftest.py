"""What the tests share: the folder of helpers, one thread, and the log as text."""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def warnings_seen(caplog):
    """MMEngine's logger does not propagate, so pytest's caplog has to be hung into it."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
