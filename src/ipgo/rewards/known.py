"""The rewards that have a name. A new one is a file here and a line in `REWARDS`."""

from __future__ import annotations

from dataclasses import dataclass

from ipgo.rewards.checkpoints import Source


@dataclass(frozen=True)
class Known:
    """A reward that has a name.

    Attributes:
        load: "module:function", imported when it is asked for. It takes a device, and a `Checkpoint` if there is a
            `source`, and returns the reward.
        what: one line for `ipgo list rewards`.
        source: where its weights are published; None: it comes with ipgo.
        uses_prompts, differentiable: as in `Reward`, before it is loaded.
        check: "module:function" that raises `InputError` for prompts that it cannot score; None: it scores any.
    """

    load: str
    what: str
    source: Source | None = None
    uses_prompts: bool = True
    differentiable: bool = True
    check: str | None = None

    def __str__(self) -> str:
        return self.what if self.source is None else f"{self.what} Weights: {self.source}."


REWARDS: dict[str, Known] = {
    "emoji-clip": Known(
        "ipgo.rewards.emoji:load_clip",
        "Alignment: does the image show what the prompt says? A cosine, as the CLIP score of photographs.",
    ),
    "emoji-aesthetic": Known(
        "ipgo.rewards.emoji:load_aesthetic",
        "Quality, 0 (spoilt) to 1 (clean), whatever the prompt.",
        uses_prompts=False,
    ),
    "emoji-preference": Known(
        "ipgo.rewards.emoji:load_preference",
        "Preference: a CLIP tuned on pairs of which the better aligned and cleaner image wins, as HPSv2 is.",
    ),
    "emoji-likeness": Known(
        "ipgo.rewards.emoji:load_likeness",
        "How much the objects in the image look like their artwork; nothing in it is learned.",
        check="ipgo.rewards.emoji.artwork:check_prompts",
    ),
    "emoji-judge": Known(
        "ipgo.rewards.emoji:load_judge",
        "The share of what the prompt says that is in the image, by a network that only judges; no gradient.",
        differentiable=False,
    ),
    "colorfulness": Known(
        "ipgo.rewards.pixels:load_colorfulness",
        "How colourful the image is, from its pixels; vivid photographs lie near 0.3.",
        uses_prompts=False,
    ),
    "contrast": Known(
        "ipgo.rewards.pixels:load_contrast",
        "How much the image's brightness varies, from its pixels; at most 0.5.",
        uses_prompts=False,
    ),
    "clip": Known(
        "ipgo.rewards.clip:load_clip",
        "CLIP score: the cosine of image and prompt (ViT-L/14 unless another CLIP is given).",
        Source("openai/clip-vit-large-patch14"),
    ),
    "pickscore": Known(
        "ipgo.rewards.clip:load_pickscore",
        "PickScore: a scaled cosine in a CLIP tuned on people's choices, about 18 to 24.",
        Source("yuvalkirstain/PickScore_v1"),
    ),
    "aesthetic": Known(
        "ipgo.rewards.aesthetic:load_aesthetic",
        "LAION aesthetic v2: how good the image looks, about 1 to 10, whatever the prompt.",
        Source("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
        uses_prompts=False,
    ),
    "hpsv2": Known(
        "ipgo.rewards.hps:load_hps",
        "HPSv2: a cosine in a CLIP tuned on people's rankings, near 0.27; not comparable with v2.1.",
        Source("xswu/HPSv2", "HPS_v2_compressed.pt"),
    ),
    "hpsv2.1": Known(
        "ipgo.rewards.hps:load_hps",
        "HPSv2.1: the same, tuned on more rankings; not comparable with v2.",
        Source("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    ),
    "imagereward": Known(
        "ipgo.rewards.imagereward:load_imagereward",
        "ImageReward v1.0: BLIP tuned on people's rankings, about -2 to 2.",
        Source("THUDM/ImageReward", "ImageReward.pt"),
    ),
}
