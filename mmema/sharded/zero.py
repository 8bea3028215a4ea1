"""Strategy of MMEngine's FlexibleRunner that saves the average of a run under DeepSpeed's ZeRO."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Callable

from mmengine._strategy import DeepSpeedStrategy as StockDeepSpeedStrategy
from mmengine.device import get_device
from mmengine.runner.checkpoint import _load_checkpoint
from torch import nn

from ..checkpoints.folders import zero_file
from ..messages import RunError
from ..registry import STRATEGIES
from ..run import StrategyTraits
from .refusals import refuse_no_launcher, refuse_stock_hook
from .states import mapped


@STRATEGIES.register_module()
class DeepSpeedStrategy(StrategyTraits, StockDeepSpeedStrategy):
    """:class:`mmengine._strategy.DeepSpeedStrategy` whose checkpoints hold the average.

    For ZeRO-1 and 2, which shard the optimizer and the gradients: each rank has the whole model and
    the whole average. MMEngine 0.10.7 saves there without asking the hooks. Here their state is in
    the folder of the checkpoint, in the file that has DeepSpeed's own copy of the model; bare
    weights and files of other runs can be loaded, too.

    With ``bf16`` or ``fp16`` the average follows the rounded weights that the model computes with,
    in float32. Needs deepspeed 0.16, and ``optim_wrapper=dict(type='DeepSpeedOptimWrapper', ...)``.

    Args:
        **arguments: As of MMEngine's ``DeepSpeedStrategy``: ``zero_optimization``, ``bf16``,
            ``train_micro_batch_size_per_gpu`` and so on.

    Raises:
        ValueError: If deepspeed is not installed, there is no launcher, or the stage is not 1 or 2.

    Example:
        >>> runner_type = 'FlexibleRunner'  # in a config
        >>> strategy = dict(
        ...     type='mmema.DeepSpeedStrategy',
        ...     zero_optimization=dict(stage=1),
        ...     train_micro_batch_size_per_gpu=8,
        ... )

    Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models, 2020.
    """

    trains_a_copy = True

    def __init__(self, **arguments):
        if find_spec('deepspeed') is None:
            raise RunError(
                'DeepSpeedStrategy needs deepspeed, which is not installed: '
                'pip install deepspeed==0.16.9'
            )
        super().__init__(**arguments)
        # DeepSpeed saves it, and a file with MMEngine's class for dicts is not read without trust.
        self.config = mapped(self.config, lambda value, place: value)
        stage = self.config.get('zero_optimization', {}).get('stage', 0)
        if stage not in (1, 2):
            raise RunError(
                f'the stage in zero_optimization must be 1 or 2, got {stage}. Train with '
                f"strategy=dict(type='{'DDPStrategy' if stage == 0 else 'mmema.FullyShardStrategy'}"
                "')."
            )
        refuse_no_launcher(self)

    def _setup_distributed(self, launcher, backend: str = 'nccl', **kwargs) -> None:
        if get_device() == 'cpu':  # MMEngine asks for a GPU, and its runner for NCCL
            import deepspeed

            deepspeed.init_distributed('gloo', **kwargs)
        else:
            super()._setup_distributed(launcher, backend, **kwargs)

    def prepare(self, *args, **kwargs):
        refuse_stock_hook(self)
        return super().prepare(*args, **kwargs)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not hasattr(self, 'optim_wrapper'):  # to test: the two stages want an optimizer
            self.config = {**self.config, 'zero_optimization': {'stage': 0}}
            return super()._wrap_model(model)
        engine = super()._wrap_model(model)
        self.optim_wrapper._accumulative_counts = engine.gradient_accumulation_steps()
        return engine

    # --- checkpoints ------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Callable | None = None,
    ) -> None:
        """Save a checkpoint; every rank takes part. The arguments are those of MMEngine."""
        checkpoint = {
            'meta': {},
            **(extra_ckpt or {}),
            'state_dict': self.model.module.state_dict(),
        }
        if callback is not None:
            callback(checkpoint)
        super().save_checkpoint(
            filename,
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            extra_ckpt=checkpoint,
        )

    def load_checkpoint(
        self,
        filename: str,
        *,
        map_location='cpu',
        strict: bool = False,
        revise_keys=((r'^module.', ''),),
        callback: Callable | None = None,
    ) -> dict:
        """Load the weights of a checkpoint of this strategy, of a usual one, or bare weights.

        The arguments are those of MMEngine; ``map_location`` is not used.
        """
        self.logger.info(f'Load checkpoint from {filename}')
        checkpoint = _load_checkpoint(str(zero_file(filename) or filename), map_location='cpu')
        if 'state_dict' not in checkpoint:  # 'module': of MMEngine's own strategy
            checkpoint = {'state_dict': checkpoint.get('module', checkpoint)}
        if callback is not None:
            callback(checkpoint)
        weights = checkpoint.pop('state_dict')
        self.load_model_state_dict(weights, strict=strict, revise_keys=revise_keys)
        self._refresh()
        return checkpoint

    def resume(
        self,
        filename: str,
        *,
        resume_optimizer: bool = True,
        callback: Callable | None = None,
        **kwargs,
    ) -> dict:
        """Resume from a checkpoint of the same number of ranks. The arguments are MMEngine's."""
        if zero_file(filename) is None:
            raise RunError(
                f'DeepSpeedStrategy resumes from a folder that it has saved, got {filename}. Start '
                f'from its weights: load_from={str(filename)!r}, resume=False.'
            )
        checkpoint = super().resume(filename, resume_optimizer=resume_optimizer, **kwargs)
        checkpoint.setdefault('state_dict', self.model.module.state_dict())
        if callback is not None:
            callback(checkpoint)
        # DeepSpeed's copy has averaged weights if it was saved during a validation.
        self.load_model_state_dict(checkpoint.pop('state_dict'))
        if not resume_optimizer:
            self._refresh()
        return checkpoint

    def _refresh(self) -> None:
        """Copy the weights into the optimizer, which has a copy of its own and trains that."""
        if hasattr(self, 'optim_wrapper'):
            self.optim_wrapper.optimizer.refresh_fp32_params()
