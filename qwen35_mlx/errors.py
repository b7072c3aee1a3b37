"""Every exception this project raises on purpose.

A message is one line: `where: what was found; what was expected. What to do.`
"""


class Qwen35Error(Exception):
    """Base of all errors a user of the library may want to catch."""


class ModelError(Qwen35Error):
    """A model folder, its configuration, tensors or tokenizer files cannot be used."""


class ConversionError(Qwen35Error):
    """A conversion's options, its output folder or the disk do not allow it."""


class InputError(Qwen35Error):
    """A prompt, message, picture, video, template or sampling value cannot be used."""


class OutOfMemory(Qwen35Error):
    """The work needs more memory than this machine has free; says both numbers."""


class Cancelled(Qwen35Error):
    """The caller asked a running computation to stop."""


def one_line(error: object, limit: int = 200) -> str:
    """What an exception says, on one line of at most `limit` characters, its last stop left out."""
    return " ".join(str(error).split())[:limit].rstrip(".") or type(error).__name__


def shown(source: object) -> str:
    """A path or address as it may stand in a message: on one line, not too long.

    Of a long path the end is kept, which names the file; of an address or `data:` URL the start.
    """
    text = str(source)
    address = text[:5].lower() == "data:" or "://" in text[:16]
    part = text[:200] if address else text[-200:]
    clean = "".join(c if c.isprintable() else repr(c)[1:-1] for c in part)
    if len(text) <= 200 and len(clean) <= 120:
        return clean
    return f"{clean[:60]}... ({len(text)} characters)" if address else f"...{clean[-117:]}"
