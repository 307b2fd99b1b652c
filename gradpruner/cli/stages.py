"""The commands for one stage each: `probe`, `plan`, `apply`, `finetune`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpruner.cli import data_options
from gradpruner.cli import options as given
from gradpruner.cli.recipe_options import recipe_of, recipe_options, steps_of
from gradpruner.errors import InvalidArgument

if TYPE_CHECKING:
    from gradpruner.training.recipe import Recipe

logger = logging.getLogger(__name__)


def add_probe(commands: Any) -> None:
    """Add the command `probe`."""
    parser = given.command(
        commands,
        "probe",
        _probe,
        "Watch the gradients of the first training steps, and write igia.safetensors.",
        "gradpruner probe --model M --data train.jsonl --steps 40 --out igia.safetensors",
    )
    given.model_options(parser)
    data_options.add(parser, testing=False)
    recipe_options(parser)
    given.four_bits_option(parser, "probe the model in 4 bits; the plan is for the full-precision checkpoint")
    parser.add_argument(
        "--of-steps",
        type=int,
        metavar="N",
        help="steps of the whole run, which decide the learning rate; the probe is its first steps (default: --steps)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="igia.safetensors to write")


def add_plan(commands: Any) -> None:
    """Add the command `plan`."""
    parser = given.command(
        commands,
        "plan",
        _plan,
        "Decide which layers are removed, and write plan.json. No model is loaded.",
        "gradpruner plan igia.safetensors --ratio 0.4 --out plan.json",
    )
    parser.add_argument("igia", help="igia.safetensors, from the probe")
    given.plan_options(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="plan.json to write")


def add_apply(commands: Any) -> None:
    """Add the command `apply`."""
    parser = given.command(
        commands,
        "apply",
        _apply,
        "Merge and remove layers by a plan, and write a smaller, verified checkpoint.",
        "gradpruner apply --model M --plan plan.json --igia igia.safetensors --out small",
    )
    given.model_options(parser)
    parser.add_argument("--plan", required=True, metavar="FILE", help="plan.json")
    parser.add_argument("--igia", metavar="FILE", help="igia.safetensors; not needed if the plan merges nothing")
    given.preset_option(parser)
    given.top_option(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def add_finetune(commands: Any) -> None:
    """Add the command `finetune`."""
    parser = given.command(
        commands,
        "finetune",
        _finetune,
        "Fine-tune a checkpoint, and write an ordinary one.",
        "gradpruner finetune --model small --data train.jsonl --steps 1000 --out tuned",
    )
    given.model_options(parser)
    data_options.add(parser, testing=False)
    recipe_options(parser)
    given.four_bits_option(
        parser, "train adapters beside weights of 4 bits; in the end they are added to the full-precision weights"
    )
    given.checkpoint_options(parser)
    parser.add_argument(
        "--masks",
        metavar="FILE",
        help="masks of sparsify, whose zeros stay zero (default: gradpruner.masks beside the model)",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def _training(
    options: argparse.Namespace, recipe: Recipe, revision: str | None = None, *, load_in_4bit: bool = False
) -> tuple[Any, Any, Any]:
    """Return the model, its tokenizer, and the rows of a training in order."""
    from gradpruner.data.tokens import tokenize
    from gradpruner.run.preflight import training_line
    from gradpruner.training.schedule import schedule

    examples = data_options.examples(options)
    model, tokenizer = given.load(options, revision, load_in_4bit=load_in_4bit)
    rows = tokenize(
        examples,
        tokenizer,
        max_length=options.max_length,
        train_on=options.train_on,
        too_long=options.too_long,
    )
    if not len(rows):
        raise InvalidArgument(f"--data {' '.join(options.data)}: no example is left; {rows.counts.line()}")
    steps = steps_of(options, rows)
    logger.log(rows.counts.level, f"training: {training_line(rows, steps, recipe)}")
    return model, tokenizer, schedule(rows, steps, recipe)


def _probe(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.distributed.launch import launched
    from gradpruner.distributed.processes import first
    from gradpruner.run.four_bits import check_four_bits
    from gradpruner.run.only_worker import only_worker
    from gradpruner.storage.files import need_writable
    from gradpruner.training.probe_length import check_probe_length
    from gradpruner.training.shares import share_of

    recipe = recipe_of(options)
    if options.load_in_4bit:
        check_four_bits(options.model, recipe)
    if options.steps is not None:
        check_probe_length(recipe, options.steps, options.of_steps or options.steps)
    share_of(recipe, launched())
    first(lambda: need_writable(options.out))  # the claim would make a folder that is misspelt
    with only_worker(options.out):
        return _probe_by(recipe, options)


def _probe_by(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.checkpoint.companions import masks_of
    from gradpruner.probe.igia import DEFAULT_KIND
    from gradpruner.run.stages import watch
    from gradpruner.training.trackers import scores_of, tracked

    model, tokenizer, ordered = _training(options, recipe, load_in_4bit=options.load_in_4bit)
    with tracked(recipe, Path(f"{options.out}-logs"), "probe", name=Path(options.out).stem) as tracker:
        _, igia = watch(
            model,
            tokenizer,
            ordered,
            recipe,
            of_steps=options.of_steps,
            quiet=options.json,
            masks=masks_of(options.model, model),
            callbacks=tracker.callbacks,
        )
        scores = igia.layer_scores()  # by the score that `plan` uses by default
        tracker.log(scores_of(igia))
    igia.save(options.out)
    return {
        "json": {
            "igia": options.out,
            "steps": igia.steps,
            "skipped": igia.skipped,
            "kind": DEFAULT_KIND,
            "layer_scores": scores.tolist(),
            "watched": list(igia.watched),
        },
        "line": f"{options.out}: {igia.steps} usable steps, {igia.skipped} skipped, {min(igia.watched):.1%} or more of "
        f"each layer's parameters watched, weakest layers first by {DEFAULT_KIND!r} scores: "
        f"{scores.argsort().tolist()}",
    }


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.probe.igia import Igia

    igia = Igia.load(options.igia)
    plan = igia.plan(**given.amount(options), **given.choice(options))
    plan.save(options.out)
    margin, stability = igia.margin(plan), igia.stability(plan)
    return {
        "json": {**plan.to_dict(), "margin": margin, "stability": stability},
        "line": f"{options.out}: {plan.summary()}; margin at the cut {margin:.3f}, "
        f"settled after half of the probe {stability[(len(stability) - 1) // 2]:.0%}",
    }


def _apply(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.checkpoint.companions import masks_of, plan_of, save_from
    from gradpruner.model.load import DEMO_MODEL
    from gradpruner.plan import Plan
    from gradpruner.probe.igia import Igia
    from gradpruner.pruning.apply import apply
    from gradpruner.pruning.apply_folder import apply_folder
    from gradpruner.pruning.preflight import check_save
    from gradpruner.storage.files import need_free
    from gradpruner.storage.tensor_files import holds_safetensors

    plan = Plan.load(options.plan)
    # safetensors in the dtype that is asked for are copied from file to file, without loading the model
    streamed = options.dtype == "auto" and options.model != DEMO_MODEL and holds_safetensors(Path(options.model))
    igia = Igia.load(options.igia, lazy=streamed) if options.igia else None
    if streamed:
        folder = apply_folder(
            options.model,
            options.out,
            plan,
            igia,
            preset=options.preset,
            top=options.top,
            overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code,
        )
    else:
        need_free(options.out, options.overwrite)
        model, tokenizer = given.load(options)
        masks, earlier = masks_of(options.model, model), plan_of(options.model, model)
        check_save(model, tokenizer, Path(options.out))
        smaller = apply(model, plan, igia, preset=options.preset, top=options.top)
        masks = None if masks is None else masks.of_layers(smaller, plan.kept)
        folder = save_from(
            options.model,
            smaller,
            options.out,
            tokenizer=tokenizer,
            masks=masks,
            plan=dataclasses.replace(plan, before=earlier),
            overwrite=options.overwrite,
        )
    return {
        "json": {"folder": str(folder), "plan": plan.to_dict()},
        "line": f"{folder}: verified; {plan.summary()}",
    }


def _finetune(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.distributed.launch import launched
    from gradpruner.run.four_bits import check_four_bits, check_one_process
    from gradpruner.run.only_worker import only_worker
    from gradpruner.training.shares import share_of

    recipe = recipe_of(options)
    share_of(recipe, launched())
    if options.load_in_4bit:
        check_four_bits(options.model, recipe)
        check_one_process(launched())
        if options.masks:
            raise InvalidArgument("--masks does not go with --load-in-4bit: zeros are not held in weights of 4 bits")
    with only_worker(options.out):
        return _finetune_by(recipe, options)


def _finetune_by(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.checkpoint.companions import masks_of, plan_of, refuse_masks, save_from
    from gradpruner.distributed.agreement import agree, need_shared
    from gradpruner.distributed.processes import first
    from gradpruner.model.identity import identify
    from gradpruner.pruning.preflight import check_save
    from gradpruner.run.stages import tune
    from gradpruner.sparsity import Masks
    from gradpruner.storage.files import need_free
    from gradpruner.training.checkpoints import checkpoints_beside
    from gradpruner.training.divergence import explained
    from gradpruner.training.trackers import tracked

    first(lambda: need_free(options.out, options.overwrite))
    need_shared(Path(options.out).absolute().parent)
    masks = Masks.load(options.masks) if options.masks else None
    identity = identify(options.model, trust_remote_code=options.trust_remote_code, say=logger.info)
    checkpoints = checkpoints_beside(
        options.out,
        options.save_steps,
        identity,
        dtype=options.dtype,
        attention=options.attention,
        masks=options.masks,
        load_in_4bit=options.load_in_4bit,
    )
    agree("the model", identity.to_dict())
    model, tokenizer, ordered = _training(options, recipe, identity.revision)
    first(lambda: check_save(model, tokenizer, Path(options.out)))
    if masks is not None:
        masks.apply_(model)
    else:
        masks = masks_of(options.model, model, identity.revision)
    plan, base = plan_of(options.model, model, identity.revision), None
    if options.load_in_4bit:
        refuse_masks(options.model, "finetune --load-in-4bit", identity.revision)
        base, model = model, given.load(options, identity.revision, load_in_4bit=True).model
    with tracked(recipe, Path(f"{options.out}-logs"), "finetune", name=Path(options.out).name) as tracker:
        tuned, training = tune(
            model,
            tokenizer,
            ordered,
            recipe,
            quiet=options.json,
            masks=masks,
            checkpoints=checkpoints,
            callbacks=tracker.callbacks,
            base=base,
        )
    save_from(
        options.model,
        tuned,
        options.out,
        tokenizer=tokenizer,
        plan=plan,
        masks=masks,
        overwrite=options.overwrite,
        revision=identity.revision,
    )
    checkpoints.discard()
    sparsity = None if masks is None else masks.sparsity()
    kept = "" if masks is None else f", {sparsity:.2%} of {len(masks.bits)} weights kept at zero"
    return {
        "json": {"folder": options.out, "sparsity": sparsity, **training.to_dict()},
        "line": f"{options.out}: {training.steps} steps of {training.step_seconds:.2f} s, "
        f"loss {training.losses[0]:.3f} to {training.losses[-1]:.3f}{kept}",
        "failed": explained(options.out, training.losses) if training.diverged else None,
    }
