"""Facts of a run: as its updates are, and the same from a Runner and from a config."""

from dataclasses import replace

import pytest
import torch
import toy_config
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import Runner
from runs import EMA, ema_of, make_runner
from torch import nn

from mmema.posthoc.facts import facts_in
from mmema.run import Moment, RunFacts, ema_hook_of, facts_in_config, facts_of

OURS = dict(EMA, type='mmema.EMAHook')


class Look(Hook):
    """Keeps the facts of a run at its start, and the iterations of its updates."""

    priority = 'LOWEST'
    updates, before = [], 0

    def before_train(self, runner):
        self.updates, self.facts = [], facts_of(runner, ema_hook_of(runner))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        now = int(ema_of(runner).steps)
        if now != self.before:
            self.updates.append(runner.iter)
        self.before = now


def trained(tmp_path, *hooks, **settings):
    """Return the facts of a run at its start, and the iterations of its updates."""
    look = Look()
    make_runner(tmp_path, *hooks, look, **settings).train()
    return look.facts, look.updates


def accumulating(counts):
    return dict(accumulative_counts=counts, optimizer=dict(type='SGD', lr=0.01))


@pytest.mark.parametrize('counts', [1, 3, 4, 7])
@pytest.mark.parametrize('length', [dict(epochs=3), dict(iters=10, val_interval=5)])
def test_updates_are_where_the_facts_say(tmp_path, counts, length):
    facts, updates = trained(tmp_path, ema=OURS, optim_wrapper=accumulating(counts), **length)
    assert facts.iterations == (12 if 'epochs' in length else 10)
    assert len(updates) == facts.updates
    assert updates == [facts.iteration_of(update) for update in range(facts.updates)]
    for iteration in range(facts.iterations):
        at_or_after = [update for update in updates if update >= iteration]
        assert updates[facts.update_of(iteration)] == at_or_after[0]


def test_other_hooks_update_at_every_iteration(tmp_path):
    stock, updates = trained(tmp_path / 'stock', optim_wrapper=accumulating(4), epochs=2)
    assert (stock.accumulation, stock.updates, len(updates)) == (1, 8, 8)
    ours = dict(OURS, per_optimizer_step=False)
    ours, updates = trained(tmp_path / 'ours', ema=ours, optim_wrapper=accumulating(4), epochs=2)
    assert (ours.accumulation, ours.updates, len(updates)) == (1, 8, 8)


@MODELS.register_module()
class TwoOptimizers(BaseModel):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x, y=None, mode='tensor'):
        return [dict(error=(self.one(x) - y).square())] if mode == 'predict' else self.one(x)

    def train_step(self, data, optim_wrapper):
        for name, layer in (('one', self.one), ('other', self.other)):
            loss = (layer(data['x']) - data['y']).square().mean()
            optim_wrapper[name].update_params(loss)
        return dict(loss=loss)


def test_several_optimizers(tmp_path):
    # Each counts for itself and does not know where the run ends.
    model = TwoOptimizers()
    wrappers = {
        name: OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.01), accumulative_counts=counts)
        for name, layer, counts in (('one', model.one, 6), ('other', model.other, 3))
    }
    facts, updates = trained(
        tmp_path,
        ema=OURS,
        model=model,
        iters=11,
        val_interval=11,
        optim_wrapper=OptimWrapperDict(**wrappers),
        param_scheduler=None,
    )
    assert updates == [2, 5, 8]
    assert (facts.accumulation, facts.updates) == (3, 3)


@pytest.mark.parametrize('begin, expected', [(dict(begin_epoch=3), 8), (dict(begin_iter=6), 5)])
def test_the_first_update_that_blends(tmp_path, begin, expected):
    facts, _ = trained(tmp_path, ema=dict(OURS, **begin), epochs=3)
    assert facts.begin == expected


def test_epochs_iterations_and_the_first_best_checkpoint(tmp_path):
    by_epoch, _ = trained(tmp_path / 'epochs', epochs=6, val_interval=2)
    assert (by_epoch.epoch_length, by_epoch.end('epoch'), by_epoch.end('iter')) == (4, 6, 24)
    assert by_epoch.iteration_at(Moment('epoch', 5)) == 20
    assert by_epoch.first_best == 8
    by_iter, _ = trained(tmp_path / 'iters', iters=10, val_interval=5)
    assert (by_iter.by_epoch, by_iter.end('iter'), by_iter.first_best) == (False, 10, 5)
    none, _ = trained(tmp_path / 'none', epochs=1, checkpoint=dict(save_best=None, rule=None))
    assert none.first_best is None


