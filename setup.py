"""Places the top-level folder kernels/ inside the package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fused_dino", "fused_dino.*"]), "fused_dino.kernels"],
    package_dir={"fused_dino.kernels": "kernels"},
    package_data={
        "fused_dino": ["py.typed"],
        "fused_dino.kernels": ["README.md"],
        "fused_dino.cli": ["*.j2"],
    },
)
