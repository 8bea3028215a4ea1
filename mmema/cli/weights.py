"""One set of weights after another in the model of a config: evaluation, and data to measure on."""

from __future__ import annotations

import contextlib
import io
from itertools import islice

from ..checkpoints.formats import with_metadata
from ..run.config import kind_of
from . import common as cli
from .progress import ProgressBar

# They average weights or need an average; here a model has one set of weights.
EMA_HOOKS = ('EMAHook', 'EMARestartHook', 'EMAMonitorHook', 'EMARecalibrateHook')


def without_averages(config):
    """Take the hooks of averages out of a config, in place."""
    hooks = config.get('custom_hooks') or []
    config.custom_hooks = [hook for hook in hooks if not kind_of(hook).endswith(EMA_HOOKS)]


def load_into(model, state, name):
    """Give a model the weights of a file; refuse those of another model in one line."""
    model = getattr(model, 'module', model)
    own = model.state_dict()
    wrong = [n for n in {**own, **state} if n not in own or n not in state]
    wrong += [n for n, t in own.items() if n in state and state[n].shape != t.shape]
    if wrong:
        cli.die(
            f'{name} does not fit the model of the config: {len(wrong)} tensors are missing, of '
            f'another shape, or not in the model, such as {wrong[0]}'
        )
    model.load_state_dict(state)


# --- training data -----------------------------------------------------------------------------


def training_batches(config, seed, number):
    """Yield so many batches of the training data, for this rank."""
    from mmengine.runner import Runner

    settings = dict(config.train_dataloader)
    if 'persistent_workers' in settings:
        settings['persistent_workers'] = False
    with cli.one_line('train_dataloader cannot be used', *cli.CONFIG_ERRORS, IndexError, OSError):
        loader = Runner.build_dataloader(settings, seed=seed)
    return islice(loader, number)


# --- evaluation --------------------------------------------------------------------------------


class Evaluator:
    """MMEngine's test loop on a split of a config, for one state after another.

    Args:
        config: It is changed into that of an evaluation.
        split: 'val' or 'test'.
        work_dir: A folder for what MMEngine writes.
        label: Of the progress bar, which is shown while the evaluator is entered.
        states: How many there will be.
    """

    def __init__(self, config, split, work_dir, label, states):
        without_averages(config)
        cli.need(config, f'{split}_dataloader', f'{split}_evaluator')
        config.test_dataloader = config[f'{split}_dataloader']
        config.test_evaluator = config[f'{split}_evaluator']
        fp16 = (config.get(f'{split}_cfg') or {}).get('fp16', False)
        config.test_cfg = dict(type='TestLoop', fp16=fp16)
        for part in ('dataloader', 'cfg', 'evaluator'):
            config.pop(f'val_{part}', None)
        config.update(work_dir=str(work_dir), load_from=None, resume=False, log_level='ERROR')
        # A second Runner of this process must have nothing of the first.
        config.experiment_name = label
        config.visualizer = dict(config.get('visualizer') or {}, name=label, vis_backends=[])
        config.visualizer.setdefault('type', 'Visualizer')
        with silence():
            self.runner = cli.build_runner(config)
            cli.build_loop(self.runner, 'test')
        self.bar = ProgressBar(label, states * len(self.runner.test_dataloader))
        self.runner.register_hook(hook_of(self.bar))

    def __enter__(self):
        self.bar.__enter__()
        return self

    def __exit__(self, *exception):
        self.bar.__exit__(*exception)

    def metrics(self, state, name, batches=()):
        """Return the metrics of weights, and their state; measured anew on batches, if given."""
        from ..hooks.recalibrate import measure_statistics

        model = getattr(self.runner.model, 'module', self.runner.model)
        load_into(model, state, name)
        if batches:
            measure_statistics(model, batches).copy_to(model)
            state = with_statistics_of(model, state)
        with silence(), cli.run_errors():
            return self.runner.test(), state


def with_statistics_of(model, state):
    """Return a state with BatchNorm's statistics of a model."""
    own = getattr(model, 'module', model).state_dict()
    measured = {
        name: own[name].to(tensor.device, tensor.dtype)
        for name, tensor in state.items()
        if name.endswith(('running_mean', 'running_var'))
    }
    return with_metadata(state, {**state, **measured})


def hook_of(bar):
    from mmengine.hooks import Hook

    class Progress(Hook):
        """Moves the progress bar."""

        def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            bar.advance()

    return Progress()


def silence():
    """Keep what pycocotools and MMEngine print to themselves."""
    return contextlib.redirect_stdout(io.StringIO())
