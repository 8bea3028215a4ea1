"""Best checkpoints of a run, whatever becomes of ``save_best`` and of its folder."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import CheckpointHook
from runs import log_of, make_runner

from mmema.restarts.rewind import best_files


def runner_of(known, *hooks):
    return SimpleNamespace(hooks=hooks, message_hub=SimpleNamespace(runtime_info=known))


def hook_of(*metrics, **settings):
    return CheckpointHook(save_best=list(metrics), rule='greater', **settings)


OLD = 'w/best_score_epoch_1.pth'
NEW = 'w/best_score_epoch_3.pth'
ACC = 'w/best_acc_top1_epoch_2.pth'


@pytest.mark.parametrize(
    ('known', 'hooks', 'expected'),
    [
        ({'best_ckpt': OLD}, [hook_of('score')], [OLD]),
        # From one metric to two, and back: what MMEngine noted before is older.
        (
            {'best_ckpt': OLD, 'best_ckpt_score': NEW, 'best_ckpt_acc/top1': ACC},
            [hook_of('score', 'acc/top1')],
            [NEW, ACC],
        ),
        ({'best_ckpt': OLD}, [hook_of('acc/top1', 'score')], [OLD]),
        ({'best_ckpt_score': NEW, 'best_ckpt_acc/top1': ACC}, [hook_of('score')], [NEW]),
        # Another metric, whose name may begin with that of the other.
        ({'best_ckpt': OLD}, [hook_of('acc')], []),
        ({'best_ckpt': ACC}, [hook_of('acc')], []),
        # A second hook, and one that keeps no best.
        (
            {'best_ckpt_score': NEW, 'best_ckpt_acc/top1': ACC},
            [CheckpointHook(), hook_of('score', 'acc/top1')],
            [NEW, ACC],
        ),
        (
            {'best_ckpt': 'w/best_score_ck_3.pt'},
            [hook_of('score', filename_tmpl='ck_{}.pt')],
            ['w/best_score_ck_3.pt'],
        ),
        ({}, [hook_of('score')], []),
        ({}, [CheckpointHook()], []),
    ],
)
def test_best_files(known, hooks, expected):
    assert best_files(runner_of(known, *hooks)) == expected


def test_one_metric_before_a_resume_and_two_after_it(tmp_path):
    script = [None, 0.1, 0.2, 0.5, 0.3, 0.1, 0.1]
    restart = dict(type='mmema.EMARestartHook', milestones=[4], source='best')
    make_runner(tmp_path, restart, epochs=2, script=script).train()
    several = dict(save_best=['score', 'raw/score'], rule='greater')
    runner = make_runner(
        tmp_path,
        restart,
        epochs=5,
        script=script,
        checkpoint=several,
        val_cfg=dict(type='mmema.EMAValLoop'),
        resume=True,
    )
    runner.train()
    assert 'training goes on from the best checkpoint' in log_of(runner)
    kept = torch.load(tmp_path / 'best_before_restart_at_iter_16.pth', weights_only=True)
    assert kept['meta']['iter'] == 12  # of epoch 3, not of epoch 2


def test_a_resume_into_another_folder_finds_the_best_in_the_old_one(tmp_path):
    script = [None, 0.1, 0.9, 0.2, 0.3, 0.1]
    restart = dict(type='mmema.EMARestartHook', milestones=[4], source='best')
    make_runner(tmp_path / 'first', restart, epochs=3, script=script).train()
    (tmp_path / 'first').rename(tmp_path / 'old')
    file = tmp_path / 'old' / 'epoch_3.pth'
    settings = dict(epochs=5, script=script, resume=True, load_from=str(file))
    runner = make_runner(tmp_path / 'second', restart, **settings)
    runner.train()
    assert 'training goes on from the best checkpoint' in log_of(runner)
    assert (tmp_path / 'second' / 'best_before_restart_at_iter_16.pth').exists()
