"""The `latent-sft` command: one parser, one dispatch. Whatever imports torch is imported inside its handler.

Exit status: 0 done, 1 failure, 2 a mistake of the user (one message, no traceback), 75 told to stop by SIGTERM or
SIGUSR1 (what is done is saved; the same command goes on), 130 interrupted from the keyboard.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from latent_sft import __version__, data_verbs
from latent_sft.data_verbs import load as _load
from latent_sft.data_verbs import load_one as _load_one
from latent_sft.errors import STOPPED, ConfigError, Interrupted, LatentSFTError, TrainingError, did_you_mean
from latent_sft.serve.command import add_options, launch

OK, FAILURE, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status; argparse ends the process itself for --help and usage errors."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("latent_sft").setLevel(logging.INFO)
    args = parse(argv)
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return args.handler(args) or OK
    except Interrupted as stopped:
        print(f"{stopped}; run the same command again to go on", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        if isinstance(error, OSError) and error.filename is not None:
            # no permission, a name too long, a file where a folder belongs: wherever it showed, a path is wrong
            error = ConfigError(f"{error.filename}: {error.strerror}; expected a path that can be read and written.")
        expected = isinstance(error, LatentSFTError)
        kind = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected or args.debug else " (add --debug for the traceback)"
        print(f"error: {kind}{error}{hint}", file=sys.stderr)
        return USER_ERROR if expected and not isinstance(error, TrainingError) else FAILURE
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    # while a stage trains, `train/interruption.py` listens instead: there a step is finished and saved
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line; `key=value` settings may stand anywhere after the verb."""
    parser, verbs = build_parser()
    for word in argv:
        if any("\ud800" <= character <= "\udfff" for character in word):
            parser.error(f"{word!r} is not UTF-8; expected text.")
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in verbs:
        parser.error(f"unknown command {verb!r}.{did_you_mean(verb, verbs, shown=len(verbs))}")
    # argparse gives `CONFIG --model cot seed=1` an empty list of settings and leaves seed=1 over
    args, rest = parser.parse_known_args(argv)
    misplaced = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if misplaced:
        hint = " Settings are written key=value." if hasattr(args, "overrides") else ""
        parser.error(f"{args.verb}: unexpected {' '.join(misplaced)}.{hint}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def build_parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser and the verbs it knows."""
    parser = argparse.ArgumentParser(
        prog="latent-sft", description="Teach a language model to reason in latent tokens.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"latent-sft {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    table = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)

    def verb(name: str, handler: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = table.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        # SUPPRESS: a default here would undo a --debug given before the verb
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        added.set_defaults(handler=handler)
        return added

    def experiment(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a preset such as quickstart")
        added.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file")
        return added

    experiment(verb("run", _run, "the whole experiment, or comparison; skips what is finished"))
    train = verb("train", _train, "one training stage")
    train.add_argument("stage", metavar="STAGE", type=_stage, help="`latent-sft plan CONFIG` lists them")
    experiment(train)
    finish = verb("finish", _finish, "end a stopped training stage where it stands, and keep its best checkpoint")
    finish.add_argument("stage", metavar="STAGE", type=_stage, help="`latent-sft plan CONFIG` lists them")
    experiment(finish)
    experiment(verb("label", _label, "store the encoder's latents of the training set"))
    evaluation = experiment(verb("eval", _eval, "accuracy and reasoning length of trained models, or of a checkpoint"))
    evaluation.add_argument("--set", action="append", metavar="NAME", help="a benchmark, or NAME=SOURCE; repeatable")
    evaluation.add_argument("--model", action="append", help="a model of the experiment; repeatable; all")
    evaluation.add_argument("--split", action="append", help="validation or test; repeatable; those of the file")
    evaluation.add_argument("--data", metavar="FILE", help="with a checkpoint as CONFIG: problems to score it on")
    evaluation.add_argument("--thinker", metavar="NAME", help="likewise: none answers at once; as trained")
    evaluation.add_argument("--out", type=Path, metavar="DIR", help="likewise: for the results; runs/eval/CHECKPOINT")
    experiment(verb("report", _report, "tables and plots of what was trained and measured"))
    generate = verb("generate", _generate, "solve one problem and show the latents")
    generate.add_argument("checkpoint", metavar="CHECKPOINT", help="an exported folder, or a Hub name")
    generate.add_argument("problem", metavar="PROBLEM", help="text of the problem")
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.add_argument("--min-latents", type=int, metavar="N", help="do not stop thinking before; as trained")
    generate.add_argument("--max-latents", type=int, metavar="N", help="end thinking after; as trained")
    generate.add_argument("--noise-scale", type=float, metavar="X", help="Gumbel noise on the latents; none")
    generate.add_argument("--picture", type=Path, metavar="FILE", help="also draw the row: prompt, latents, answer")
    generate.add_argument("--top", type=int, default=5, metavar="K", help="tokens shown per latent (5)")
    add_options(verb("serve", _serve, "answer over HTTP as OpenAI's servers do (extra [serve])"))
    harness = verb("lm-eval", _lm_eval, "lm-evaluation-harness on a checkpoint, with all its options")
    harness.add_argument("checkpoint", metavar="CHECKPOINT", help="an exported folder, or a Hub name")
    harness.add_argument(
        "options",
        metavar="...",
        nargs=argparse.REMAINDER,
        help="of `lm-eval run`, such as --tasks gsm8k_cot",
    )
    export = experiment(verb("export", _export, "a Hugging Face folder of an experiment, or of a checkpoint folder"))
    export.add_argument("--out", type=Path, metavar="DIR", help="folder to write; <run>/export, or export-MODEL")
    export.add_argument("--model", metavar="MODEL", help="which latent reasoner, where the experiment trains several")
    export.add_argument("--adapter", action="store_true", help="the LoRA adapters alone, as a PEFT folder; needs --out")
    export.add_argument("--push-to-hub", metavar="NAME", help="also upload as this repository")
    export.add_argument("--private", action="store_true", help="make the repository private")
    plan = experiment(verb("plan", _plan, "the experiment as shell commands, with what is finished"))
    plan.add_argument("--gpus", type=int, metavar="N", help="also: what N GPUs need, steps, tokens, time")
    plan.add_argument("--gpu-memory", type=float, metavar="G", help="GiB of one GPU; with --gpus")
    plan.add_argument("--tokens-per-second", type=float, metavar="X", help="of the whole job; as measured in this run")
    plan.add_argument("--rows", type=int, metavar="N", help="training rows, where the data is not here")
    plan.add_argument("--example-tokens", type=_tokens, metavar="P,C,A", help="prompt, CoT, answer of such a row")
    data_verbs.add(verb, experiment)
    shown = experiment(verb("config", _config, "the resolved configuration as YAML"))
    shown.add_argument("--directory", action="store_true", help="the run directory alone")
    shown.add_argument("--schema", action=_Schema, nargs=0, help="a JSON schema of such files, for editors; no CONFIG")
    verb("env", _env, "versions and devices")
    return parser, list(table.choices)


class _Schema(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:  # prints and ends, as --version does
        from latent_sft.config.document import json_schema

        print(json.dumps(json_schema(), indent=2))
        parser.exit()


def _stage(name: str) -> str:
    from latent_sft.methods import STAGES

    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"unknown stage {name!r}.{did_you_mean(name, STAGES)}")
    return name


def _tokens(text: str) -> tuple[int, int, int]:
    try:
        prompt, cot, answer = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected three numbers such as 120,60,5") from None
    return prompt, cot, answer


def _run(args: argparse.Namespace) -> None:
    config = _load(args)
    from latent_sft.launcher import end_if_bound

    end_if_bound()
    if config.compare.variants:
        from latent_sft.experiment.compare import run_comparison

        print(run_comparison(args.config, args.overrides))
        return
    from latent_sft.experiment.run import run_experiment

    run_experiment(config)


def _train(args: argparse.Namespace) -> int | None:
    config = _load_one(args)
    from latent_sft.launcher import is_worker, relaunch_if_needed
    from latent_sft.runs import CLAIM, exclusive

    folder = Path(config.directory) / args.stage
    with exclusive(folder, CLAIM, take=not is_worker()):
        status = relaunch_if_needed(args.stage, args.config, args.overrides, config.launch)
        if status is None:
            from latent_sft.train.run import train_stage

            with exclusive(folder, take=os.environ.get("RANK", "0") == "0"):
                train_stage(config, args.stage)
    return status


def _finish(args: argparse.Namespace) -> None:
    config = _load_one(args)
    from latent_sft.runs import exclusive
    from latent_sft.train.run import finish_stage

    with exclusive(Path(config.directory) / args.stage):
        finish_stage(config, args.stage)


def _label(args: argparse.Namespace) -> None:
    config = _load_one(args)
    from latent_sft.experiment.stores import make_labels

    make_labels(config)


def _eval(args: argparse.Namespace) -> None:
    args.overrides += [f"eval.sets={json.dumps(args.set)}"] if args.set else []
    if _is_checkpoint(args):
        _eval_checkpoint(args)
        return
    for option in ("data", "thinker", "out"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option}: only means something with a checkpoint; {args.config} is an experiment.")
    config = _load_one(args)
    from latent_sft.evaluation.run import evaluate

    chosen = [*(args.split or ()), *(config.sets() if args.set else ())]
    evaluate(config, models=args.model, splits=chosen or None)


def _is_checkpoint(args: argparse.Namespace) -> bool:
    """Return whether a folder, or the name of a Hub repository, stands in place of CONFIG."""
    path = Path(args.config)
    is_name = args.config.count("/") == 1 and path.suffix not in (".yaml", ".yml") and not path.parent.is_dir()
    return path.is_dir() or (is_name and not path.exists())


def _eval_checkpoint(args: argparse.Namespace) -> None:
    for option in ("model", "split"):
        if getattr(args, option):
            raise ConfigError(f"--{option}: only means something with an experiment; {args.config} is a checkpoint.")
    from rich.console import Console

    from latent_sft.evaluation.checkpoint import evaluate_checkpoint
    from latent_sft.evaluation.tables import result_table

    overrides = [*args.overrides, *([f"data.test={json.dumps(args.data)}"] if args.data else [])]
    scored = evaluate_checkpoint(args.config, overrides, thinker=args.thinker, out=args.out)
    width = max(Console().width, 110)  # what is cut off where a pipe says 80
    Console(width=width).print(result_table(scored.rows).terminal(args.config))
    print(scored.folder)


def _report(args: argparse.Namespace) -> None:
    config = _load(args)
    if config.compare.variants:
        from latent_sft.evaluation.report import write_comparison
        from latent_sft.experiment.compare import jobs_of

        print(write_comparison(config, jobs_of(args.config, args.overrides)))
        return
    from latent_sft.evaluation.report import write_report

    print(write_report(Path(config.directory), title=config.name))


def _generate(args: argparse.Namespace) -> None:
    if args.picture and args.picture.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--picture: got {args.picture}, expected a file that ends in .png, .svg or .pdf.")
    from latent_sft.inference.show import as_table, load

    given = {name: getattr(args, name) for name in ("min_latents", "max_latents", "noise_scale", "top")}
    options = {name: value for name, value in given.items() if value is not None}
    solution = load(args.checkpoint).generate(args.problem, **options)
    print(solution.to_json() if args.json else as_table(solution))
    if args.picture:
        from latent_sft.evaluation.plots import thought_row

        figure = thought_row(solution)
        if figure is None:
            raise ConfigError(f"--picture: {args.checkpoint} has not thought in latents, so there is no row to draw.")
        figure.savefig(args.picture, dpi=160)


def _serve(args: argparse.Namespace) -> None:
    launch(args, lambda text: print(text, flush=True))


def _lm_eval(args: argparse.Namespace) -> None:
    from latent_sft.serve.lm_eval import run

    run(args.checkpoint, args.options)


def _export(args: argparse.Namespace) -> None:
    if args.private and not args.push_to_hub:
        raise ConfigError("--private: only means something with --push-to-hub NAME.")
    is_checkpoint = Path(args.config).is_dir()
    if is_checkpoint and args.out is None:
        raise ConfigError(
            f"--out: expected a folder to write, because {args.config} is a checkpoint, not an experiment."
        )
    if is_checkpoint and args.model:
        raise ConfigError(f"--model: only means something with an experiment; {args.config} is a checkpoint.")
    if args.adapter and (is_checkpoint or args.push_to_hub or args.out is None):
        raise ConfigError("--adapter: expected an experiment and --out DIR, and no --push-to-hub.")
    config = None if is_checkpoint else _load_one(args)
    if args.adapter:
        from latent_sft.export.adapter import export_adapter

        print(export_adapter(config, config.chosen_export(args.model)[0], args.out))
        return
    from latent_sft.export.checkpoint import export_checkpoint, export_run

    out = args.out
    if config is None:
        export_checkpoint(Path(args.config), out)
    else:
        model, folder = config.chosen_export(args.model)
        out = export_run(config, model, out or Path(config.directory) / folder)
    print(out)
    if args.push_to_hub:
        from latent_sft.export.hub import push

        print(push(out, args.push_to_hub, private=args.private))


def _plan(args: argparse.Namespace) -> None:
    config = _load(args)
    if (args.gpus is None) != (args.gpu_memory is None):
        raise ConfigError("plan: --gpus and --gpu-memory belong together; give both or neither.")
    from latent_sft.experiment.graph import plan, plan_comparison

    if config.compare.variants:
        from latent_sft.experiment.compare import jobs_of

        if args.gpus is not None:
            raise ConfigError("plan: --gpus is for one experiment; this file is a comparison (compare.variants).")
        print(plan_comparison(config, jobs_of(args.config, args.overrides), args.config, args.overrides), end="")
        return
    print(plan(config, args.config, args.overrides), end="")
    if args.gpus is not None:
        from latent_sft.forecast import forecast

        table = forecast(
            config,
            args.gpus,
            args.gpu_memory,
            tokens_per_second=args.tokens_per_second,
            count=args.rows,
            example_tokens=args.example_tokens,
        )
        print(table, end="")


def _config(args: argparse.Namespace) -> None:
    from latent_sft.config.load import to_yaml

    config = _load(args)
    print(f"{config.directory}\n" if args.directory else to_yaml(config), end="")


def _env(args: argparse.Namespace) -> None:
    import torch

    from latent_sft.runs import environment

    found = environment()
    revision = found["git"]["revision"] + (" (modified)" if found["git"]["dirty"] else "")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {**found["versions"], "git": revision, "cpu threads": torch.get_num_threads(), "cuda": devices or "none"}
    for name, value in rows.items():
        print(f"{name:<14}{value}")


if __name__ == "__main__":
    sys.exit(main())
