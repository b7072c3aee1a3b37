# Run, after `make demo`: .venv/bin/python examples/stream_chat.py
"""Stream the answers of a short chat, the reasoning dimmed above each."""

import sys
from pathlib import Path

from qwen35_mlx import Finish, Reasoning, Text, load

DIM = "\x1b[2m{}\x1b[0m" if sys.stdout.isatty() else "{}"

model = load(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "demo-model")
messages: list[dict[str, object]] = [{"role": "system", "content": "Answer briefly."}]
for question in ("Hello!", "Who are you?"):
    print(f"> {question}")
    messages.append({"role": "user", "content": question})
    answer = ""
    for event in model.stream(messages, thinking=True):
        if isinstance(event, Reasoning):
            print(DIM.format(event.text), end="", flush=True)
        elif isinstance(event, Text):
            print(event.text if answer else f"\n{event.text}", end="", flush=True)
            answer += event.text
        elif isinstance(event, Finish):
            print(f"\n({event.usage.generated_tokens} tokens, {event.reason})")
    messages.append({"role": "assistant", "content": answer})
