"""Evaluation without hooks, by the validation loop of any run."""

import pytest
import torch
from mmengine.hooks import Hook
from runs import Mean, NormModel, ema, ema_of, plain_runner

from mmema import averaged_weights
from mmema.averages.evaluation import evaluate_quietly


class Evaluate(Hook):
    """Evaluates the average of its own accord, and counts the calls of hooks meanwhile."""

    def __init__(self):
        self.calls, self.metrics, self.replaced = [], [], []

    def after_train_epoch(self, runner):
        torch.manual_seed(3)
        before, self.calls = torch.get_rng_state(), []
        with averaged_weights(runner.model, ema_of(runner)):
            self.metrics.append(evaluate_quietly(runner.val_loop))
        assert torch.equal(before, torch.get_rng_state()) and not self.calls

    def before_val(self, runner):
        self.calls.append('before_val')
        self.replaced.append('call_hook' in vars(runner))

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.calls.append(batch_idx)

    def after_val_epoch(self, runner, metrics=None):
        assert metrics == {k: v for k, v in self.metrics[-1].items() if k in metrics}


@pytest.mark.parametrize('val_cfg', [dict(), dict(type='mmema.EMAValLoop', weights=[])])
def test_a_quiet_evaluation_gives_the_metrics_of_the_validation(tmp_path, val_cfg):
    hook = Evaluate()
    runner = plain_runner(tmp_path, [ema(type='mmema.EMAHook'), hook], val_cfg=val_cfg)
    runner.train()
    assert len(hook.metrics) == 3 and set(hook.metrics[0]) == {'toy/mean', 'toy/worst'}
    assert hook.calls == ['before_val', 0, 1] and hook.replaced == [False] * 3


class Failing(NormModel):
    fails = True

    def forward(self, x, y=None, mode='tensor'):
        if mode == 'predict' and self.fails and len(x) < 4:
            raise RuntimeError('no memory')
        return super().forward(x, y, mode)


def test_a_quiet_evaluation_that_fails_leaves_no_results(tmp_path):
    metric = Mean()
    runner = plain_runner(tmp_path, [ema()], model=Failing(), val_evaluator=[metric], epochs=1)
    runner._val_dataloader['batch_size'] = 5
    loop = runner.val_loop
    with pytest.raises(RuntimeError, match='no memory'):
        evaluate_quietly(loop)
    assert not metric.results
    runner.model.fails = False
    assert set(evaluate_quietly(loop)) == {'toy/mean', 'toy/worst'}
