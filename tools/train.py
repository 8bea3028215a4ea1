#!/usr/bin/env python3
"""Train a model: ``mmema train``, at the place where users of OpenMMLab look for it."""

import sys

from mmema.cli.main import main

if __name__ == '__main__':
    main(['train', *sys.argv[1:]], called='train.py')
