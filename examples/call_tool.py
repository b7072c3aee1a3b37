# Run, after `make demo`: .venv/bin/python examples/call_tool.py
"""Let the model call a function of ours, and answer from its result."""

import sys
from pathlib import Path

from qwen35_mlx import load

TOOL = {
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "day": {"type": "string"}},
        "required": ["city", "day"],
    },
}
TOOLS = [{"type": "function", "function": TOOL}]

model = load(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "demo-model")
messages: list[dict[str, object]] = [
    {"role": "user", "content": "What is the weather in Paris on Monday?"}
]
result = model.generate(messages, tools=TOOLS, thinking=False)
calls = [
    {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
    for c in result.tool_calls
]
messages.append({"role": "assistant", "content": result.text, "tool_calls": calls})
for call in result.tool_calls:
    print(f"{call.name}({call.arguments})")
    weather = "foggy, 5 degrees"  # a real program would look it up
    messages.append({"role": "tool", "tool_call_id": call.id, "content": weather})
print(model.generate(messages, tools=TOOLS, thinking=False).text)
