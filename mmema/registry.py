"""mmema's nodes in MMEngine's tree of registries.

``type='mmema.X'`` in a config finds X without ``custom_imports``: MMEngine imports this module by
the name of the scope, and the locations below import the rest.
"""

from __future__ import annotations

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmema', locations=['mmema'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmema', locations=['mmema'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='mmema', locations=['mmema'])
STRATEGIES = Registry(
    'strategy', parent=MMENGINE_STRATEGIES, scope='mmema', locations=['mmema.sharded']
)


def register_everywhere(registry: Registry):
    """Register a class in ``registry`` and, under its bare name, in MMEngine's root.

    EMAHook builds its averaged model in the scope of the user's config (mmyolo, mmdet, ...); a bare
    name is found there only if an ancestor, so the root, has it. Not for names that another library
    already has: the bare ``ExpMomentumEMA`` stays MMYOLO's.
    """

    def decorate(cls):
        registry.register_module()(cls)
        registry.root.register_module()(cls)
        return cls

    return decorate


@MMENGINE_STRATEGIES.register_module(name='FullyShardStrategy')
def fully_shard_strategy(**arguments):
    """Build :class:`mmema.FullyShardStrategy` by its bare name, which so imports nothing before."""
    return STRATEGIES.build(dict(type='FullyShardStrategy', **arguments))
