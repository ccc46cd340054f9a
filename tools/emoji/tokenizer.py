"""A CLIP byte-pair tokenizer of our own, learned from the world's captions: `python -m tools.emoji.tokenizer`."""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from tools.emoji import data, world
from tools.emoji.sprites import BUILD, replacing

FOLDER = BUILD / "tokenizer"
SIZE = 1_500
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = BUILD / "words.json"  # that training captions use
LENGTH = 77
CAPTIONS = BUILD / "captions.npy"
PER_SCENE = 8


def _clip_tokenizer(merges: list[tuple[str, str]]) -> CLIPTokenizer:
    """CLIP's vocabulary layout: bytes, bytes at a word's end, one entry per merge, the two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), BOS, EOS]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def captions(count: int = 60_000, seed: int = 0) -> list[str]:
    """Training captions in all their variants."""
    _, scenes = data.load("train")
    rng = np.random.default_rng(seed)
    return [world.caption(rng, scenes[i % len(scenes)])[0] for i in range(count)]


def build() -> None:
    """Learn the merges and save the tokenizer and the list of words that training captions use."""
    texts = captions()
    clip = _clip_tokenizer([]).backend_tokenizer
    learner = Tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = sorted({word for text in texts for word in text.replace(",", " ").split()})
    with replacing(WORDS) as unfinished:
        unfinished.write_text(json.dumps(words))
    save(_clip_tokenizer(merges))


def save(tokens: CLIPTokenizer) -> None:
    """Put it where `load` finds it."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    with replacing(FOLDER) as unfinished:
        tokens.save_pretrained(unfinished)


def load() -> CLIPTokenizer:
    """The saved tokenizer."""
    if not FOLDER.exists():
        raise FileNotFoundError(f"no {FOLDER}: run the stage 'tokenizer' first")
    return CLIPTokenizer.from_pretrained(FOLDER)


def _caption_block(number: int, scenes: Sequence[world.Scene]) -> np.ndarray:
    rng, tokens = np.random.default_rng((3, number)), load()
    texts = [world.caption(rng, scene, admits=0.8)[0] for scene in scenes for _ in range(PER_SCENE)]
    ids = tokens(texts, padding="max_length", return_tensors="np").input_ids
    return ids.astype(np.int16).reshape(len(scenes), PER_SCENE, LENGTH)


def build_captions() -> None:
    """What the denoiser reads of every training scene, int16 (N, 8, 77): writing it anew would keep a GPU waiting.

    Captions mostly admit that a picture is spoilt, or words such as "blurry" would be too rare to be learned.
    """
    _, scenes = data.load("train")
    blocks = [scenes[start : start + data.BLOCK] for start in range(0, len(scenes), data.BLOCK)]
    with ProcessPoolExecutor() as pool:
        captions = np.concatenate(list(pool.map(_caption_block, range(len(blocks)), blocks)))
    with replacing(CAPTIONS) as unfinished:
        np.save(unfinished, captions)


if __name__ == "__main__":
    build()
