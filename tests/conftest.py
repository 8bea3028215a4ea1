"""What the tests share: settings of torch and Hypothesis, the folder of helpers, the log."""

import gc
import os
from functools import lru_cache
from pathlib import Path

# The workers of pytest-xdist share the cores; torch reads this when it is imported.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')

import mmengine.runner.runner
import pytest
import torch
from marks import SEED
from mmengine.logging import MMLogger

try:
    from hypothesis import settings
except ImportError:  # `make gpu` runs where it is not installed
    pass
else:
    # The same examples in every run: what fails, fails again. `make extensive` has a new seed.
    settings.register_profile('same', derandomize=True)
    settings.register_profile('new', max_examples=1000, deadline=None, print_blob=True)
    settings.load_profile('new' if SEED else 'same')

# Every Runner logs its environment, for which it asks the compilers: once is enough.
mmengine.runner.runner.collect_env = lru_cache(None)(mmengine.runner.runner.collect_env)


# A worker of pytest-xdist takes a whole file: these first, so that none of them is left at the end.
LONGEST = [
    'test_strategy.py',
    'test_digits_configs.py',
    'test_kill.py',
    'test_models.py',
    'test_docs.py',
    'test_train.py',
    'test_auto.py',
    'test_restart.py',
    'test_ema.py',
    'test_ablate.py',
]


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def pytest_report_header():
    return f'MMEngine of {Path(mmengine.__file__).parents[1]}, torch {torch.__version__}'


@pytest.fixture
def warnings_seen(caplog):
    """MMEngine's logger does not propagate, so pytest's caplog has to be hung into it."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, there longer than anything in the test that holds it.

    A DistributedDataParallel that is the last to hold its group waits, with Python locked, for a
    thread of the group that may want Python: now and then a test hung there.
    """
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1
    )
    yield
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
