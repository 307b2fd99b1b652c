"""The command `push`: a pruned checkpoint and its card to the hub."""

from __future__ import annotations

import argparse
from typing import Any

from gradpruner.cli import options as given


def add_push(commands: Any) -> None:
    """Add the command `push`."""
    parser = given.command(
        commands,
        "push",
        _push,
        "Verify a pruned checkpoint, write its model card, and upload both to the hub.",
        "gradpruner push small/model me/Llama-3.2-1B-pruned --base-model meta-llama/Llama-3.2-1B --private",
    )
    parser.add_argument("folder", help="checkpoint folder, with the gradpruner.json that apply or run wrote")
    parser.add_argument("repo_id", help="repository, owner/name; it is made if it does not exist")
    parser.add_argument("--base-model", metavar="M", help="hub id or folder of the dense model, for the card")
    parser.add_argument("--license", metavar="L", help="licence, for the card (default: from the base model's card)")
    parser.add_argument("--private", action="store_true", default=None, help="make a private repository")
    parser.add_argument("--revision", metavar="R", help="branch to commit to (default main)")


def _push(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.checkpoint.hub import push_to_hub

    url = push_to_hub(
        options.folder,
        options.repo_id,
        base_model=options.base_model,
        license=options.license,
        private=options.private,
        revision=options.revision,
    )
    return {"json": {"url": url}, "line": f"{options.folder}: verified and uploaded: {url}"}
