"""Package layout. Metadata and dependencies are in pyproject.toml; a pure-Python install needs no compiler."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["skyrl_mega", "skyrl_mega.*"]),
        *find_packages("kernels"),
        "skyrl_mega_configs",
        *(f"skyrl_mega_configs.{name}" for name in find_packages("configs")),
    ],
    package_dir={
        "skyrl_mega": "skyrl_mega",
        "skyrl_mega_kernels": "kernels/skyrl_mega_kernels",
        "skyrl_mega_configs": "configs",
    },
    package_data={"skyrl_mega_configs": ["*.yaml", "*/*.yaml"], "skyrl_mega": ["py.typed"]},
)
