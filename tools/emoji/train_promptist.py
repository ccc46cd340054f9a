"""Train the bundled backend's rewriter: `python -m tools.emoji.train_promptist all` (or `sft`, `rl`, `export`).

The recipe of Promptist (arXiv 2212.09611) for the emoji world: a small GPT-2 first learns to continue plain captions to
rich ones, then climbs the bundled rewards of the pictures by policy gradient. It needs the package's backend and
rewards, not the drawn scenes. Both stages resume from their checkpoints; `--steps` and `--batch` override the schedule.
`evaluate` prints what the shipped one does.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer, GPT2Config, GPT2LMHeadModel

import ipgo
from ipgo.adapters import shorten
from ipgo.backends import Backend
from ipgo.methods.promptist import ASK, BUNDLED, Promptist
from ipgo.models import BUNDLED_REWARDS
from ipgo.prompts import read_prompts
from ipgo.rewards.emoji import load_judge
from ipgo.task import Task
from tools.emoji import arguments, world
from tools.emoji.loop import DEVICE, Figures, Schedule, renew, train, trained

TOKENIZER = Path("src/ipgo/backends/emoji/tokenizer")
SUPERVISED, FINAL = "promptist-sft", "promptist"
SCHEDULES = {
    SUPERVISED: Schedule(steps=2_500, batch=64, lr=2e-3, warmup=100),
    FINAL: Schedule(steps=75, batch=16, lr=3e-4, warmup=5, weight_decay=0.0),
}
GROUP = 4  # rewritings of a prompt that are compared with one another
IMAGES = 1  # of each text; published: 2
SAMPLING = ipgo.Sampling(steps=8)
LONGEST = 48  # tokens of a rewritten prompt
QUALITY = "high quality, sharp"  # what most rich captions end with

# Published: 20 for a cosine below 0.28, and 0.2, beside an aesthetic score of 1 to 10. Ours is from 0 to 1.
RELEVANCE = 2.0  # how much a cosine counts that is below that of the plain prompt's own picture
KL = 0.02  # how much a nat counts by which the policy has left the supervised model


def tokenizer() -> CLIPTokenizer:
    """The backend's own, so that every rewriting is in words that it knows."""
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def language_model(tokens: CLIPTokenizer) -> GPT2LMHeadModel:
    """A GPT-2 of four layers, 128 wide: 1.1 million parameters. Untied, since checkpoints hold no tensor twice."""
    marks = {"bos_token_id": tokens.eos_token_id, "eos_token_id": tokens.eos_token_id}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"n_positions": 192, "n_embd": 128, "n_layer": 4, "n_head": 4}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokens), tie_word_embeddings=False, **size, **marks, **drops)
    )


# ------------------------------------------------------------------------------------------------- supervised


def pair(rng: np.random.Generator) -> tuple[str, str]:
    """A caption of a training scene, plain or wordy, and a rich one: it goes on in words of quality.

    Nothing of the first is lost, and what follows can nearly be foreseen. Promptist's beam search multiplies the log
    probability of a text by its length, so that one with a choice in it, such as a background that is left open, is
    worth less to it than none at all.
    """
    scene = world.sample_scene(rng, clean=True)
    text = world.noun(rng, scene.objects[0])
    if scene.relation is not None:
        text += f" {rng.choice(world.RELATION_WORDS[scene.relation])} {world.noun(rng, scene.objects[1])}"
    style, after = str(rng.choice(world.STYLES[scene.style])), []
    opened, named = rng.random() < 0.5, rng.random() < 0.6
    if opened:
        kind = str(rng.choice(("picture", "icon", "emoji", "image")))
        words = [*rng.choice((*world.FILLERS, "little"), size=rng.integers(3), replace=False)]
        words += [style, kind] if named else [kind]
        text = f"{world.article(' '.join(words))} of {text}"
    if rng.random() < 0.8:
        text += f" on a {scene.colour} background"
    if named and not opened:
        after.append(style)
    if rng.random() < 0.5:
        after += rng.choice(world.FILLERS, size=rng.integers(1, 4), replace=False).tolist()
    text = ", ".join([text, *after])
    usual = rng.random() < 0.85
    return text, f"{text}, {QUALITY if usual else rng.choice(world.CLEAN_WORDS)}"


