"""One run of an ablation: its training, and the evaluation of every average that rode along.

A process of its own, which the command starts: python -m mmema.cli.ablation_run CONFIG FOLDER SEED
"""

from __future__ import annotations

import io
import pickle
import random
import shutil
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import EVALUATOR
from mmengine.runner import Runner, set_random_seed

from ..checkpoints.files import load
from ..hooks.recalibrate import measure_statistics
from ..run.checkpoints import checkpoints_in
from ..run.config import hooks_in, kind_of
from ..run.metrics import is_score, prefixes_in, watched_metric
from ..run.switches import use_last_pipeline
from . import common as cli
from . import weights
from .ablation_data import SPLITS, write_rows

COCO_MAP = 'coco/bbox_mAP'
RESULT = 'result.csv'
BATCHES = 100  # to measure BatchNorm on, as EMARecalibrateHook has it; fewer if the set has fewer


def main(argv=None):
    file, folder, seed = Path(argv[0]), Path(argv[1]), int(argv[2])
    cli.import_stack()
    config = Config.fromfile(file)
    cli.import_libraries(config)
    with cli.run_errors():
        runner = train(config, folder / 'work', seed)
    checkpoints = kept_checkpoints(config, folder / 'work')
    about = (config.ablation.family, config.ablation.schedule, seed)
    rows = [(*about, *row) for row in evaluate(runner.model, config, checkpoints, seed)]
    write_rows(folder / RESULT, rows)
    shutil.rmtree(folder / 'work')


def recalibrated(config):
    """Return the averages whose BatchNorm statistics are measured anew, by their new names."""
    return dict(config.ablation.get('recalibrate') or {})


def kept_checkpoints(config, folder):
    """Return the checkpoints to evaluate, by epoch."""
    files = {saved.epoch: saved.file for saved in checkpoints_in(folder)[0]}
    most = config.default_hooks.checkpoint.get('max_keep_ckpts', -1)
    return {epoch: files[epoch] for epoch in sorted(files)[-most if most > 0 else 0 :]}


# Training ---------------------------------------------------------------------------------------


def train(config, folder, seed):
    """Train to the end, from the last checkpoint if there is one; return the runner."""
    from ..checkpoints.resume import checkpoint_to_resume

    config = deepcopy(config)
    config.work_dir = str(folder)
    config.randomness = dict(seed=seed)
    # MMEngine has one visualizer for each name, which else is that of the second.
    config.experiment_name = f'seed_{seed}'
    for split in SPLITS:  # evaluated after the training, with all averages
        for part in ('dataloader', 'cfg', 'evaluator'):
            config.pop(f'{split}_{part}', None)
    config.load_from = checkpoint_to_resume(str(folder)) if folder.exists() else None
    config.resume = config.load_from is not None
    runner = cli.build_runner(config)
    runner.register_hook(KeepRandomNumbers())
    runner.train()
    return runner


class KeepRandomNumbers(Hook):
    """State of the random generators in each checkpoint: a resumed run draws the same numbers."""

    loaded = None

    def before_save_checkpoint(self, runner, checkpoint):
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        checkpoint['random'] = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def after_load_checkpoint(self, runner, checkpoint):
        self.loaded = checkpoint['random']

    def before_train_epoch(self, runner):
        if self.loaded is not None:
            python, numpy, torch_state = pickle.loads(self.loaded.numpy().tobytes())
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(torch_state)
            self.loaded = None


# Evaluation -------------------------------------------------------------------------------------


def evaluate(model, config, checkpoints, seed):
    """Yield (average, split, epoch, metric, value) for all weights in the checkpoints."""
    kind = CocoSplit if is_coco_map(config) else Split
    splits = {
        split: kind(config[f'{split}_dataloader'], config[f'{split}_evaluator']) for split in SPLITS
    }
    batches = training_batches(config, seed) if recalibrated(config) else []
    for epoch, file in checkpoints.items():
        states = load(file, trust=True).sets()  # a file of this very run
        again = {name: states[of] for name, of in recalibrated(config).items()}
        for name, state in (*states.items(), *again.items()):
            model.load_state_dict(state)
            if name in again:
                measure_statistics(model, batches).copy_to(model)
            model.eval()
            for split, data in splits.items():
                yield name, split, epoch, *measured(config, data.metrics(model), name, epoch)


