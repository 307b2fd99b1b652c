"""The command `sparsify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gradpruner.cli import data_options
from gradpruner.cli import options as given
from gradpruner.sparsity.names import CRITERION_NAMES


def add_sparsify(commands: Any) -> None:
    """Add the command `sparsify`."""
    parser = given.command(
        commands,
        "sparsify",
        _sparsify,
        "Zero single weights, and write a verified checkpoint with the masks.",
        "gradpruner sparsify --model M --data text.txt --method gblm --pattern 2:4 --out sparse",
    )
    given.model_options(parser)
    data_options.add(parser, testing=False, rows=False)
    parser.add_argument(
        "--method",
        default="wanda",
        metavar="M",
        help=f"{', '.join(CRITERION_NAMES)}, or name:option=value,... (default wanda)",
    )
    parser.add_argument(
        "--pattern",
        default="row",
        metavar="P",
        help="row, matrix, or N:M such as 2:4: N of every M consecutive inputs are kept (default row)",
    )
    parser.add_argument("--ratio", type=float, metavar="P", help="share zeroed, for row and matrix (default 0.5)")
    parser.add_argument(
        "--allocation",
        choices=("uniform", "alphapruning"),
        default="uniform",
        help="how the zeros are divided over the layers (default uniform)",
    )
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="windows to calibrate on (default 128)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed that draws the windows (default 0)")
    parser.add_argument(
        "--device",
        metavar="D",
        help="device that runs one layer at a time, for example cpu (default: the GPU, if there is one)",
    )
    parser.add_argument("--igia", metavar="FILE", help="igia.safetensors of a probe, for method igia")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="checkpoint folder to write, with the masks")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def _sparsify(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.checkpoint.companions import plan_of, refuse_masks, save_from
    from gradpruner.checkpoint.save_sparse import MASKS
    from gradpruner.data.text_windows import consecutive, sampled, text_of, tokens_of
    from gradpruner.model.accelerator import accelerator, to_accelerator
    from gradpruner.probe.igia import Igia
    from gradpruner.pruning.preflight import check_save
    from gradpruner.run.preflight import check_rows
    from gradpruner.sparsity.zero_weights import criterion_and_pattern, sparsify
    from gradpruner.storage.files import need_free

    need_free(options.out, options.overwrite)
    criterion, _ = criterion_and_pattern(options.method, options.pattern, options.ratio, options.allocation)
    examples = data_options.examples(options)
    model, tokenizer = given.load(options)
    refuse_masks(options.model, "sparsify")
    plan = plan_of(options.model, model)
    tokens = tokens_of(text_of(examples, tokenizer), tokenizer, options.max_length)
    check_rows(model, tokenizer, consecutive(tokens, options.max_length))
    check_save(model, tokenizer, Path(options.out))
    batches = sampled(tokens, options.max_length, options.samples, options.seed)
    device = accelerator() if options.device is None else options.device
    if criterion.gradients and options.device is None:  # of the whole model, with a float32 norm of each entry
        to_accelerator(model, room=4 * sum(weight.numel() for weight in model.parameters()))
    masks = sparsify(
        model,
        batches,
        method=options.method,
        pattern=options.pattern,
        ratio=options.ratio,
        allocation=options.allocation,
        device=device,
        igia=Igia.load(options.igia) if options.igia else None,
    )
    folder = save_from(
        options.model, model, options.out, tokenizer=tokenizer, plan=plan, masks=masks, overwrite=options.overwrite
    )
    sparsity, file = masks.sparsity(), str(folder / MASKS)
    how = f"{masks.about['method']}, {masks.about['pattern']}"
    return {
        "json": {"folder": str(folder), "masks": file, "sparsity": sparsity, **masks.about},
        "line": f"{folder}: verified; {sparsity:.2%} of {len(masks.bits)} weights is zero ({how}); masks: {file}",
    }
