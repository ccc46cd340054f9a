"""`ipgo doctor`: can this backend follow this reward?"""

from __future__ import annotations

from argparse import ArgumentParser

from ipgo.errors import InputError
from ipgo.prompts import check_prompts
from ipgo.terminal import add_device_flags, check_image, command_parser, fill_steps, given, loading


def doctor(argv: list[str]) -> int:
    """`ipgo doctor`: one small step, and in plain words what is wrong with it; 1 if something is."""
    args = _parser().parse_args(argv)
    if not args.prompt.strip():
        raise InputError("prompt is empty; it needs at least one word")
    check_prompts([args.prompt])
    check_image(args.guidance_scale, args.image_size)

    from ipgo.backends import load_backend
    from ipgo.defaults import reward_for
    from ipgo.devices import choose_device, choose_dtype
    from ipgo.doctor import check_steps, examine
    from ipgo.rewards import check_reward, load_reward
    from ipgo.sampling import Sampling

    fill_steps(args, 4)
    args.reward = args.reward or reward_for(args.backend)
    sampling = Sampling(steps=args.steps, guidance_scale=args.guidance_scale, fit_steps=None)
    backprop_steps = given(args.backprop_steps, min(2, args.steps))
    check_steps(sampling, backprop_steps)
    choose_dtype(args.dtype, choose_device(args.device))
    check_reward(args.reward, [args.prompt])
    loading(args.backend)
    backend = load_backend(
        args.backend,
        device=args.device,
        dtype=args.dtype,
        image_size=args.image_size,
        padding=args.padding,
        scheduler=args.scheduler,
        long_prompts=args.long_prompts,
        text_device=args.text_device,
    )
    reward = load_reward(args.reward, device=args.device)
    wrong = 0
    for finding in examine(backend, reward, args.prompt, sampling, backprop_steps):
        print(f"{'ok   ' if finding.good else 'WRONG'}  {finding.text}", flush=True)
        if not finding.good:
            wrong += 1
            print(f"       to do: {finding.advice}")
    print(
        f"\n{args.backend} follows {args.reward}"
        if not wrong
        else f"\n{args.backend} cannot follow {args.reward}"
    )
    return 1 if wrong else 0


def _parser() -> ArgumentParser:
    parser = command_parser(
        "doctor", "Run one small step, and check that the reward's gradient reaches inserted embeddings."
    )
    parser.add_argument("--backend", default="emoji", help="as in fit (default: emoji)")
    parser.add_argument("--reward", help="as in fit (default: what a fit follows)")
    parser.add_argument("--prompt", default="a lemon on a blue background", help="prompt to draw")
    drawn = "or those of a few-step model"
    parser.add_argument(
        "--backprop-steps", type=int, help="last steps with gradient (default: 2, or all if fewer)"
    )
    parser.add_argument("--steps", type=int, help=f"denoising steps (default: 4, {drawn})")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("--image-size", type=int, help="side of the image (default: the model's own)")
    parser.add_argument("--scheduler", help="ddim, pndm, lms, euler or dpm++ (default: the model's own)")
    parser.add_argument("--padding", default="max_length", help="max_length or none")
    parser.add_argument("--long-prompts", default="refuse", help="refuse, truncate or chunk")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add_device_flags(parser)
    return parser
