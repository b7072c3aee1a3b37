"""A model by its headers alone: a size, a Hub id or a folder of which no weight is read."""

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelError

if TYPE_CHECKING:
    from .config import Config
    from .packing import Format

    Subject = tuple[str, Config, dict[str, Format | None]]


def as_loaded(model: str, bits: int | None, recipe: str | None) -> "Subject":
    """As `of`, but a size alone is what `generate --model` takes for it.

    That is the newest conversion of it on this machine, else mlx-community's 4-bit folder.
    """
    from . import family, hub

    size = family.find(model)
    if size is None or bits is not None or recipe is not None:
        return of(model, bits, recipe)
    made = hub.conversion(size)
    return of(model, 4, "uniform") if made is None else of(str(made), None, None)


def of(model: str, bits: int | None, recipe: str | None) -> "Subject":
    """What `model` is in words, its configuration, and how each matrix is packed, by module.

    bits, recipe: of a size, as `convert` would pack it; None for its defaults.
    Raises: ModelError when `model` stands for nothing or cannot be run; ConversionError for bits or
    a recipe that there are not.
    """
    if not model.strip():
        raise ModelError("the name is empty; expected a folder, Hub id or size. Name one.")
    from qwen35_mlx.convert import layout, origin, published
    from qwen35_mlx.convert.options import Options, options

    named = origin.model_of(model)
    if named.size is not None:
        source, asked = published.source(named.size), options(bits, recipe=recipe)
        packed = layout.targets(source, asked)
        title = f"{named.size.name}, {asked.label}" + (f", {asked.recipe}" if asked.base else "")
        return title, source.config, {target.path: target.packing for target in packed}
    if bits is not None or recipe is not None:
        raise ModelError(
            f"{model}: --bits or --recipe beside a folder; expected them with a size, for a folder "
            "is taken as it is. Leave them out."
        )
    found = origin.headers(named, Path("unused"), stream=False, revision=None)
    formats = {}
    for target in layout.targets(found.source, Options(base=None)):
        view = target.pieces[0].view
        if view.block is not None:
            raise ModelError(f"{model}: is FP8; expected BF16 or MLX's form. Convert it first.")
        formats[target.path] = view.packing
    return f"{named.name} ({found.what})", found.source.config, formats
