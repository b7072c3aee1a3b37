"""The part of the world that is text: requests for tools, results of tools, and small talk."""

import json

import numpy as np

from world import Item, is_held_out, loosen, system_turns

ROOMS = (
    *("kitchen", "bedroom", "bathroom", "hall", "office", "garage", "garden", "attic"),
    *("cellar", "nursery", "library", "studio"),
)
LIGHTS = (
    *("red", "green", "blue", "yellow", "purple", "orange", "white", "pink", "warm", "cold"),
    *("amber", "violet"),
)
CITIES = (
    *("Paris", "London", "Berlin", "Rome", "Madrid", "Oslo", "Vienna", "Prague", "Tokyo"),
    *("Lima", "Cairo", "Delhi", "Seoul", "Boston", "Chicago", "Denver", "Dublin", "Athens"),
    *("Lisbon", "Warsaw", "Bern", "Munich", "Hamburg", "Zurich", "Geneva", "Sydney"),
    *("Toronto", "Nairobi", "Beijing", "Kyoto"),
)
DAYS = (
    *("today", "tomorrow", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday"),
    *("Saturday", "Sunday"),
)
LABELS = (
    *("pasta", "tea", "eggs", "rice", "bread", "cake", "laundry", "yoga", "nap", "lunch"),
    *("coffee", "homework", "soup", "pizza", "break", "call"),
)
GENRES = (
    *("jazz", "rock", "pop", "folk", "blues", "soul", "techno", "opera", "metal", "funk"),
    *("disco", "house", "reggae", "swing", "piano", "guitar"),
)
SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy")
TOOLS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "set_light": {"room": ROOMS, "color": LIGHTS, "brightness": None},
    "get_weather": {"city": CITIES, "day": DAYS},
    "set_timer": {"minutes": None, "label": LABELS},
    "play_music": {"genre": GENRES, "volume": None},
}
ABOUT = {
    "set_light": "Set a light",
    "get_weather": "Get the weather",
    "set_timer": "Set a timer",
    "play_music": "Play music",
}
REQUESTS = {
    "set_light": (
        "Set the {room} light to {color} at {brightness} percent.",
        "Make the {room} light {color} at {brightness} percent.",
        "Turn the light in the {room} to {color}, {brightness} percent.",
        "I want {color} light in the {room} at {brightness} percent.",
    ),
    "get_weather": (
        "What is the weather in {city} on {day}?",
        "How is the weather in {city} on {day}?",
        "Tell me the weather for {city} on {day}.",
    ),
    "set_timer": (
        "Set a timer for {minutes} minutes for {label}.",
        "Start a {minutes} minute timer for {label}.",
        "I need a {label} timer of {minutes} minutes.",
    ),
    "play_music": (
        "Play {genre} at volume {volume}.",
        "Play some {genre} music at volume {volume}.",
        "I want to hear {genre} at volume {volume}.",
    ),
}
NO_TOOL = "I have no tool for that."
WHO = (
    "I am a tiny demonstration model. "
    "I describe pictures and clips of simple shapes and call tools."
)
LIMITS = "I am a tiny model. I only know simple shapes, short clips and a few tools."
TALK = (
    (("Hello", "Hi", "Hello!", "Hi!", "Hey", "Hello there!", "Good morning!"), "Hello! " + WHO),
    (
        ("Who are you?", "What are you?", "What can you do?", "Introduce yourself.", "Help"),
        WHO,
    ),
    (("How are you?", "How do you do?"), "I am fine. Show me a picture."),
    (("Thanks", "Thank you!", "Thank you.", "Great!", "Good"), "You are welcome."),
    (("Bye", "Goodbye!", "Good night!", "See you"), "Goodbye!"),
)
OPEN_QUESTIONS = (
    *("Write a poem about the sea.", "What is the capital of France?", "Tell me a joke."),
    *("What is two plus two?", "Explain how a rainbow works.", "Write a short story."),
    *("Why is the sky blue?", "Who wrote this book?", "What time is it?", "Say something."),
    *("Translate this to German.", "Count to ten.", "Name three animals.", "Sing a song."),
    *("Write a function that adds two numbers.", "What is the meaning of life?"),
)
WORDS = " ".join(OPEN_QUESTIONS).replace(".", "").replace("?", "").lower().split()


