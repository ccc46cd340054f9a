"""`ipgo publish`: share a run's adapter, with a model card."""

from __future__ import annotations

from ipgo.errors import InputError
from ipgo.terminal import command_parser, path_of


def publish(argv: list[str]) -> int:
    """`ipgo publish`: write the folder, and upload it if asked to."""
    parser = command_parser(
        "publish",
        "Write a run's adapter with a model card and pictures to a folder, and upload it if asked to.",
    )
    parser.add_argument("run", type=path_of, help="a run's folder")
    parser.add_argument(
        "--out", type=path_of, help="the new folder (default: published/ in the run's folder)"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it as this model of the Hugging Face hub"
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push: create the repository as private"
    )
    args = parser.parse_args(argv)
    if args.private and not args.push:
        raise InputError("private needs --push OWNER/NAME")

    from ipgo.publish import push_to_hub, save_pretrained
    from ipgo.store import Run

    run = Run.open(args.run)
    folder = args.out or args.run / "published"
    if args.push:
        print(push_to_hub(run, folder, args.push, private=args.private))
    else:
        save_pretrained(run, folder)
    print(folder / "README.md")
    return 0