def is_coco_map(config):
    """Return whether what is compared is COCO's mAP of boxes, which CocoMetric rounds."""
    evaluators = [config[f'{split}_evaluator'] for split in SPLITS]
    return config.ablation.get('metric', COCO_MAP) == COCO_MAP and all(
        isinstance(one, dict) and kind_of(one) == 'CocoMetric' and one.get('metric') == 'bbox'
        for one in evaluators
    )


def measured(config, metrics, name, epoch):
    """Return the metric that is compared and its value, which is finite."""
    asked = config.ablation.get('metric')
    metric, _ = watched_metric(hooks_in(config), list(metrics), prefixes_in(config), asked)
    if not is_score(metrics, metric):
        cli.die(
            f'{metric or "a metric"} of {name} at epoch {epoch} must be a finite number, got '
            f'{metrics.get(metric)}; measured were {", ".join(metrics) or "none"}'
        )
    return metric, float(metrics[metric])


def training_batches(config, seed):
    """Return batches of the last stage of the training, the same for all epochs of a run."""
    config = deepcopy(config)
    use_last_pipeline(config)
    set_random_seed(seed)
    return [*weights.training_batches(config, seed, BATCHES)]


class Split:
    """The batches of a split, loaded once, and the metrics of models on them."""

    def __init__(self, loader, evaluator):
        loader = Runner.build_dataloader(loader)
        self.batches, self.number = list(loader), len(loader.dataset)
        if not isinstance(evaluator, dict) or 'metrics' not in evaluator:
            evaluator = dict(metrics=evaluator)
        self.evaluator = EVALUATOR.build(dict(dict(type='Evaluator'), **evaluator))
        self.evaluator.dataset_meta = self.meta = getattr(loader.dataset, 'metainfo', None)

    @torch.no_grad()
    def metrics(self, model):
        for batch in self.batches:
            self.evaluator.process(model.test_step(batch), batch)
        return self.evaluator.evaluate(self.number)


class CocoSplit(Split):
    """COCO's mAP, as CocoMetric has it but not rounded to three digits.

    It is that of boxes of all sizes; the others would take three quarters of the time.
    """

    def __init__(self, loader, evaluator):
        from pycocotools.coco import COCO

        super().__init__(loader, [])
        with redirect_stdout(io.StringIO()):
            self.truth = COCO(evaluator.ann_file)
        self.categories = self.truth.getCatIds(catNms=self.meta['classes'])

    def metrics(self, model):
        from pycocotools.cocoeval import COCOeval

        found = self.detections(model)
        if not found:
            return {COCO_MAP: 0.0}
        with redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.truth, self.truth.loadRes(found), 'bbox')
            evaluation.params.areaRng = evaluation.params.areaRng[:1]
            evaluation.params.areaRngLbl = ['all']
            evaluation.params.maxDets = [100]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval['precision']
        return {COCO_MAP: float(precision[precision > -1].mean())}

    @torch.no_grad()
    def detections(self, model):
        """Return all boxes that a model finds, as COCO lists them."""
        found = []
        for batch in self.batches:
            for sample in model.test_step(batch):
                boxes = sample.pred_instances
                columns = (boxes.bboxes, boxes.scores, boxes.labels)
                for box, score, label in zip(*(column.tolist() for column in columns)):
                    left, top, right, bottom = box
                    found.append(
                        dict(
                            image_id=sample.img_id,
                            category_id=self.categories[label],
                            bbox=[left, top, right - left, bottom - top],
                            score=score,
                        )
                    )
        return found


if __name__ == '__main__':
    main(sys.argv[1:])
