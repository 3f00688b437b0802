"""Places the top-level folders kernels/ and benchmarks/ inside the package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["fused_dino", "fused_dino.*"], exclude=["fused_dino.benchmarks"]),
        "fused_dino.kernels",
        "fused_dino.benchmarks",
    ],
    package_dir={"fused_dino.kernels": "kernels", "fused_dino.benchmarks": "benchmarks"},
    package_data={
        "fused_dino": ["py.typed"],
        "fused_dino.kernels": ["README.md"],
        "fused_dino.cli": ["*.j2"],
    },
    exclude_package_data={"fused_dino.benchmarks": ["results/*"]},
)
