"""The chat template of a model folder: found, compiled once, rendered in a sandbox."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import (
    SecurityError,
    TemplateRuntimeError,
    TemplateSyntaxError,
    UndefinedError,
)

from .errors import InputError, ModelError, one_line
from .files import brief, read_json
from .sandbox import Budget, MeteredContext, Refused, Sandbox

TEMPLATE_BYTES = 256 * 1024  # the family's own has 8 kB
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Template:
    """A folder's own chat template.

    Rendering is safe with a template nobody has read: it cannot reach Python, files or the network,
    and ends after a bounded number of steps, on any thread. See `sandbox`.
    """

    def __init__(
        self, source: str, where: str = "chat template", special: Mapping[str, str] | None = None
    ) -> None:
        """Compiles `source`; `special` holds the texts of bos_token, eos_token and the like.

        Raises: ModelError when the text is too long or is no template.
        """
        if len(source) > TEMPLATE_BYTES:
            raise ModelError(
                f"{where}: {len(source):,} characters; at most {TEMPLATE_BYTES:,} are read."
            )
        self.where, self.source = where, source
        self._special = dict(special or {})
        try:
            self._template = Sandbox().from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"{where}: line {error.lineno}: {one_line(error.message)}; a jinja2 chat "
                "template was expected. Take the file from the model's own repository."
            ) from None
        # jinja2 and Python's compiler fail in many ways on texts made to break them
        except Exception as error:
            raise ModelError(
                f"{where}: {one_line(error)}; expected a template that jinja2 can compile."
            ) from None

    @classmethod
    def read(cls, folder: Path) -> "Template":
        """The template of `folder`: chat_template.jinja, else that of tokenizer_config.json, else
        chat_template.json; of several named ones, the one named "default".

        Raises: ModelError when there is none, or it cannot be used.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = {
            name: text for name in SPECIAL if (text := _token_text(config.get(name))) is not None
        }
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(_read_text(path), str(path), special)
        for name, values in (
            ("tokenizer_config.json", config),
            ("chat_template.json", _read_json(folder / "chat_template.json")),
        ):
            if values.get("chat_template") is not None:
                where = str(folder / name)
                return cls(_chosen(values["chat_template"], where), where, special)
        raise ModelError(
            f"{folder}: no chat_template.jinja, and no chat_template in tokenizer_config.json "
            "or chat_template.json; a chat needs one of them. Copy it from the model's repository, "
            "or give raw text."
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> str:
        """The prompt's text. The template sees plain JSON data only.

        `thinking` None leaves the choice to the template (`enable_thinking` is then undefined).
        Raises: InputError when the template refuses the messages, fails, or does not end.
        Source: transformers `utils/chat_template_utils.py` `render_jinja_template`.
        """
        try:
            plain = [_plain(message) for message in messages]
            given = [_plain(tool) for tool in tools] if tools else None
            budget = Budget(_characters([plain, given, *self._special.values()]))
        except RecursionError:
            raise InputError(
                "messages: values in them or in the tools nest too deep; what a chat template can "
                "write was expected. Nest them less."
            ) from None
        values: dict[str, Any] = {
            **self._special,
            "messages": plain,
            "tools": given,
            "documents": None,
            "add_generation_prompt": True,
        }
        if thinking is not None:
            values["enable_thinking"] = thinking
        context = self._template.new_context(values)
        assert isinstance(context, MeteredContext)
        context.budget = budget
        try:
            return "".join(self._template.root_render_func(context))
        except Exception as error:  # a template can make any of Python's operators fail
            raise self._failure(error, plain, budget) from None

    def _failure(self, error: Exception, messages: list[Any], budget: Budget) -> InputError:
        index = next((i for i, message in enumerate(messages) if message is budget.message), None)
        what = "messages" if index is None else f"messages[{index}] ({messages[index].get('role')})"
        if isinstance(error, Refused):
            return InputError(f"{what}: the chat template refuses this: {one_line(error)}.")
        if isinstance(error, RecursionError):
            return InputError(
                f"{self.where}: a macro or value nests too deep; the template cannot be used."
            )
        if isinstance(error, SecurityError):
            return InputError(
                f"{self.where}: no chat template may do this: {one_line(error)}. "
                "Use the model's own template."
            )
        if isinstance(error, UndefinedError):
            return InputError(f"{what}: the chat template misses a value: {one_line(error)}.")
        kind = "" if isinstance(error, TemplateRuntimeError) else f"{type(error).__name__}: "
        return InputError(f"{self.where}: failed at {what}: {kind}{one_line(error)}.")


def _plain(value: Any) -> Any:
    """`value` in plain JSON types; anything else (a picture, an array) becomes its type's name."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _characters(item) for key, item in value.items())
    return sum(map(_characters, value)) if isinstance(value, list) else 1


def _chosen(value: Any, where: str) -> str:
    if isinstance(value, list):
        items = [item for item in value if isinstance(item, dict)]
        # a name may be any JSON value, and a list cannot be a key
        named = {str(item.get("name")): item.get("template") for item in items}
        if "default" not in named:
            raise ModelError(
                f"{where}: chat_template holds {brief(sorted(named))}; one named 'default' "
                "was expected. Take the file from the model's own repository."
            )
        value = named["default"]
    if not isinstance(value, str):
        raise ModelError(
            f"{where}: chat_template is a {type(value).__name__}; a text or named texts were "
            "expected. Take the file from the model's own repository."
        )
    return value


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > TEMPLATE_BYTES:
            raise ModelError(
                f"{path}: {size:,} bytes; at most {TEMPLATE_BYTES:,} are read. "
                "Take the file from the model's own repository."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {one_line(error)}; a readable text was expected.") from None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
