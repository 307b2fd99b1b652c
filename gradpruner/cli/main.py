"""Command line: arguments to calls; no logic. Exit codes: 0 done, 2 wrong usage, 1 anything that went wrong later."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradpruner.cli import options as given
from gradpruner.cli.compare import add_compare, add_sensitivity
from gradpruner.cli.sparsify import add_sparsify
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        result = options.call(options)
    except InvalidArgument as error:
        return _fail(error, 2)
    except (GradPrunerError, OSError, MemoryError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; what is finished is kept, and the same command goes on from there", 1)
    print(json.dumps(result["json"], indent=2) if options.json else result["line"])
    failed = result.get("failed")  # what is there is written, and is not what was wanted
    return _fail(failed, 1) if failed else 0


def _fail(error: object, code: int) -> int:
    print(f"gradpruner: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="gradpruner",
        description="Remove the decoder layers that a task does not need, chosen by the gradients of the first steps.",
        epilog="Start with: gradpruner demo    Then, on your own model and data: gradpruner run --help",
    )
    parser.add_argument("--version", action="version", version=f"gradpruner {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_run,
        add_compare,
        add_sensitivity,
        _add_probe,
        _add_plan,
        _add_apply,
        add_sparsify,
        _add_finetune,
        _add_evaluate,
        _add_report,
        _add_push,
        _add_demo,
        _add_backends,
    ):
        add(commands)
    return parser


def _add_run(commands: Any) -> None:
    parser = given.command(
        commands,
        "run",
        _run,
        "The whole job: probe, plan, cut, fine-tune, evaluate, report.",
        "gradpruner run --model meta-llama/Llama-3.2-1B --data train.jsonl --steps 1000 --ratio 0.4 --out small",
    )
    given.model_options(parser)
    given.data_options(parser, testing=True)
    given.plan_options(parser, auto=True)
    given.recipe_options(parser)
    given.checkpoint_options(parser)
    parser.add_argument(
        "--max-lost",
        type=float,
        metavar="P",
        help="with --ratio auto: share of the dense model's score that may be lost (default 0.01)",
    )
    parser.add_argument(
        "--check-steps",
        type=int,
        metavar="N",
        help="with --ratio auto: extra steps that each model "
        "that is tried is trained for (default: as many as the probe)",
    )
    parser.add_argument(
        "--check-rows",
        type=int,
        metavar="N",
        help="with --ratio auto: training examples held out to try on (default: 10 %%, at most 200)",
    )
    parser.add_argument("--probe-steps", type=int, metavar="N", help="steps of the probe (default: 1 %%, 20 at least)")
    parser.add_argument("--top", type=float, metavar="P", help="share of a merged weight kept (default: the preset's)")
    parser.add_argument("--no-patch", action="store_const", const=False, dest="patch", help="leave the gaps unpatched")
    parser.add_argument(
        "--adapters", choices=("keep", "discard"), help="what the probe trained (default: the preset's)"
    )
    parser.add_argument(
        "--rank-factor",
        type=int,
        metavar="N",
        help="the cut model's adapters have N times the rank (default: the preset's)",
    )
    parser.add_argument("--no-dense", action="store_true", help="do not fine-tune the uncut model for comparison")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where everything goes; run again to resume")


def _add_probe(commands: Any) -> None:
    parser = given.command(
        commands,
        "probe",
        _probe,
        "Watch the gradients of the first steps; write igia.safetensors.",
        "gradpruner probe --model M --data train.jsonl --steps 40 --out igia.safetensors",
    )
    given.model_options(parser)
    given.data_options(parser, testing=False)
    given.recipe_options(parser)
    parser.add_argument(
        "--of-steps",
        type=int,
        metavar="N",
        help="steps of the run that this is the beginning of, for its learning rate (default: --steps)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="igia.safetensors to write")


def _add_plan(commands: Any) -> None:
    parser = given.command(
        commands,
        "plan",
        _plan,
        "Decide which layers go; write plan.json. No model is loaded.",
        "gradpruner plan igia.safetensors --ratio 0.4 --out plan.json",
    )
    parser.add_argument("igia", help="igia.safetensors, from the probe")
    given.plan_options(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="plan.json to write")


def _add_apply(commands: Any) -> None:
    parser = given.command(
        commands,
        "apply",
        _apply,
        "Fold and remove layers; write a smaller, verified checkpoint.",
        "gradpruner apply --model M --plan plan.json --igia igia.safetensors --out small",
    )
    given.model_options(parser)
    parser.add_argument("--plan", required=True, metavar="FILE", help="plan.json")
    parser.add_argument("--igia", metavar="FILE", help="igia.safetensors; not needed if the plan merges nothing")
    given.preset_option(parser)
    parser.add_argument("--top", type=float, metavar="P", help="share of a merged weight kept (default: the preset's)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def _add_finetune(commands: Any) -> None:
    parser = given.command(
        commands,
        "finetune",
        _finetune,
        "Fine-tune a checkpoint and write an ordinary one.",
        "gradpruner finetune --model small --data train.jsonl --steps 1000 --out tuned",
    )
    given.model_options(parser)
    given.data_options(parser, testing=False)
    given.recipe_options(parser)
    given.checkpoint_options(parser)
    parser.add_argument(
        "--masks", metavar="FILE", help="what sparsify made zero stays zero (default: gradpruner.masks of the --model)"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def _add_evaluate(commands: Any) -> None:
    parser = given.command(
        commands,
        "evaluate",
        _evaluate,
        "Exact match, perplexity and, if asked for, ROUGE-L of a checkpoint.",
        "gradpruner evaluate --model tuned --data test.jsonl",
    )
    given.model_options(parser)
    given.data_options(parser, testing=False)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="perplexity alone, of all text joined and cut into windows of so many tokens",
    )
    parser.add_argument("--rouge", type=int, metavar="TOKENS", help="generate up to so many tokens and score ROUGE-L")


def _add_report(commands: Any) -> None:
    parser = given.command(
        commands, "report", _report, "Draw the report of a finished run again.", "gradpruner report small"
    )
    parser.add_argument("folder", help="the --out of gradpruner run or compare")


def _add_push(commands: Any) -> None:
    parser = given.command(
        commands,
        "push",
        _push,
        "Verify a pruned checkpoint, write its card and upload both to the hub.",
        "gradpruner push small/model me/Llama-3.2-1B-pruned --base-model meta-llama/Llama-3.2-1B --private",
    )
    parser.add_argument("folder", help="checkpoint folder, with the gradpruner.json that apply or run wrote")
    parser.add_argument("repo_id", help="where to: owner/name; made if it does not exist")
    parser.add_argument("--base-model", metavar="M", help="hub id or folder of the dense model, for the card")
    parser.add_argument("--license", metavar="L", help="for the card (default: the base model's, where its card is)")
    parser.add_argument("--private", action="store_true", default=None, help="make a private repository")
    parser.add_argument("--revision", metavar="R", help="branch to commit to (default main)")


def _add_demo(commands: Any) -> None:
    parser = given.command(
        commands,
        "demo",
        _demo,
        "The whole job on a model and data that need no hub: ten minutes on two cores.",
        "gradpruner demo --out gradpruner-demo",
    )
    parser.add_argument("--out", default="gradpruner-demo", metavar="FOLDER", help="default: gradpruner-demo")


def _add_backends(commands: Any) -> None:
    given.command(commands, "backends", _backends, "Which kernels this installation can run.", "gradpruner backends")


def _training(options: argparse.Namespace, recipe: Any, revision: str | None = None) -> tuple[Any, Any, list[Any]]:
    from gradpruner.training.data import tokenize
    from gradpruner.training.recipe import schedule

    examples = given.examples(options)
    model, tokenizer = given.load(options, revision)
    rows = tokenize(examples, tokenizer, max_length=options.max_length, train_on=options.train_on)
    return model, tokenizer, schedule(rows, options.steps, recipe)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.run.job import Job
    from gradpruner.run.run import Run

    job = Job(
        **given.job(options),
        **given.amount(options),
        **given.choice(options),
        top=options.top,
        patch=options.patch,
        adapters=options.adapters,
        rank_factor=options.rank_factor,
        max_lost=options.max_lost,
        check_steps=options.check_steps,
        check_rows=options.check_rows,
    )
    train_examples, test_examples = given.split(options)
    run = Run(job, train_examples, test_examples, options.out, say=given.say(options), quiet=options.json)
    return _results(run.everything(dense=not options.no_dense), options.out)


def _results(results: dict[str, Any], folder: str) -> dict[str, Any]:
    from gradpruner.report.tables import table
    from gradpruner.run.auto_ratio import trial_rows
    from gradpruner.run.summary import comparison, notes

    auto = results.get("auto")
    rows = results["rows"]
    failed = " ".join(row["failed"] for row in rows if row.get("failed"))
    why = f"{auto['reason']}\n\n{table(trial_rows(auto))}\n\n" if auto else ""
    beside = f"\n\n{notes(rows)}" if notes(rows) else ""
    line = f"{why}{table(comparison(rows))}{beside}\n\ncheckpoint: {folder}/model    report: {folder}/report.html"
    return {"json": results, "line": line, "failed": failed}


def _probe(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.checkpoint.companions import masks_of
    from gradpruner.probe.igia import DEFAULT_KIND
    from gradpruner.run.stages import watch
    from gradpruner.storage.files import need_writable

    recipe = given.recipe(options)
    need_writable(options.out)
    model, tokenizer, ordered = _training(options, recipe)
    _, igia = watch(
        model,
        tokenizer,
        ordered,
        recipe,
        of_steps=options.of_steps,
        quiet=options.json,
        masks=masks_of(options.model, model),
    )
    scores = igia.layer_scores()  # by the score that `plan` uses by default
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
    # weights that are as they are wanted, in files that are read in place, need not be loaded
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
    from gradpruner.checkpoint.companions import masks_of, plan_of, save_from
    from gradpruner.model.identity import identify
    from gradpruner.pruning.preflight import check_save
    from gradpruner.run.stages import tune
    from gradpruner.sparsity import Masks
    from gradpruner.storage.files import need_free
    from gradpruner.training.checkpoints import checkpoints_beside
    from gradpruner.training.divergence import explained

    recipe = given.recipe(options)
    need_free(options.out, options.overwrite)
    masks = Masks.load(options.masks) if options.masks else None
    identity = identify(options.model, trust_remote_code=options.trust_remote_code, say=given.say(options))
    checkpoints = checkpoints_beside(
        options.out, options.save_steps, identity, dtype=options.dtype, attention=options.attention, masks=options.masks
    )
    model, tokenizer, ordered = _training(options, recipe, identity.revision)
    check_save(model, tokenizer, Path(options.out))
    if masks is not None:
        masks.apply_(model)
    else:
        masks = masks_of(options.model, model, identity.revision)
    plan = plan_of(options.model, model, identity.revision)
    tuned, training = tune(model, tokenizer, ordered, recipe, quiet=options.json, masks=masks, checkpoints=checkpoints)
    save_from(
        options.model, tuned, options.out, tokenizer=tokenizer, plan=plan, masks=masks, overwrite=options.overwrite
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


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.run.stages import measure

    examples = given.examples(options)
    model, tokenizer = given.load(options)
    if options.window is not None:
        return _windows(options, model, tokenizer, examples)
    result = measure(
        model,
        tokenizer,
        examples,
        max_length=options.max_length,
        train_on=options.train_on,
        batch_size=options.batch_size,
        rouge_tokens=options.rouge,
    ).to_dict()
    shown = [f"{name} {value:.4g}" for name, value in result.items() if value is not None and name != "examples"]
    return {"json": result, "line": f"{options.model}: {', '.join(shown)} on {len(examples)} examples"}


def _windows(options: argparse.Namespace, model: Any, tokenizer: Any, examples: list[Any]) -> dict[str, Any]:
    from gradpruner.run.preflight import check_rows
    from gradpruner.training.data import Collator
    from gradpruner.training.evaluate import perplexity
    from gradpruner.training.text_windows import consecutive, text_of, tokens_of

    rows = consecutive(tokens_of(text_of(examples), tokenizer, options.window), options.window)
    check_rows(model, tokenizer, rows)
    found = perplexity(model, rows, collate=Collator(tokenizer), batch_size=options.batch_size)
    return {
        "json": {"perplexity": found, "windows": len(rows), "tokens": options.window},
        "line": f"{options.model}: perplexity {found:.4g} on {len(rows)} windows of {options.window} tokens",
    }


def _report(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.compare.experiment import SETTINGS
    from gradpruner.compare.outputs import rewrite
    from gradpruner.run.run import write_report

    folder = Path(options.folder)
    if (folder / SETTINGS).exists():
        return {**rewrite(folder), "failed": None}  # the report is written; what it says is no failure of this command
    path = write_report(folder)
    return {"json": {"report": str(path)}, "line": str(path)}


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


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.run.demo import demo

    return _results(demo(options.out, say=given.say(options), quiet=options.json), options.out)


def _backends(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.ops import available_backends
    from gradpruner.ops.backends import build_note

    found = available_backends()
    if found["cpp"] == "available":
        from gradpruner.ops.cpp import ISA

        found["cpp instruction set"] = ISA
    note = build_note()
    if note is not None:
        found["cpp build"] = note
    return {"json": found, "line": "\n".join(f"{name}: {state}" for name, state in found.items())}


if __name__ == "__main__":
    sys.exit(main())