def test_switches_are_those_of_a_run_by_epochs(tmp_path):
    pytest.importorskip('mmdet')
    switch = dict(type='mmdet.PipelineSwitchHook', switch_epoch=2, switch_pipeline=[])
    facts, _ = trained(tmp_path / 'epochs', switch, epochs=3)
    assert facts.switches == {'PipelineSwitchHook': [2]}
    hook = dict(type='mmema.EMARestartHook', every=4, by_epoch=False)
    facts, _ = trained(tmp_path / 'iters', switch, hook, iters=8, val_interval=8)
    assert facts.switches == {}


class SwitchRecipeHook(Hook):
    """As MMPretrain's, which keeps its recipes by the number of their epoch, from 1."""

    def __init__(self, schedule):
        self.schedule = {recipe['action_epoch']: recipe for recipe in schedule}


@pytest.mark.parametrize('library', ['', 'mmpretrain'])
def test_switches_of_recipes_count_from_one(tmp_path, library):
    schedule = [dict(action_epoch=epoch, batch_augments=None) for epoch in (3, 2, 0)]
    hook = SwitchRecipeHook(schedule)
    if library:
        pytest.importorskip(library)
        hook = dict(type=f'{library}.SwitchRecipeHook', schedule=schedule)
    facts, _ = trained(tmp_path, hook, epochs=3)
    assert {name: sorted(epochs) for name, epochs in facts.switches.items()} == {
        'SwitchRecipeHook': [1, 2]
    }


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class EachOfTwo:
    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.wrappers = optim_wrapper_cfg

    def __call__(self, model):
        built = {n: build_optim_wrapper(getattr(model, n), w) for n, w in self.wrappers.items()}
        return OptimWrapperDict(**built)


TWO = dict(
    model=dict(type='TwoOptimizers'),
    optim_wrapper=dict(
        _delete_=True, constructor='EachOfTwo', one=accumulating(6), other=accumulating(3)
    ),
)


def from_config(folder, changes):
    """Train a config; return it, the facts that its Runner has, and its updates."""
    config = Config.fromfile(toy_config.write(folder))
    config.custom_hooks[0] = OURS
    config.merge_from_dict(changes)
    config.work_dir, look = str(folder / 'run'), Look()
    runner = Runner.from_cfg(config)
    runner.register_hook(look)
    runner.train()
    return config, look.facts, look.updates


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(optim_wrapper=dict(accumulative_counts=3)),
        dict(custom_hooks=[dict(EMA, begin_epoch=2)], optim_wrapper=dict(accumulative_counts=3)),
        dict(custom_hooks=[dict(OURS, begin_iter=6, per_optimizer_step=False)]),
        dict(train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=10)),
        TWO,
    ],
)
def test_a_config_tells_the_facts_of_its_run(tmp_path, changes):
    config, facts, updates = from_config(tmp_path, changes)
    assert facts.updates - facts.update_of(facts.begin) == len(updates)
    assert facts_in_config(config, 4) == replace(facts, first_best=None)
    # And the config's text in a checkpoint.
    saved = max((tmp_path / 'run').glob('[ei]*.pth'), key=lambda file: file.stat().st_mtime)
    assert facts_in(saved).run == replace(facts, first_best=None)


def test_deepspeed_makes_no_step_where_the_run_ends():
    strategy = dict(type='mmema.DeepSpeedStrategy', gradient_accumulation_steps=4)
    config = dict(train_cfg=dict(max_epochs=3), custom_hooks=[OURS], strategy=strategy)
    assert facts_in_config(config, 5).updates == 3
    inner = dict(type='DeepSpeedStrategy', config=dict(gradient_accumulation_steps=4))
    assert facts_in_config({**config, 'strategy': inner}, 5).updates == 3
    engine = dict(gradient_accumulation_steps=4)  # as a checkpoint has it
    assert facts_in_config(dict(custom_hooks=[OURS]), 5, 15, engine).updates == 3


def test_facts_by_hand():
    facts = RunFacts(iterations=10, accumulation=4)
    assert (facts.updates, [facts.iteration_of(i) for i in range(3)]) == (3, [3, 7, 9])
    assert [facts.update_of(i) for i in (0, 3, 4, 8, 9, 10)] == [0, 0, 1, 2, 2, 3]
    assert RunFacts(iterations=10, accumulation=4, last_step=False).updates == 2