def encode(tokens: CLIPTokenizer, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) of "PLAIN Rephrase:RICH" and an end, and as labels those of RICH and the end (else -100)."""
    plain, rich = zip(*pairs, strict=True)
    asks = tokens([each + ASK for each in plain], add_special_tokens=False).input_ids
    answers = [[*ids, tokens.eos_token_id] for ids in tokens(list(rich), add_special_tokens=False).input_ids]
    length = max(len(ask) + len(answer) for ask, answer in zip(asks, answers, strict=True))
    ids = torch.full((len(pairs), length), tokens.eos_token_id)
    labels = torch.full((len(pairs), length), -100)
    for row, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        end = len(ask) + len(answer)
        ids[row, :end] = torch.tensor([*ask, *answer])
        labels[row, len(ask) : end] = torch.tensor(answer)
    return ids, labels


def train_supervised(schedule: Schedule = SCHEDULES[SUPERVISED]) -> None:
    """Cross-entropy of the rich captions; every batch is drawn anew."""
    tokens = tokenizer()
    torch.manual_seed(0)
    model = language_model(tokens)

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        ids, labels = encode(tokens, [pair(rng) for _ in range(batch)])
        # Padding needs no mask: it follows the text, and the model is causal.
        logits = model(input_ids=ids[:, :-1].to(DEVICE)).logits
        value = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().to(DEVICE))
        return value, {"perplexity": value.exp()}

    train(SUPERVISED, model, loss, schedule)


# --------------------------------------------------------------------------------------------- policy gradient


def log_probability(model: GPT2LMHeadModel, ids: Tensor, start: int) -> Tensor:
    """(B,): of the tokens of `ids` (B, L) from `start` on, up to and with the first end."""
    logits = model(input_ids=ids[:, :-1]).logits[:, start - 1 :]  # (B, L - start, V)
    chosen = ids[:, start:]
    each = logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    ended = (chosen == model.config.eos_token_id).long().cumsum(1)
    inside = (ended == 0) | ((ended == 1) & (chosen == model.config.eos_token_id))
    return (each * inside).sum(1)


def advantages(rewards: Tensor) -> Tensor:
    """(B, G) to (B, G): each reward less the mean of the others of its prompt, which makes no bias."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


class Judged:
    """Promptist's reward of a rewriting: what its pictures gain in quality, less what they lose in relevance."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.quality = ipgo.load_reward("emoji-aesthetic", device=str(DEVICE))
        self.relevance = ipgo.load_reward("emoji-clip", device=str(DEVICE))

    @torch.no_grad()
    def __call__(self, plain: str, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(G,) for G texts y of a plain prompt x: quality(y) - quality(x) + RELEVANCE min(0, cos(y, x) - cos(x, x))."""
        fits = [shorten(self.backend, text) for text in texts]
        drawn = [text for text in (plain, *fits) for _ in seeds]
        images = ipgo.generate(self.backend, drawn, [*seeds] * (len(texts) + 1), ipgo.Adapter(), SAMPLING)
        quality, relevance = (
            reward(images, [plain] * len(drawn)).view(-1, len(seeds)).mean(1)
            for reward in (self.quality, self.relevance)
        )
        return (quality - quality[0] + RELEVANCE * (relevance - relevance[0]).clamp(max=0))[1:]


