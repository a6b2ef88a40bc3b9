"""Where a model is: what its name in a recipe stands for, as a folder that can be used."""

from __future__ import annotations

from pathlib import Path

from llamaweft.errors import UserError
from llamaweft.model.builtin import builtin_folder


def find_folder(name: str, revision: str | None = None, *, store_codec: str | None = None) -> Path:
    """The Hugging Face folder behind what a recipe calls `model`: what `locate` finds, converted.

    Raises UserError when there is no such model or it cannot be converted.
    """
    return usable(locate(name, revision, store_codec=store_codec))


def locate(name: str, revision: str | None = None, *, store_codec: str | None = None) -> Path:
    """The file or folder that a model's name stands for.

    A .gguf file and a folder are themselves, a `builtin:` model is converted once into the cache;
    else the name is a hub id and is downloaded. revision: the commit, tag or branch of a model of
    the hub. store_codec: what its weights will be held in, for which there must be room beside the
    download. Raises UserError when there is no such model, and as `downloaded`.
    """
    if not _is_here(name):
        from llamaweft.model.hub import downloaded  # slow to import

        return downloaded(name, revision, store_codec)
    if revision is not None:
        raise UserError(
            f"model_revision: {revision} is for models of the hub, and {name} is none; remove it"
        )
    return builtin_folder(name) if name.startswith("builtin:") else Path(name)


def usable(located: Path) -> Path:
    """A Hugging Face folder of safetensors: itself, or of other forms what they are converted to,
    once, in the cache. Raises UserError as `convert`."""
    from llamaweft.model.convert import converted, form_of  # slow to import

    return located if form_of(located) is None else converted(located)


def _is_here(name: str) -> bool:
    """Whether a name is no hub id. Raises UserError for a path at which there is nothing."""
    path = Path(name)
    if name.startswith("builtin:") or path.suffix == ".gguf" or path.is_dir():
        return True
    if path.exists():
        raise UserError(f"the model {name} is a file that is no .gguf; give a folder or a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder {name}; check the path in the recipe")
    return False


def base_name(model: str, folder: Path) -> str:
    """What an adapter calls its base: an absolute path, or the hub id."""
    is_hub_id = not (model.startswith("builtin:") or Path(model).exists())
    return model if is_hub_id else str(folder.resolve())
