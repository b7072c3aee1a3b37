"""Train the demonstration model: python train.py RUN_FOLDER --seed 0 --workers 2.

RUN_FOLDER holds tokenizer.json (made by tokenizer.py) and receives checkpoint.pt and, at every
evaluation, the folder `model` in Hugging Face form. Started again, it goes on from the checkpoint.
One process per worker, one thread each: OMP_NUM_THREADS=1.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from conversation import Sample, encode
from export import model_config, write_folder
from model import Demo
from optimizer import Optimizer
from requests_world import request_item, result_item, talk_item
from world import (
    clip_item,
    held_out_clips,
    held_out_scenes,
    held_out_tool_requests,
    question_item,
    scene_item,
)


@dataclass(frozen=True)
class Phase:
    """`steps` of training of one part of the model.

    `mix` is samples per step over all workers, in the order of `MAKERS`; the phase goes from
    `first_mix` to `mix` over the steps `ramp`. Learning rates are `peak` of their full value until
    `flat` of the phase has passed, then fall to zero.
    """

    part: str
    steps: int
    mix: tuple[float, ...]
    first_mix: tuple[float, ...]
    ramp: tuple[int, int] = (0, 1)
    peak: float = 1.0
    flat: float = 0.5

    def pace(self, step: int) -> float:
        left = (self.steps - step) / (self.steps * (1 - self.flat))
        return self.peak * max(0.0, min(1.0, (step + 1) / 50, left))

    def shares(self, step: int) -> list[float]:
        start, end = self.ramp
        late = min(1.0, max(0.0, (step - start) / (end - start)))
        return [a + (b - a) * late for a, b in zip(self.first_mix, self.mix, strict=True)]


MAKERS = (scene_item, question_item, clip_item, request_item, result_item, talk_item)
# Pictures first, because all else needs them; then everything; the draft head learns from the model
# as it is. The second round gives the tool requests, the last to be learned, the largest share.
PICTURES, ALL, TOOLS = (34, 4, 2, 1, 0.5, 2), (18, 6, 10, 5, 1, 2), (6, 4, 8, 10, 1, 2)
PHASES = (
    Phase("model", 1400, ALL, PICTURES, (168, 350)),
    Phase("draft", 250, ALL, ALL),
    Phase("model", 500, TOOLS, TOOLS, peak=0.6, flat=0.2),
    Phase("draft", 200, TOOLS, TOOLS),
)
TOTAL = sum(phase.steps for phase in PHASES)
BATCH_TOKENS = 1800


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids `[B, L]`, positions `[3, B, L]`, target `[B, L]`, patches; padded on the right, where
    nothing looks."""
    size = len(samples), max(len(s.ids) for s in samples)
    ids, target = np.zeros(size, np.int64), np.zeros(size, bool)
    positions = np.zeros((3, *size), np.int64)
    for i, s in enumerate(samples):
        ids[i, : len(s.ids)], target[i, : len(s.ids)] = s.ids, s.target
        positions[:, i, : len(s.ids)] = s.positions
    patches = np.concatenate([s.patches for s in samples])
    return tuple(torch.from_numpy(x) for x in (ids, positions, target, patches))


