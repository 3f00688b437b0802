"""Train by a config of mmengine's: python examples/mmengine/train.py CONFIG [--resume]."""

import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

sys.path.insert(0, str(Path(__file__).parent))  # for custom_imports to find model.py

config = Config.fromfile(sys.argv[1])
config.resume = "--resume" in sys.argv[2:]
Runner.from_cfg(config).train()
