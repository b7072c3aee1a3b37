"""One measurement of one program in this process; peers.py starts it. Prints one line of JSON.

python benchmarks/worker.py ours|mlx-lm|mlx-vlm FOLDER --prompt N --tokens M

Every program is used through its public generator of token ids, on the same ids, greedily. Loading
is not timed. A short run of the same kind comes first, so that the timed one compiles nothing.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Generate = Callable[[np.ndarray, int], Iterator[int]]  # ids `[T]` int32, count -> tokens
WARM_UP = (65, 3)  # tokens of prompt and answer: more than one chunk, and a decoded step


def ours(folder: Path) -> Generate:
    from qwen35_mlx import Sampling, engine, load
    from qwen35_mlx.cache import Cache
    from qwen35_mlx.prompt import Prompt
    from qwen35_mlx.sampling import Sampler

    loaded = load(folder)

    def generate(ids: np.ndarray, count: int) -> Iterator[int]:
        positions = np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids)))
        return engine.generate(
            loaded.model,
            Prompt(ids, positions, delta=0, media=(), thinking=False, tools=()),
            Sampler(Sampling(temperature=0), loaded.config.text.vocab_size, ids),
            max_tokens=count,
            cache=Cache(loaded.config.text),
            clock=engine.Clock(),
        )

    return generate


def mlx_lm(folder: Path) -> Generate:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)

    def generate(ids: np.ndarray, count: int) -> Iterator[int]:
        for token, _ in generate_step(mx.array(ids), model, max_tokens=count):
            yield int(token)

    return generate


def mlx_vlm(folder: Path) -> Generate:
    import mlx.core as mx
    from mlx_vlm.generate import generate_step
    from mlx_vlm.utils import load_model

    model = load_model(folder)

    def generate(ids: np.ndarray, count: int) -> Iterator[int]:
        given = mx.array(ids)[None]
        steps = generate_step(given, model, None, None, max_tokens=count, temperature=0.0)
        for token, _ in steps:
            yield int(token)

    return generate


PROGRAMS: dict[str, Callable[[Path], Generate]] = {
    "ours": ours,
    "mlx-lm": mlx_lm,
    "mlx-vlm": mlx_vlm,
}


def ids_of(length: int, seed: int) -> np.ndarray:
    """`[length]` int32 drawn from the first 900 ids, which every checkpoint here has as text."""
    return np.random.default_rng(seed).integers(0, 900, length, dtype=np.int32)


def measure(generate: Generate, prompt: int, count: int) -> dict:
    """Seconds of wall and of this process's CPU to the first token, and from there to the last."""
    import mlx.core as mx

    for _ in generate(ids_of(min(prompt, WARM_UP[0]), seed=1), WARM_UP[1]):
        pass
    mx.clear_cache()
    mx.reset_peak_memory()
    ids = ids_of(prompt, seed=2)
    tokens, marks = [], [(time.perf_counter(), time.process_time())]
    for token in generate(ids, count):
        tokens.append(token)
        if len(tokens) in (1, count):
            marks.append((time.perf_counter(), time.process_time()))
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (wall, cpu), (wall_first, cpu_first), (wall_last, cpu_last) = marks[0], marks[1], marks[-1]
    return {
        "prompt_seconds": wall_first - wall,
        "prompt_cpu": cpu_first - cpu,
        "decode_seconds": wall_last - wall_first,
        "decode_cpu": cpu_last - cpu_first,
        "mlx_peak": mx.get_peak_memory(),
        "rss_peak": rss * (1 if sys.platform == "darwin" else 1024),
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    args = parser.parse_args()
    print(json.dumps(measure(PROGRAMS[args.program](args.folder), args.prompt, args.tokens)))


if __name__ == "__main__":
    main()
