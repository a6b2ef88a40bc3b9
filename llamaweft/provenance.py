"""What a run was made of, for environment.json: software as a list of parts (SBOM), files of the
model and of the data with their checksums, and what it takes to run it again.

The list is CycloneDX 1.5 (https://cyclonedx.org/docs/1.5/json/), with package URLs
(https://github.com/package-url/purl-spec).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from llamaweft import __version__
from llamaweft.shown import redacted

HASHED_BYTES = 64 * 2**20
"""A larger file of a model is not read for its checksum; the hub's cache has that in its name."""

OF_MODELS = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")

VARIABLES = re.compile(
    r"(?:OMP|MKL|OPENBLAS|BLIS|NUMBA|KMP|GOMP|MALLOC|GLIBC|ATEN|CUBLAS|NCCL)_[A-Z_]*"
    r"|CUDA_VISIBLE_DEVICES|PYTORCH_(?:CUDA_)?ALLOC_CONF|LD_PRELOAD|PYTHONHASHSEED"
    r"|TOKENIZERS_PARALLELISM|HF_HUB_OFFLINE|LLAMAWEFT_CACHE"
)
"""Of the environment: what changes how a run computes, and nothing that could be a secret."""

_CPU_FLAGS = re.compile(r"(?:avx|amx|sse|ssse|fma|f16c|bmi|asimd|sve|bf16|i8mm)\w*")


@dataclass(frozen=True)
class Package:
    """A distribution that is installed. source: where it was installed from, if not from an
    index; license: an SPDX expression, where it says one."""

    name: str
    version: str
    license: str | None
    source: str | None

    @property
    def url(self) -> str:
        name = re.sub(r"[-_.]+", "-", self.name).lower()
        return f"pkg:pypi/{name}@{quote(self.version)}"

    @property
    def requirement(self) -> str:
        """A line for pip."""
        return (
            f"{self.name}=={self.version}"
            if self.source is None
            else f"{self.name} @ {self.source}"
        )


def installed() -> list[Package]:
    """Every distribution that can be imported, by its name; of two with one name the one that
    Python finds."""
    found: dict[str, Package] = {}
    for distribution in metadata.distributions():
        said = distribution.metadata
        if not said or not said["Name"]:
            continue
        package = Package(
            said["Name"], said["Version"] or "", said["License-Expression"], _source(distribution)
        )
        found.setdefault(package.url.partition("@")[0], package)
    return sorted(found.values(), key=lambda package: package.name.lower())


def _source(distribution: metadata.Distribution) -> str | None:
    """Where a distribution came from, as pip recorded it (PEP 610)."""
    try:
        said = json.loads(distribution.read_text("direct_url.json") or "{}")
        url, vcs = said["url"], said.get("vcs_info")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return redacted(f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url)


def provenance(
    *, recipe_text: str, seed: int, commit: str, model: str, folder: Path, sources: dict[str, str]
) -> dict[str, Any]:
    """The parts of environment.json that say what the run was made of. folder: the model's.
    sources: name and fingerprint of each source of rows."""
    packages = [package for package in installed() if package.name.lower() != "llamaweft"]
    files = model_files(folder)
    recipe_sum = hashlib.sha256(recipe_text.encode()).hexdigest()
    return {
        "command": redacted(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "seed": seed,
        "torch_build": torch.__config__.show().strip(),
        "torch_commit": torch.version.git_version,
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_flags": _cpu_flags(),
        "variables": {
            name: redacted(value)
            for name, value in sorted(os.environ.items())
            if VARIABLES.fullmatch(name)
        },
        "packages": {package.name: package.version for package in packages},
        "rebuild": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "commit": commit,
            "requirements": [package.requirement for package in packages],
            "recipe": "recipe.yaml",
            "recipe_sha256": recipe_sum,
            "model": model,
            "model_commit": hub_commit(folder),
            "model_files": files,
            "data": sources,
        },
        "sbom": sbom(packages, model, files),
    }


def sbom(packages: list[Package], model: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    """A CycloneDX document: this program, its packages, the model."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": "llamaweft",
                "name": "llamaweft",
                "version": __version__,
            }
        },
        "components": [*map(_component, packages), _model_component(model, files)],
    }


def _component(package: Package) -> dict[str, Any]:
    said = {
        "type": "library",
        "bom-ref": package.url,
        "name": package.name,
        "version": package.version,
        "purl": package.url,
    }
    return (
        said if package.license is None else said | {"licenses": [{"expression": package.license}]}
    )


def _model_component(model: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    """The model, with a part for each file whose checksum is known."""
    parts = [
        {
            "type": "file",
            "name": file["name"],
            "hashes": [{"alg": "SHA-256", "content": file["sha256"]}],
        }
        for file in files
        if file["sha256"] is not None
    ]
    named = {"type": "machine-learning-model", "bom-ref": f"model:{model}", "name": model}
    return named | ({"components": parts} if parts else {})


def model_files(folder: Path) -> list[dict[str, Any]]:
    """{"name", "bytes", "sha256"} of each file of a model folder; the checksum is None where the
    file is large and nobody has told it."""
    paths = sorted({path for pattern in OF_MODELS for path in folder.glob(pattern)})
    return [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
        if path.is_file()
    ]


def _sha256(path: Path) -> str | None:
    stored = path.resolve().name  # in the hub's cache a large file is named by its checksum
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", stored):
        return stored
    if path.stat().st_size > HASHED_BYTES:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_commit(folder: Path) -> str | None:
    """The commit of a model that lies in the hub's cache; None for any other folder."""
    inside = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if inside else None


def _cpu_flags() -> list[str]:
    """The instruction sets that kernels choose between, as Linux names them."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return sorted(word for word in words if _CPU_FLAGS.fullmatch(word))
