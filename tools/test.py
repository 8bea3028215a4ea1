#!/usr/bin/env python3
"""Evaluate a checkpoint: ``mmema test``, at the place where users of OpenMMLab look for it."""

import sys

from mmema.cli.main import main

if __name__ == '__main__':
    main(['test', *sys.argv[1:]], called='test.py')
