"""The `fp4export` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from exporter import __version__
from exporter.cli_about import ABOUT, OTHER_FORMS
from exporter.cli_bisect import bisect, ranges, validate
from exporter.cli_bundle import export_to_bundle, is_bundle, refuse_lists
from exporter.cli_embed import embed_prompts
from exporter.cli_evaluate import evaluate
from exporter.cli_onnx import MODEL_SUFFIX, inspect_file, quantize
from exporter.cli_sample import sample
from exporter.device.program import BUILD_SUMMARY, DOCTOR_SUMMARY
from exporter.device.program import main as device_main
from exporter.errors import InputError
from exporter.failures import EXIT_INTERRUPTED, describe_failure, fail
from exporter.targets import resolve_target
from exporter.terminal import DEBUG, OUTPUT, QUIET, RESUME, WORK_DIR, open_console, open_progress

if TYPE_CHECKING:
    from exporter.pipeline import ExportResult
    from exporter.recipe import Recipe
    from exporter.shards import Shard

_STAGES_KEPT = "finished stages are kept in the work folder"
_KEPT = {
    "export": _STAGES_KEPT,
    "ranges": _STAGES_KEPT,
    "evaluate": "finished stages and images are kept",
}
_ALL_WORDS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


class _ExportByDefault(click.Group):
    """A group whose words that are no command start a job: ``fp4export digits -o …``, ``fp4export model.onnx …``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "--version"}
        if args and args[0] not in own and args[0] not in self.commands:
            args = [_job_for(args), *args]
        return super().parse_args(ctx, args or ["--help"])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "RECIPE -o OUT [OPTIONS]")
        for form in OTHER_FORMS:
            formatter.write_usage(ctx.command_path, form, prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        export.format_options(ctx, formatter)
        only = _flags(quantize) - _flags(export)
        records = [record for flag in quantize.params if only & {*flag.opts} and (record := flag.get_help_record(ctx))]
        with formatter.section("Options with MODEL.onnx"):
            formatter.write_dl(records)
        self.format_commands(ctx, formatter)


def _job_for(words: list[str]) -> str:
    """The command that `words` start: a recipe's or an ONNX model's. Raises `InputError` for the other one's flags."""
    model = next((word for word in _positional(words) if word.endswith(MODEL_SUFFIX)), None)
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if model is not None:
        strange = sorted(given & (_flags(export) - _flags(quantize)))
        if strange:
            raise InputError(f"{strange[0]} belongs to a recipe and has no meaning for an ONNX model; leave it out")
        return "quantize"
    strange = sorted(given & (_flags(quantize) - _flags(export)))
    if strange:
        raise InputError(f"{strange[0]} belongs to an ONNX model; a recipe says it itself: --set layers.0.KEY=VALUE")
    return "export"


def _flags(job: click.Command) -> set[str]:
    options = [parameter for parameter in job.params if isinstance(parameter, click.Option)]
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


def _positional(words: list[str]) -> list[str]:
    """The first of the words that is neither a flag nor the value of one."""
    options = [option for job in (export, quantize) for option in job.params if isinstance(option, click.Option)]
    valued = {flag for option in options if not option.is_flag for flag in option.opts}
    before = ["", *words]
    plain = [word for word, last in zip(words, before, strict=False) if last not in valued and word[:1] != "-"]
    return plain[:1]


@click.group(cls=_ExportByDefault, help=ABOUT, context_settings={"max_content_width": 110})
@click.version_option(__version__, prog_name="fp4export")
def command() -> None:
    """Hold the commands together."""


command.add_command(quantize)
command.add_command(inspect_file)
command.add_command(validate)
command.add_command(bisect)
command.add_command(ranges)
command.add_command(embed_prompts)
command.add_command(sample)
command.add_command(evaluate)


@command.command(name="export", hidden=True, short_help="Export a recipe (what happens without a command).")
@click.argument("recipe")
@OUTPUT
@click.option(
    "--target",
    metavar="TARGET",
    help="The machine that OUT is for, instead of the recipe's; for a bundle also several: orin,h100.",
)
@click.option("--seed", type=int, metavar="N", help="Seed of the calibration, instead of the recipe's.")
@click.option(
    "--set", "overrides", multiple=True, metavar="A.B=C", help="Change one value of the recipe; may be repeated."
)
@WORK_DIR
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the plan: target, layers, formats, sizes, room for activations. Writes nothing.",
)
@click.option("--no-validate", is_flag=True, help="Skip the comparison of the graphs with the PyTorch reference.")
@click.option("--keep-graphs", is_flag=True, help="Keep the ONNX graph after every pass, in the work folder.")
@RESUME
@QUIET
@DEBUG
def export(
    recipe: str,
    output: str,
    target: str | None,
    seed: int | None,
    overrides: tuple[str, ...],
    work_dir: str | None,
    *,
    dry_run: bool,
    no_validate: bool,
    keep_graphs: bool,
    resume: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Export RECIPE to OUT; `fp4export --help` tells the whole story."""
    if is_bundle(output):
        export_to_bundle(
            recipe,
            output,
            overrides,
            target,
            seed,
            work_dir=work_dir,
            dry_run=dry_run,
            validate=not no_validate,
            keep_graphs=keep_graphs,
            fresh=not resume,
            progress=open_progress(quiet=quiet),
        )
        return
    refuse_lists(target, output)
    from exporter.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, target, seed)
    resolve_target(loaded.target, output)
    if dry_run:
        _print_plan(loaded, output, work_dir)
        return
    _export_recipe(
        loaded, output, work_dir, validate=not no_validate, keep_graphs=keep_graphs, fresh=not resume, quiet=quiet
    )


def _export_recipe(
    recipe: Recipe, output: str, work_dir: str | None, *, validate: bool, keep_graphs: bool, fresh: bool, quiet: bool
) -> None:
    """Export as the first of the processes that were started, or help the first one."""
    from exporter.pipeline import export as run_export
    from exporter.shards import Shard

    shard = Shard.of_environment()
    if not shard.is_first:
        _assist(recipe, output, work_dir, shard)
        return
    result = run_export(
        recipe,
        output,
        work_dir=work_dir,
        validate=validate,
        keep_graphs=keep_graphs,
        fresh=fresh,
        progress=open_progress(quiet=quiet),
        shard=shard,
    )
    if not quiet:
        _print_result(result)


def _assist(recipe: Recipe, output: str, work_dir: str | None, shard: Shard) -> None:
    """What a process beside the first one does."""
    from exporter.pipeline import assist_export

    # It writes nothing, and while it waits inside of torch Python would not get to handle a signal.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    assist_export(recipe, output, work_dir=work_dir, shard=shard)


@command.command(name="build", short_help=BUILD_SUMMARY, context_settings=_ALL_WORDS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def build(words: tuple[str, ...]) -> int:
    """Hand everything to the program that devices have."""
    return device_main(["build", *words])


@command.command(name="doctor", short_help=DOCTOR_SUMMARY, context_settings=_ALL_WORDS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def doctor(words: tuple[str, ...]) -> int:
    """Hand everything to the program that devices have."""
    return device_main(["doctor", *words])


def _print_plan(recipe: Recipe, output: str, work_dir: str | None) -> None:
    """Raises `EnvironmentLacksError` behind the plan where activations have no room."""
    from exporter.activation_room import planned_room, print_room
    from exporter.describe import describe, print_description

    console = open_console(stderr=False)
    print_description(describe(recipe, output), console)
    print_room(planned_room(recipe, output, work_dir), console)


def _print_result(result: ExportResult) -> None:
    click.echo(f"engine   {result.output}")
    click.echo(f"report   {result.report}")
    click.echo(f"metrics  {result.metrics}")
    click.echo(f"work     {result.work_dir}")


def run() -> NoReturn:
    """Run the command as this process and end it with the exit code; SIGTERM interrupts it as Ctrl-C does.

    Python kills itself by SIGINT at its end, whatever `sys.exit` says, if a KeyboardInterrupt passed through code
    that a library ran with `exec`, as torch's tracing does; so an interrupted run ends without that last step.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = main()
    if code == EXIT_INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Before torch loads: threads that spin while they wait slow everything down on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Notes on optional packages and types make no difference here; what diffusers logs as an error, it raises as well.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    debug = "--debug" in words
    try:
        return _run(words)
    except (KeyboardInterrupt, click.Abort):
        return fail(_interruption(words), EXIT_INTERRUPTED, debug=debug)
    except click.ClickException as error:
        return fail(f"{error.format_message()} (see fp4export --help)", InputError.exit_code, debug=debug)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: a defect must not look like bad input
        return fail(*describe_failure(error), debug=debug)


def _interruption(words: Sequence[str]) -> str:
    """What is said after Ctrl-C: of commands that go on where they were, that they do."""
    name = words[0] if words and words[0] in command.commands else _job_for([*words])
    kept = _KEPT.get(name)
    return f"interrupted; {kept}: run the same command again to go on" if kept else "interrupted"


def _run(words: list[str]) -> int:
    answer: Any = command.main(words, prog_name="fp4export", standalone_mode=False)
    return answer if isinstance(answer, int) else 0
