"""D-FINE's second stage as it was meant: its solver, simulated, against our recipe.

In D-FINE ``decay_fn`` captures the constructor's decay, so neither ``ema_restart_decay`` nor the
1e-4 less after each refresh has any effect (Peterande/D-FINE issue 331). The simulation below is
written from a description of the solver, with the decay taking effect.
"""

import copy
import math

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from runs import LineModel, ema_of, log_of, make_runner

DECAY, RESTART_DECAY, WARM_UP, STOP = 0.9, 0.8, 5, 3
SCORES = {1: 0.3, 2: 0.5, 3: 0.4, 4: 0.2, 5: 0.45, 6: 0.44, 7: 0.1, 8: 0.3, 9: 0.6}
EPOCHS = 9


class SolverEMA:
    """Average with the decay taking effect when it is assigned; BatchNorm is copied."""

    def __init__(self, model):
        self.module, self.updates, self.decay = copy.deepcopy(model), 0, DECAY

    @torch.no_grad()
    def update(self, model):
        # Our first update copies, as their average starts as a copy of the model.
        decay = self.decay * (1 - math.exp(-(self.updates + 1) / WARM_UP)) if self.updates else 0
        for average, source in zip(self.module.parameters(), model.parameters()):
            average.mul_(decay).add_(source, alpha=1 - decay)
        for average, source in zip(self.module.buffers(), model.buffers()):
            average.copy_(source)
        self.updates += 1


def solver(batches_of, lr_of):
    """Stage 1 keeps its best; stage 2 starts from it, and goes back when it does not improve."""
    model = LineModel()
    ema = SolverEMA(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    best_stage_1, best, returns = None, -math.inf, []

    def snapshot():
        return copy.deepcopy((model.state_dict(), ema.module.state_dict(), ema.updates,
                              optimizer.state_dict()['state']))  # fmt: skip

    def go_back():
        weights, averaged, ema.updates, slots = copy.deepcopy(best_stage_1)
        model.load_state_dict(weights)
        ema.module.load_state_dict(averaged)
        groups = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict({'state': slots, 'param_groups': groups})
        returns.append(epoch)

    for epoch in range(EPOCHS):
        if epoch == STOP:
            go_back()
            ema.decay = RESTART_DECAY
        optimizer.param_groups[0]['lr'] = lr_of(epoch)
        for batch in batches_of(epoch):
            loss = model(batch['x'], batch['y'], mode='loss')['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
        score = SCORES[epoch + 1]
        if score > best:
            best = score
            if epoch < STOP:
                best_stage_1 = snapshot()
        elif epoch >= STOP and epoch + 1 < EPOCHS:
            best = -math.inf
            ema.decay -= 1e-4
            go_back()
    return model, ema, returns


@HOOKS.register_module()
class Record(Hook):
    """Writes down the batches, so that the simulation sees the same data."""

    def __init__(self):
        self.batches, self.lr = {}, {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batches.setdefault(runner.epoch, []).append(copy.deepcopy(data_batch))
        self.lr[runner.epoch] = runner.optim_wrapper.get_lr()['lr'][0]


def test_the_recipe_does_what_the_solver_meant(tmp_path):
    hook = dict(
        type='mmema.EMARestartHook',
        milestones=[STOP],
        source='best',
        steps=None,
        momentum=1 - RESTART_DECAY,
        on_plateau=dict(metric='score', patience=1, momentum_add=1e-4, after_restart=True),
    )
    ema = dict(
        type='EMAHook',
        ema_type='mmema.RestartableExpMomentumEMA',
        momentum=1 - DECAY,
        gamma=WARM_UP,
    )
    runner = make_runner(tmp_path, hook, dict(type='Record'), ema=ema, script=SCORES, epochs=EPOCHS)
    runner.train()
    record = next(h for h in runner.hooks if isinstance(h, Record))
    model, average, returns = solver(record.batches.__getitem__, record.lr.__getitem__)

    # At the switch, and after the epochs (by index) 3 and 5: the one after a return begins anew.
    assert returns == [3, 3, 5]
    assert log_of(runner).count('EMA restart') == len(returns)
    assert 1 - ema_of(runner).momentum == pytest.approx(RESTART_DECAY - 2e-4, abs=1e-12)
    for ours, theirs in ((runner.model, model), (ema_of(runner).module, average.module)):
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert int(ema_of(runner).steps) == average.updates
