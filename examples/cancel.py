# Run, after `make demo`: .venv/bin/python examples/cancel.py
"""Stop an answer from another thread; what was said until then is kept."""

import sys
import threading
from pathlib import Path

from qwen35_mlx import Finish, Text, load

model = load(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "demo-model")
cancel = threading.Event()
deadline = threading.Timer(0.1, cancel.set)  # or a button, or a closed connection

messages = [{"role": "user", "content": "Who are you?"}]
for event in model.stream(messages, thinking=False, cancel=cancel):
    if isinstance(event, Text):
        if not deadline.ident:
            deadline.start()
        print(event.text, end="", flush=True)
    elif isinstance(event, Finish):
        print(f"\n{event.reason} after {event.usage.generated_tokens} tokens")