def train_policy(schedule: Schedule = SCHEDULES[FINAL]) -> None:
    """REINFORCE from the supervised model, with the other rewritings of a prompt as its baseline."""
    tokens = tokenizer()
    before = trained(SUPERVISED, language_model(tokens))
    model = language_model(tokens)
    model.load_state_dict(before.state_dict())
    judged = Judged(ipgo.load_backend("emoji", device=str(DEVICE)))

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        rewards, strays, logs = [], [], []
        for _ in range(max(1, batch // GROUP)):
            plain, _ = pair(rng)
            ids = tokens(plain + ASK, add_special_tokens=False, return_tensors="pt").input_ids.to(DEVICE)
            start = ids.shape[1]
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                num_return_sequences=GROUP,
                max_new_tokens=LONGEST,
                pad_token_id=tokens.eos_token_id,
            )
            texts = tokens.batch_decode(whole[:, start:], skip_special_tokens=True)
            seeds = [int(seed) for seed in rng.integers(2**31, size=IMAGES)]
            rewards.append(judged(plain, texts, seeds))
            logs.append(log_probability(model, whole, start))
            with torch.no_grad():
                strays.append(logs[-1] - log_probability(before, whole, start))
        reward, stray = torch.stack(rewards).to(DEVICE), torch.stack(strays)
        gain = advantages(reward - KL * stray.detach())
        figures = {"reward": reward.mean(), "kl": stray.mean()}
        return -(gain * torch.stack(logs)).mean(), figures

    train(FINAL, model, loss, schedule, origin=before)


def export(folder: Path = BUNDLED) -> None:
    """The final model in half precision, with its tokenizer, into the package."""
    tokens = tokenizer()
    model = trained(FINAL, language_model(tokens))
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    tokens.save_pretrained(folder)


@torch.no_grad()
def evaluate(count: int = 4, seeds: Sequence[int] = (0, 1)) -> None:
    """Print what the shipped rewriter does to the bundled rewards, on `count` prompts of each train half.

    Beside it the words that it could simply have added.
    """
    backend, judge = ipgo.load_backend("emoji", device=str(DEVICE)), load_judge(DEVICE)
    rewards = [ipgo.load_reward(name, device=str(DEVICE)) for name in BUNDLED_REWARDS]
    prompts = [each for kind in ("one", "two", "styled") for each in read_prompts(f"{kind}:train")[:count]]
    task = Task(backend, rewards[0], tuple(prompts), ipgo.Sampling(steps=1))
    (written,) = Promptist().fit(task)
    rewritten = [text or prompt for prompt, text in zip(prompts, written.adapter.texts, strict=True)]
    added = [f"{prompt}, {QUALITY}" for prompt in prompts]
    asked = [prompt for prompt in prompts for _ in seeds]
    print(f"| prompts | {' | '.join(reward.name for reward in rewards)} | judge: object |")
    print("|---" * (len(rewards) + 2) + "|")
    for name, texts in (("raw", prompts), ("rewritten", rewritten), ("quality words", added)):
        drawn = [text for text in texts for _ in seeds]
        images = ipgo.generate(backend, drawn, [*seeds] * len(texts), ipgo.Adapter(), ipgo.Sampling(steps=10))
        values = " | ".join(f"{reward(images, asked).mean():.3f}" for reward in rewards)
        print(f"| {name} | {values} | {judge.accuracy(images, asked)['object'].nanmean():.0%} |")
    for prompt, text in zip(prompts, rewritten, strict=True):
        print(f"{prompt!r} became {text!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["sft", "rl", "export", "all", "evaluate"])
    parser.add_argument("--steps", type=arguments.count, help="of the stage, instead of the schedule's")
    parser.add_argument("--batch", type=arguments.count, help="texts per step, instead of the schedule's")
    options = parser.parse_args()
    changes = {name: getattr(options, name) for name in ("steps", "batch") if getattr(options, name)}
    if changes and options.stage in ("export", "evaluate"):
        parser.error(f"{', '.join(f'--{key}' for key in changes)}: stage {options.stage!r} has no schedule")
    if options.stage in ("sft", "all"):
        if changes:
            renew(SUPERVISED)
        train_supervised(replace(SCHEDULES[SUPERVISED], **changes))
    if options.stage in ("rl", "all"):
        if changes:
            renew(FINAL)
        train_policy(replace(SCHEDULES[FINAL], **changes))
    if options.stage in ("export", "all"):
        export()
    if options.stage == "evaluate":
        evaluate()
