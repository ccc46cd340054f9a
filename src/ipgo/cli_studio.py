"""`ipgo studio`: the page that fits a prompt and shows every step of it."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import socket
import threading
from dataclasses import asdict
from pathlib import Path

from ipgo import files
from ipgo.errors import InputError, MissingExtraError, first_line
from ipgo.terminal import add_device_flags, command_parser, loading, path_of

FAREWELL = 60.0  # seconds that a fit has to end its step when the studio is closed


def studio(argv: list[str]) -> int:
    """`ipgo studio`: serve the page until Ctrl-C; a fit that is going on is kept."""
    args = _parser().parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise MissingExtraError('the studio needs gradio: pip install "ipgo[studio]"')
    files.check_out(args.out, folder=True)
    if args.port is not None and not 0 < args.port < 2**16:
        raise InputError(f"port is {args.port}; it must be from 1 to {2**16 - 1}")
    if ":" in args.host:
        raise InputError(f"host is {args.host!r}; give an IPv4 address of this machine, or its name")
    try:
        socket.getaddrinfo(args.host, args.port)
    except OSError as error:
        raise InputError(
            f"host is {args.host!r}, which is no address of this machine: {error.strerror}"
        ) from None

    from ipgo.backends import check_backend, load_backend
    from ipgo.backends.facts import Opening
    from ipgo.rewards import check_reward

    opening = Opening(
        args.image_size,
        scheduler=args.scheduler,
        long_prompts=args.long_prompts,
        text_device=args.text_device,
    )
    check_backend(args.backend, opening)
    for reward in args.rewards:
        check_reward(reward)
    loading(args.backend)
    backend = load_backend(args.backend, device=args.device, dtype=args.dtype, **asdict(opening))

    from ipgo.studio.app import Place, launch, page
    from ipgo.studio.live import Live

    live = Live(backend)
    settings = {"backend": args.backend, "device": args.device, "dtype": args.dtype, **asdict(opening)}
    place = Place(settings, args.out, tuple(args.rewards))
    blocks = page(live, place)
    try:
        address = launch(blocks, args.host, args.port, args.open)
    except OSError as error:
        taken = (
            f"host is {args.host!r}, port {args.port}; another program has it, or it is not this machine's"
        )
        raise InputError(taken if args.port else first_line(error)) from None
    print(f"studio:  {address}\nruns:    {args.out}\nCtrl-C closes it", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        live.stop()
        live.join(FAREWELL)
    finally:
        blocks.close(verbose=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("studio", "Serve a page that fits a prompt and shows every step of it.")
    parser.add_argument(
        "--backend", default="emoji", help="the backend of all fits, as in fit (default: emoji)"
    )
    parser.add_argument(
        "--rewards",
        nargs="+",
        default=[],
        help="rewards to choose from besides ipgo's own, such as mine.py:warmth",
    )
    parser.add_argument(
        "--out", type=path_of, default=Path("runs"), help="folder of the runs (default: runs)"
    )
    parser.add_argument(
        "--image-size", type=int, help="side of the images in pixels (default: the model's own)"
    )
    parser.add_argument("--scheduler", help="ddim, pndm, lms, euler or dpm++ (default: the model's own)")
    parser.add_argument("--long-prompts", default="refuse", help="refuse, truncate or chunk, as in fit")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add_device_flags(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve at; others than the default let others in, unasked",
    )
    parser.add_argument("--port", type=int, help="port to serve at (default: the first free one from 7860)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser
