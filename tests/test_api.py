"""What an application sees: events, reasons to stop, threads and refusals."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import qwen35_mlx
import tiny
from qwen35_mlx import Finish, Qwen35, Reasoning, Sampling, Text, ToolCall, api, engine, memory
from qwen35_mlx.errors import InputError, ModelError, OutOfMemory

EXAMPLES = Path(__file__).parents[1] / "examples"
GREEDY = Sampling(temperature=0)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def model() -> Qwen35:
    return qwen35_mlx.load(EXAMPLES / "demo-model")


@pytest.fixture
def says(model: Qwen35, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the network "say" a text: the engine is replaced, all behind it is real."""

    def script(text: str) -> None:
        def tokens(*_: Any, max_tokens: int, **options: Any) -> Iterator[int]:
            options["clock"].prompt_done = options["clock"].now()
            yield from model.tokenizer.encode(text)[:max_tokens]

        monkeypatch.setattr(engine, "generate", tokens)

    return script


def ask(model: Qwen35, thinking: bool = False, **options: Any) -> list[Any]:
    return list(model.stream("What is it?", thinking=thinking, **options))


def joined(events: list[Any], kind: type[Text] | type[Reasoning]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def finish_of(events: Iterable[Any]) -> Finish:
    *_, last = events
    assert isinstance(last, Finish)
    return last


def picture_question(color: str = "red") -> list[dict[str, Any]]:
    image = Image.new("RGB", (96, 96), color)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": parts}]


def test_reasoning_text_and_finish_come_apart(model: Qwen35, says: Any) -> None:
    says("because\n</think>\n\nA red circle.<|im_end|>never seen")
    events = ask(model, thinking=True)
    assert joined(events, Reasoning) == "because"
    assert joined(events, Text) == "A red circle."
    assert isinstance(events[-1], Finish) and events[-1].reason == "stop"
    assert events[-1].usage.generated_tokens > 3


def test_a_tool_call_is_typed_and_ends_with_its_reason(model: Qwen35, says: Any) -> None:
    says(
        "One moment.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\n7\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>"
    )
    result = model.generate("Weather?", tools=[WEATHER], thinking=False)
    assert result.text == "One moment." and result.finish.reason == "tool_calls"
    assert [(c.name, c.arguments) for c in result.tool_calls] == [("get_weather", {"city": "7"})]


@pytest.mark.parametrize("stop", ["BLUE", "a BLUE sq", "."])
def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(
    model: Qwen35, says: Any, stop: str
) -> None:
    text = "A red circle and a BLUE square. More.<|im_end|>"
    says(text)
    events = ask(model, stop=["absent", stop])
    assert joined(events, Text) == text[: text.index(stop)]
    assert events[-1].reason == "stop"


def test_an_almost_stop_is_given_back_at_the_end(model: Qwen35, says: Any) -> None:
    says("It ends with STO<|im_end|>")
    assert joined(ask(model, stop=["STOP"]), Text) == "It ends with STO"


def test_the_limit_of_tokens_is_its_own_reason(model: Qwen35, says: Any) -> None:
    says("one two three four five six seven eight")
    finish = ask(model, max_tokens=3)[-1]
    assert finish.reason == "length" and finish.usage.generated_tokens == 3


def test_stream_and_generate_agree_on_a_picture(model: Qwen35) -> None:
    events = list(model.stream(picture_question(), sampling=GREEDY, max_tokens=40))
    result = model.generate(picture_question(), sampling=GREEDY, max_tokens=40)
    assert result.text == joined(events, Text) != ""
    usage = result.finish.usage
    assert usage.prompt_tokens > 9 and usage.peak_bytes > 0
    assert 0 < usage.prompt_seconds <= usage.first_token_seconds
    assert usage.generation_seconds > 0


def test_a_seed_repeats_itself_and_others_differ(model: Qwen35) -> None:
    def answer(seed: int) -> str:
        hot = Sampling(temperature=2.0, top_p=1.0, top_k=0, seed=seed)
        return model.generate("Hello", sampling=hot, max_tokens=12).text

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_logits_are_those_of_the_answer(model: Qwen35) -> None:
    prompt = model.prompt(picture_question(), thinking=False)
    first = int(model.logits(prompt, last=1)[0].argmax())
    result = model.generate(prompt, sampling=GREEDY, max_tokens=1)
    assert result.text == model.tokenizer.decode([first])


def test_another_thread_can_stop_a_stream(model: Qwen35) -> None:
    cancel = threading.Event()
    stream = model.stream("Hello", sampling=GREEDY, cancel=cancel)
    assert isinstance(next(stream), Text)
    setter = threading.Thread(target=cancel.set)
    setter.start()
    setter.join()
    finish = finish_of(stream)
    assert finish.reason == "cancelled"
    assert finish.usage.generated_tokens < 5


def test_loaded_here_it_answers_in_other_threads_in_turn() -> None:
    model, found = qwen35_mlx.load(EXAMPLES / "demo-model"), []

    def work() -> None:
        found.append(model.generate(picture_question(), sampling=GREEDY, max_tokens=30).text)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert len(found) == 3 and len(set(found)) == 1


def test_progress_reports_the_prompt(model: Qwen35) -> None:
    seen: list[qwen35_mlx.Progress] = []
    list(model.stream("Hello", max_tokens=1, progress=seen.append))
    assert seen[-1].stage == "prompt" and seen[-1].done == seen[-1].total > 0


def test_a_prompt_over_the_context_says_by_how_much(
    model: Qwen35, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = model.prompt("Hello")
    monkeypatch.setattr(Qwen35, "context", len(prompt.tokens) - 3)
    with pytest.raises(InputError, match="Shorten it by at least 4 tokens"):
        model.stream(prompt)


def test_the_context_limits_the_answer(model: Qwen35, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = model.prompt("Hello")
    monkeypatch.setattr(Qwen35, "context", len(prompt.tokens) + 2)
    finish = finish_of(model.stream(prompt, sampling=GREEDY))
    assert finish.reason == "length" and finish.usage.generated_tokens == 2


def test_what_does_not_fit_is_refused_before_it_runs(
    model: Qwen35, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = model.prompt("Hello")
    monkeypatch.setattr(memory, "available", lambda: 100_000)
    with pytest.raises(OutOfMemory, match="a prompt of .* tokens: needs"):
        model.stream(prompt)
    with pytest.raises(OutOfMemory, match="tokens and an answer of 9: needs"):
        model.stream(prompt, max_tokens=9)
    with pytest.raises(OutOfMemory, match="rows of logits"):
        model.logits(prompt)


def test_memory_limits_the_answer_nobody_limited(
    model: Qwen35, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = model.prompt("Hello")
    per_token = 2 * memory.kv_bytes(model.config.text, 1, 2)
    needed = model._prompt_bytes(prompt)
    monkeypatch.setattr(memory, "available", lambda: needed + 3 * per_token)
    finish = finish_of(model.stream(prompt, sampling=GREEDY))
    assert finish.reason == "length" and finish.usage.generated_tokens == 3


def test_tools_beside_a_finished_prompt_are_refused(model: Qwen35) -> None:
    with pytest.raises(InputError, match="Give them to prompt"):
        model.stream(model.prompt("Hello"), tools=[WEATHER])


def test_preprocessor_files_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLES / "demo-model", tmp_path / "m")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 14}))
    with pytest.raises(ModelError, match=r"\(14, 2, 2\); config.json says \(16, 2, 2\)"):
        qwen35_mlx.load(folder).prompt(picture_question())


def test_token_ids_outside_the_model_are_refused(model: Qwen35) -> None:
    tokens = np.array([5, 5000], np.int32)
    prompt = qwen35_mlx.Prompt(tokens, np.zeros((3, 2), np.int32), 0)
    with pytest.raises(InputError, match="token 5000; the model has 0 to 1023"):
        model.stream(prompt)


def test_a_cancelled_prompt_counts_what_was_read(
    model: Qwen35, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 4)
    cancel = threading.Event()
    options: dict[str, Any] = {"cancel": cancel, "progress": lambda _: cancel.set()}
    finish = finish_of(model.stream("A question of more than four tokens", **options))
    assert finish.reason == "cancelled"
    assert finish.usage.prompt_tokens == 4 and finish.usage.generated_tokens == 0


def test_a_prompt_of_another_model_is_refused(model: Qwen35) -> None:
    prompt = model.prompt(picture_question())
    moved = dataclasses.replace(
        prompt, tokens=np.where(prompt.tokens == model.config.image_token_id, 7, prompt.tokens)
    )
    with pytest.raises(InputError, match="0 placeholders for 9 rows"):
        model.stream(moved)


def test_a_dtype_that_is_no_float_is_refused() -> None:
    with pytest.raises(InputError, match="dtype"):
        qwen35_mlx.load(EXAMPLES / "demo-model", dtype=mx.int32)


@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"max_tokens": 1.5}, {"stop": [""]}, {"stop": "abc"}]
)
def test_values_that_mean_nothing_are_refused_at_once(
    model: Qwen35, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        model.stream("Hello", **options)


def test_a_text_only_model_refuses_pictures_and_reads_text(model: Qwen35, tmp_path: Path) -> None:
    config = tiny.CONFIGS["dense"]
    tensors = {n: v for n, v in tiny.draw(config).items() if not n.startswith("model.visual")}
    blind = qwen35_mlx.load(tiny.write(tmp_path, config, tensors))
    prompt = model.prompt(picture_question())
    with pytest.raises(InputError, match="no vision tower"):
        blind.stream(prompt)
    words = qwen35_mlx.Prompt(np.arange(5, dtype=np.int32), np.zeros((3, 5), np.int32), 0)
    assert blind.logits(words, last=2).shape == (2, 389)


def test_the_recommended_sampling_is_the_folders_own_for_an_unknown_size(model: Qwen35) -> None:
    assert model.size is None
    assert model.recommended_sampling(model.prompt("Hello")).temperature == 0


def test_logits_want_at_least_one_row(model: Qwen35) -> None:
    with pytest.raises(InputError, match="last is 0"):
        model.logits(model.prompt("Hello"), last=0)


def test_nothing_is_printed(model: Qwen35, capfd: pytest.CaptureFixture[str]) -> None:
    model.generate("Hello", max_tokens=3, sampling=GREEDY)
    assert capfd.readouterr() == ("", "")


def test_f32_arithmetic_can_be_asked_for(model: Qwen35) -> None:
    exact = qwen35_mlx.load(EXAMPLES / "demo-model", dtype=mx.float32)
    prompt = model.prompt(picture_question())
    a, b = (np.array(m.logits(prompt)) for m in (model, exact))
    assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.1


def test_the_public_names_are_all_there() -> None:
    for name in qwen35_mlx.__all__:
        assert getattr(qwen35_mlx, name).__doc__
    assert {Text, Reasoning, ToolCall} <= {getattr(qwen35_mlx, n) for n in qwen35_mlx.__all__}
    assert api.load is qwen35_mlx.load