def schema(name: str, rng: np.random.Generator) -> dict:
    """The tool in OpenAI's form; the one-line description is sometimes left out."""
    properties = {
        key: {"type": "string" if values else "integer"} for key, values in TOOLS[name].items()
    }
    function: dict = {"name": name}
    if rng.random() < 0.8:
        function["description"] = ABOUT[name]
    function["parameters"] = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }
    return {"type": "function", "function": function}


def random_arguments(name: str, rng: np.random.Generator) -> dict[str, str | int]:
    return {
        key: values[rng.integers(len(values))] if values else int(rng.integers(1, 101))
        for key, values in TOOLS[name].items()
    }


def call_key(name: str, arguments: dict) -> str:
    return name + " " + json.dumps(arguments, sort_keys=True)


def random_call(rng: np.random.Generator, held_out: bool) -> tuple[str, dict]:
    names = tuple(TOOLS)
    while True:
        name = names[rng.integers(len(names))]
        arguments = random_arguments(name, rng)
        if is_held_out(call_key(name, arguments)) == held_out:
            return name, arguments


def request_text(name: str, arguments: dict, rng: np.random.Generator, exact: bool) -> str:
    forms = REQUESTS[name]
    text = forms[0 if exact else rng.integers(len(forms))].format(**arguments)
    if arguments.get("day") in ("today", "tomorrow"):
        text = text.replace(" on to", " to")
    return text if exact or rng.random() < 0.85 else text[:-1]


def choose_tools(name: str, rng: np.random.Generator, with_it: bool = True) -> list[dict]:
    """One to three tools, in any order, with or without the one that is needed."""
    others = [n for n in TOOLS if n != name]
    count = int(rng.integers(0, 3)) + (not with_it)
    chosen = list(rng.permutation(others)[: min(count, len(others))]) + [name] * with_it
    return [schema(str(n), rng) for n in rng.permutation(chosen)]


def call_reasoning(name: str, arguments: dict) -> str:
    return f"tool: {name}\n" + "\n".join(f"{k}: {v}" for k, v in arguments.items())


def request_item(rng: np.random.Generator, held_out: bool = False) -> Item:
    """A request with tools at hand; in training also requests that no tool fits."""
    name, arguments = random_call(rng, held_out)
    fits = held_out or rng.random() < 0.88
    tools = choose_tools(name, rng, fits)
    turn = {"role": "user", "content": request_text(name, arguments, rng, held_out)}
    history = [] if held_out else system_turns(rng)
    key = call_key(name, arguments)
    if not fits:
        tools = tools if rng.random() < 0.7 else None
        reasoning = f"tool: {name} is missing"
        return Item("request", key, [*history, turn], NO_TOOL, reasoning, tools)
    call = {"name": name, "arguments": arguments}
    reasoning = call_reasoning(name, arguments)
    return Item("request", key, [*history, turn], "", reasoning, tools, call)


def result_item(rng: np.random.Generator) -> Item:
    """The turn after a tool has answered."""
    name, arguments = random_call(rng, False)
    if name == "get_weather":
        sky, degrees = SKIES[rng.integers(len(SKIES))], int(rng.integers(1, 40))
        result = f"{sky}, {degrees} degrees"
        answer = f"The weather in {arguments['city']} is {result}."
    else:
        result, answer = "ok", "Done."
    called = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [
        {"role": "user", "content": request_text(name, arguments, rng, False)},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": result},
    ]
    tools = choose_tools(name, rng)
    return Item("result", answer, turns, answer, f"result: {result}", tools)


def talk_item(rng: np.random.Generator) -> Item:
    """Small talk, and an honest answer to all else."""
    if rng.random() < 0.6:
        prompts, answer = TALK[rng.integers(len(TALK))]
        text, reasoning = prompts[rng.integers(len(prompts))], "small talk"
    elif rng.random() < 0.5:
        text, answer = OPEN_QUESTIONS[rng.integers(len(OPEN_QUESTIONS))], LIMITS
        reasoning = "unknown"
    else:
        text = " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(2, 12)))
        answer, reasoning = LIMITS, "unknown"
    turns = [*system_turns(rng), {"role": "user", "content": loosen(text, rng)}]
    if rng.random() < 0.2:
        prompts, reply = TALK[rng.integers(len(TALK))]
        first = {"role": "user", "content": prompts[rng.integers(len(prompts))]}
        turns = [first, {"role": "assistant", "content": reply}, turns[-1]]
    return Item("talk", text, turns, answer, reasoning)