def draw(
    step: int, args: argparse.Namespace, rank: int, tokenizer: Tokenizer
) -> list[list[Sample]]:
    """This worker's micro-batches of this step, alike in length; a step number fixes its data."""
    rng = np.random.default_rng([args.seed, step, rank])
    phase, offset = phase_at(step)
    samples = []
    for make, share in zip(MAKERS, phase.shares(offset), strict=True):
        for _ in range(int(share / args.workers + rng.random())):
            samples.append(encode(make(rng), bool(rng.random() < 0.5), tokenizer))
    batches: list[list[Sample]] = [[]]
    for s in sorted(samples, key=lambda s: len(s.ids)):
        if (len(batches[-1]) + 1) * len(s.ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(s)
    return batches


def batch_loss(model: Demo, samples: list[Sample], mtp: bool) -> tuple[Tensor, int]:
    """Sum of cross entropies over the learned tokens, and how many they are."""
    ids, positions, target, patches = collate(samples)
    ahead = 2 if mtp else 1
    if mtp:
        with torch.no_grad():
            hidden = model.hidden(ids, positions, patches)
        hidden = model.drafts(ids, positions, hidden)[:, :-1]
    else:
        hidden = model.hidden(ids, positions, patches)[:, :-1]
    learned = target[:, ahead:]
    logits = model.logits(hidden[learned])
    return F.cross_entropy(logits, ids[:, ahead:][learned], reduction="sum"), int(learned.sum())


def phase_at(step: int) -> tuple[Phase, int]:
    """The phase of a step and the step's number in it."""
    for phase in PHASES:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise ValueError(f"step: {step} after the last phase; expected less than {TOTAL}")


@torch.no_grad()
def score(model: Demo, samples: list[Sample]) -> tuple[float, float]:
    """(whole replies right, draft tokens right) when decoding greedily.

    With the right tokens before it, every argmax must be the next right token: the same as the
    decoded reply being exact.
    """
    exact = drafted = tokens = 0
    order = sorted(samples, key=lambda s: len(s.ids))
    for i in range(0, len(order), 16):
        ids, positions, target, patches = collate(order[i : i + 16])
        hidden = model.hidden(ids, positions, patches)
        right = model.logits(hidden[:, :-1]).argmax(-1) == ids[:, 1:]
        exact += int((right | ~target[:, 1:]).all(1).sum())
        drafts = model.logits(model.drafts(ids, positions, hidden)[:, :-1]).argmax(-1)
        learned = target[:, 2:]
        drafted += int((drafts == ids[:, 2:])[learned].sum())
        tokens += int(learned.sum())
    return exact / len(samples), drafted / tokens


def held_out(tokenizer: Tokenizer, count: int) -> dict[str, list[Sample]]:
    makers = {
        "scene": held_out_scenes,
        "clip": held_out_clips,
        "tool": held_out_tool_requests,
    }
    return {
        name + ("+think" if thinking else ""): [encode(i, thinking, tokenizer) for i in items]
        for name, items in ((name, make(count, 1)) for name, make in makers.items())
        for thinking in (False, True)
    }


class Run:
    """One worker's training."""

    def __init__(self, rank: int, args: argparse.Namespace) -> None:
        self.rank, self.args = rank, args
        torch.set_num_threads(1)
        torch.manual_seed(args.seed)
        if args.workers > 1:
            store = f"file://{args.out.resolve()}/rendezvous"
            dist.init_process_group("gloo", store, rank=rank, world_size=args.workers)
        self.tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        self.config = model_config(self.tokenizer)
        self.model = Demo(self.config)
        self.optimizer = Optimizer(self.model, args.workers, rank)
        self.step = 0
        self.tests = {k: v[rank :: args.workers] for k, v in held_out(self.tokenizer, 32).items()}
        path = args.out / "checkpoint.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load(saved["optimizer"])
            self.step = saved["step"]

    def train_step(self) -> float:
        args, (phase, offset) = self.args, phase_at(self.step)
        mtp = phase.part == "draft"
        loss = tokens = 0
        for samples in draw(self.step, args, self.rank, self.tokenizer):
            one, count = batch_loss(self.model, samples, mtp)
            one.backward()
            loss, tokens = loss + one.item(), tokens + count
        if mtp:
            for name, p in self.model.named_parameters():
                p.grad = p.grad if name.startswith("mtp.") else None
        pace = phase.pace(offset)
        self.optimizer.step(0.02 * pace, 0.004 * pace, tokens)
        self.step += 1
        return loss / tokens

    def evaluate(self) -> str:
        """Held-out figures as a line, and a checkpoint."""
        found = [torch.tensor(score(self.model, s)) for s in self.tests.values()]
        found = [x / self.args.workers for x in self.optimizer.share(found)]
        if self.rank == 0:
            state = self.model.state_dict()
            saved = {"model": state, "config": self.config, "step": self.step}
            part = self.args.out / "checkpoint.part"
            torch.save({**saved, "optimizer": self.optimizer.state()}, part)
            part.rename(self.args.out / "checkpoint.pt")
            write_folder(state, self.config, self.args.out, self.args.out / "model")
        pairs = zip(self.tests, found, strict=True)
        return " ".join(f"{k} {x[0]:.3f}/{x[1]:.2f}" for k, x in pairs)

    def run(self) -> None:
        args, began, recent = self.args, time.time(), []
        while self.step < TOTAL:
            recent.append(self.train_step())
            if self.step % 25 == 0 and self.rank == 0:
                spent = time.time() - began
                print(f"step {self.step} loss {np.mean(recent):.4f} {spent:.0f} s", flush=True)
                recent = []
            if self.step % args.every == 0 or self.step == TOTAL or phase_at(self.step)[1] == 0:
                line = self.evaluate()
                if self.rank == 0:
                    print(f"step {self.step} held out (exact/draft): {line}", flush=True)


def work(rank: int, args: argparse.Namespace) -> None:
    Run(rank, args).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    args = parser.parse_args()
    (args.out / "rendezvous").unlink(missing_ok=True)
    if args.workers == 1:
        work(0, args)
    else:
        torch.multiprocessing.spawn(work, (args,), args.workers)


if __name__ == "__main__":
    main()
