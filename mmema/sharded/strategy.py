"""Strategy of MMEngine's FlexibleRunner that shards a model by torch's FSDP2."""

from __future__ import annotations

import os
import re
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Callable, Sequence

import mmengine
import torch
from mmengine._strategy import DDPStrategy
from mmengine.device import get_device
from mmengine.dist import broadcast, init_dist, is_main_process
from mmengine.model import BaseDataPreprocessor
from mmengine.runner.checkpoint import _load_checkpoint
from mmengine.utils import get_git_hash
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..arguments import check_bool, check_integer, check_strings
from ..checkpoints import folders
from ..checkpoints.resume import checkpoint_to_resume
from ..messages import RunError, listed
from ..registry import STRATEGIES
from ..run import StrategyTraits
from ..update.sharded import Layout, Parts, is_dtensor, own_state
from .folders import write_file, write_folder
from .precision import cast_inputs, checked_policy, own_precision, with_cast
from .refusals import refuse_no_launcher, refuse_old_torch, refuse_stock_hook
from .states import gathered, on_cpu, own_wrapper_state


@STRATEGIES.register_module()
class FullyShardStrategy(StrategyTraits, DDPStrategy):
    """Strategy that shards model, gradients and optimizer by torch's FSDP2 (``fully_shard``).

    Each rank keeps its part of every parameter, and gathers the parameters of one group of layers
    while it computes with them. Averages of :class:`mmema.EMAHook` are sharded alike. Checkpoints
    are MMEngine's usual files, as a run without sharding writes them, and can be resumed on any
    number of ranks, sharded or not. For ``runner_type='FlexibleRunner'``; needs torch 2.7.

    The model is built on the CPU of each rank and moves to the accelerator sharded, group by group.
    To save, each tensor is gathered on its own and moved to the CPU of rank 0.

    Args:
        shard: Names of submodules that are groups of their own, or patterns with ``*``, ``?`` and
            ``[...]``; ``*`` matches dots, too. All other parameters are in the group of the root.
            Defaults to none.
        replicas: Number of copies of the sharded model. With as many as there are machines, each of
            them has a whole one, and only gradients cross the network. Defaults to 1.
        mixed_precision: Arguments of torch's ``MixedPrecisionPolicy``, with names for dtypes:
            ``dict(param_dtype='bfloat16', reduce_dtype='float32', output_dtype='float32')``. The
            parts, the optimizer and the average stay as they are; BatchNorm layers are left in
            their own precision. Of what a group is called with, tensors in dicts are not cast.
            Defaults to None.
        cpu_offload: Whether parts, gradients and optimizer are kept in main memory. Defaults to
            False.
        reshard_after_forward: Whether gathered weights are freed between forward and backward, and
            gathered once more. Defaults to True; the root keeps them in either case.
        forward_methods: Methods that compute with the weights of a group, beside ``forward``.
            Defaults to those of MMDetection's heads.
        sharded_checkpoint: Whether each rank saves its part while training goes on, into a folder
            in the place of the file, which all ranks must see. Defaults to False.
        sync_bn: 'torch' or 'mmcv': as of MMEngine's ``DDPStrategy``. Defaults to None.
        work_dir, experiment_name, env_kwargs, log_kwargs, auto_scale_lr: As of MMEngine's
            strategies; FlexibleRunner fills them in.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, there is no launcher, or torch has no FSDP2;
            and, as soon as the model is there, if a pattern matches none of its submodules.

    Example:
        >>> runner_type = 'FlexibleRunner'  # in a config
        >>> strategy = dict(
        ...     type='mmema.FullyShardStrategy', shard=['backbone.stage?', 'neck', 'bbox_head']
        ... )

    Source: Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, 2023;
    ``torch.distributed.fsdp.fully_shard``.
    """

    saves_parts = True

    def __init__(
        self,
        *,
        shard: Sequence[str] = (),
        replicas: int = 1,
        mixed_precision: dict | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        forward_methods: Sequence[str] = ('loss', 'predict', 'loss_and_predict'),
        sharded_checkpoint: bool = False,
        sync_bn: str | None = None,
        work_dir: str = 'work_dirs',
        experiment_name: str | None = None,
        env_kwargs: dict | None = None,
        log_kwargs: dict | None = None,
        auto_scale_lr: dict | None = None,
    ):
        for name, value in (('shard', shard), ('forward_methods', forward_methods)):
            check_strings(name, value)
        check_integer('replicas', replicas)
        check_bool('cpu_offload', cpu_offload)
        check_bool('reshard_after_forward', reshard_after_forward)
        check_bool('sharded_checkpoint', sharded_checkpoint)
        refuse_old_torch()
        self.shard = tuple(shard)
        self.replicas = replicas
        self.mixed_precision = checked_policy(mixed_precision)
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.forward_methods = tuple(forward_methods)
        self.sharded_checkpoint = sharded_checkpoint
        self._saving: Future | None = None
        self._saving_group = None
        self._layouts: dict = {}  # of the model's parameters
        super().__init__(
            sync_bn=sync_bn,
            work_dir=work_dir,
            experiment_name=experiment_name,
            env_kwargs=env_kwargs,
            log_kwargs=log_kwargs,
            auto_scale_lr=auto_scale_lr,
        )
        refuse_no_launcher(self)
        if self.world_size % replicas:
            raise RunError(
                f'replicas must divide the number of ranks, {self.world_size}, got {replicas}'
            )

    def _setup_distributed(self, launcher: str, backend: str = 'nccl', **kwargs) -> None:
        if get_device() == 'cpu':  # MMEngine asks for a GPU, and its runner for NCCL
            torch.distributed.init_process_group('gloo', **kwargs)
        else:
            init_dist(launcher, backend, **kwargs)

    # --- the model --------------------------------------------------------------------------------

    def prepare(self, *args, **kwargs):
        """Prepare model and optimizer, as MMEngine's strategies do."""
        refuse_stock_hook(self)
        return super().prepare(*args, **kwargs)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

        model, device = self.convert_model(model), get_device()
        for module in model.modules():
            if isinstance(module, BaseDataPreprocessor):
                module.to(device)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                broadcast(tensor)  # fully_shard takes it for granted that ranks begin alike
        sizes, names = (self.world_size,), ('shard',)
        if self.replicas > 1:
            sizes = (self.replicas, self.world_size // self.replicas)
            names = ('replicate', 'shard')
        offload = OffloadPolicy()
        if self.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=device != 'cpu')
        settings = {
            'mesh': init_device_mesh(device, sizes, mesh_dim_names=names),
            'offload_policy': offload,
        }
        groups = self._groups_of(model)
        _refuse_tied_groups(model, groups)
        for name in reversed(groups):  # FSDP2 wants inner modules first
            self._shard_group(name, groups[name], settings, self.reshard_after_forward)
        self._shard_group('', model, settings, None)
        self._layouts = Parts(model).layouts
        return model

    def _groups_of(self, model: nn.Module) -> dict:
        """Return the submodules that ``shard`` names, outer ones first."""
        modules = {name: module for name, module in model.named_modules() if name}
        for pattern in self.shard:
            if not any(fnmatchcase(name, pattern) for name in modules):
                raise RunError(
                    f'each pattern of shard must match a submodule, but {pattern!r} matches none, '
                    f'such as {listed(name for name in modules if "." not in name)}'
                )
        return {
            name: module
            for name, module in modules.items()
            if any(fnmatchcase(name, pattern) for pattern in self.shard)
        }

    def _shard_group(self, name: str, module: nn.Module, settings: dict, reshard) -> None:
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        settings = {**settings, 'reshard_after_forward': reshard}
        dtype = self.mixed_precision.get('param_dtype')
        norms = [one for one in module.modules() if isinstance(one, _BatchNorm)]
        norms = [one for one in norms if not isinstance(one, FSDPModule)]
        try:
            if dtype is not None and norms:
                # torch's BatchNorm takes no weights of another dtype than its statistics.
                fully_shard(norms, mp_policy=own_precision(norms[0], dtype), **settings)
            if not isinstance(module, FSDPModule):
                policy = {**self.mixed_precision, 'cast_forward_inputs': False}
                fully_shard(module, mp_policy=MixedPrecisionPolicy(**policy), **settings)
        except (ValueError, NotImplementedError) as error:
            raise RunError(f'shard: {name!r} cannot be a group: {error}') from None
        cast = None
        if dtype is not None and self.mixed_precision.get('cast_forward_inputs', True):
            cast = partial(cast_inputs, dtype)
            module.register_forward_pre_hook(lambda _, *inputs: cast(*inputs), with_kwargs=True)
        for method in self.forward_methods if name else ():
            if hasattr(module, method):
                if cast is not None:
                    setattr(module, method, with_cast(getattr(module, method), cast))
                register_fsdp_forward_method(module, method)

    # --- checkpoints ------------------------------------------------------------------------------

    def model_state_dict(self) -> dict:
        """Return the state of the model, each tensor a DTensor."""
        return self.model.state_dict()

    def load_model_state_dict(
        self, state_dict: dict, *, strict: bool = False, revise_keys=((r'^module.', ''),)
    ) -> None:
        """Load a state of whole tensors, of which each rank takes its part."""
        revised = OrderedDict()
        for name, value in state_dict.items():
            for pattern, replacement in revise_keys:
                name = re.sub(pattern, replacement, name)
            revised[name] = value
        if hasattr(state_dict, '_metadata'):
            revised._metadata = state_dict._metadata
        own = own_state(revised, self.model)
        super().load_model_state_dict(own, strict=strict, revise_keys=[])

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load a state of whole tensors, of which each rank takes its part."""
        self.optim_wrapper.load_state_dict(own_wrapper_state(state_dict, self.optim_wrapper))

    def load_checkpoint(
        self,
        filename: str,
        *,
        map_location='cpu',
        strict: bool = False,
        revise_keys=((r'^module.', ''),),
        callback: Callable | None = None,
    ) -> dict:
        """Load a checkpoint or bare weights, of which each rank takes its part.

        The arguments are those of MMEngine; ``map_location`` is not used, a file stays in main
        memory.
        """
        self.logger.info(f'Load checkpoint from {filename}')
        self.finish_saving()
        checkpoint = self._read(filename)
        if 'state_dict' not in checkpoint:
            checkpoint = {'state_dict': checkpoint}
        if callback is not None:
            callback(checkpoint)
        weights = checkpoint.pop('state_dict')
        self.load_model_state_dict(weights, strict=strict, revise_keys=revise_keys)
        return checkpoint

    def _read(self, filename: str) -> dict:
        from torch.utils.serialization import config

        if folders.is_folder(filename):
            return folders.read(filename, self._target_of)
        # A file of torch's present format is mapped into memory: read only where it is used.
        mapped = zipfile.is_zipfile(filename)
        with config.patch({'load.mmap': True}) if mapped else nullcontext():
            return _load_checkpoint(filename, map_location='cpu')

    def _target_of(self, place: tuple, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return an empty tensor for what stands at a place of a checkpoint: sharded as here."""
        known, wrapper = None, getattr(self, 'optim_wrapper', None)
        if place[0] != 'optimizer':
            known = self._layouts.get(str(place[-1]).replace('module.', '', 1))
        elif wrapper is None:  # a test
            return None
        elif hasattr(wrapper, 'optimizer'):
            parameters = [p for group in wrapper.optimizer.param_groups for p in group['params']]
            if place[-2] < len(parameters) and is_dtensor(parameters[place[-2]]):
                known = Layout(parameters[place[-2]])
        if known is None or known.shape != shape:
            return torch.empty(shape, dtype=dtype)
        return known.empty(dtype)

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
        checkpoint = {'state_dict': self.model_state_dict()}
        if save_optimizer and hasattr(self, 'optim_wrapper'):
            checkpoint['optimizer'] = self.optim_state_dict()
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            checkpoint['param_schedulers'] = self.scheduler_state_dict()
        checkpoint.update(extra_ckpt or {})
        checkpoint.setdefault('meta', {}).update(
            seed=self.seed,
            time=time.strftime('%Y%m%d_%H%M%S', time.localtime()),
            mmengine=mmengine.__version__ + get_git_hash(),
        )
        if callback is not None:
            callback(checkpoint)
        if self.sharded_checkpoint:
            self._write_folder(checkpoint, filename)
            return
        checkpoint = gathered(checkpoint)
        if is_main_process():
            write_file(checkpoint, filename)

    def to_save(self, state: dict) -> dict:
        """Return a state on the CPU; its DTensors are gathered when it is saved."""
        return on_cpu(state)

    def resume(self, filename: str, **kwargs) -> dict:
        """Resume from a checkpoint; where it was never finished, from the newest whole one."""
        if '://' not in filename and not os.path.exists(filename):
            filename = checkpoint_to_resume(self.work_dir) or filename
        return super().resume(filename, **kwargs)

    def _write_folder(self, checkpoint: dict, folder: str) -> None:
        if '://' in folder:
            raise RunError(f'sharded_checkpoint needs a local folder, got {folder}')
        if self._saving_group is None:
            self._saving_group = torch.distributed.new_group(backend='gloo')
        self.finish_saving()
        self._saving = write_folder(checkpoint, folder, is_dtensor, self._saving_group)
        if checkpoint['meta'].get('iter', 0) >= self.dispatch_kwargs.get('max_iters', 0):
            self.finish_saving()  # the end of training: the process may end before the writing

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is written; raise the error if it could not be."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()


def _refuse_tied_groups(model: nn.Module, groups: dict) -> None:
    first: dict = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        group = [group for group in groups if name.startswith(f'{group}.')][-1:]  # the innermost
        known, known_group = first.setdefault(id(parameter), (name, group))
        if known_group != group:
            raise RunError(
                f'a parameter must belong to one group of shard, but {known!r} and {name!r} are '
                'one. Let a pattern match a module that holds both, and none inside of it.'
            )
