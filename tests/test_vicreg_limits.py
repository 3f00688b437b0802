"""What VICReg's accuracy depends on: torch's setting of float32 products."""

import subprocess
import sys

SETTINGS = """
import torch
from fused_dino.ops.vicreg_triton import precision

torch.version.hip = None  # AMD multiplies float32 whatever is set
matmul = torch.backends.cuda.matmul
assert precision() == "tf32x3"
for on in (True, False):
    expected = "tf32" if on else "tf32x3"
    matmul.fp32_precision = "tf32" if on else "ieee"
    assert precision() == expected, "fp32_precision"
    matmul.allow_tf32 = on
    assert precision() == expected, "allow_tf32"
    torch.set_float32_matmul_precision("high" if on else "highest")
    assert precision() == expected, "set_float32_matmul_precision"
matmul.fp32_precision = "none"
torch.backends.fp32_precision = "tf32"
assert precision() == "tf32", "the setting of all backends"
"""


def test_either_way_of_allowing_tf32_is_followed():
    """In a process of its own: torch keeps no way back to a state in which nothing was set."""
    made = subprocess.run([sys.executable, "-c", SETTINGS], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
