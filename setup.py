"""The packages of the distribution, found where they lie: a mapped folder is not discovered by setuptools itself."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["usllm", "usllm.*"]),
        "usllm.conf",
        *(f"usllm.conf.{name}" for name in find_packages("conf")),
        *find_packages("kernels"),
    ]
)
