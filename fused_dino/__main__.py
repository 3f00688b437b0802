"""`python -m fused_dino` is the `fused-dino` command."""

import sys

from fused_dino.cli import main

sys.exit(main())
