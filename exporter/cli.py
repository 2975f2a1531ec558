"""The `fp4export` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from exporter import __version__
from exporter.errors import EnvironmentLacksError, Fp4ExportError, InputError
from exporter.targets import resolve_target

if TYPE_CHECKING:
    from rich.console import Console

    from exporter.pipeline import ExportResult
    from exporter.progress import Progress

EXIT_INTERNAL = 1
EXIT_INTERRUPTED = 130

# Tables keep their columns when the output is piped to a file or a pager.
_PIPED_WIDTH = 160

_ABOUT = """Turn a diffusion transformer into a low-bit engine, with one command.

RECIPE is a YAML file or the name of a shipped recipe (digits, pixart_alpha_w4a6, pixart_sigma_w4a6). The suffix of
OUT decides what is made: .onnx runs in stock ONNX Runtime; .plan and .engine are TensorRT engines for the GPU that is
here, or for the one that --target names.

\b
Examples:
  fp4export digits -o digits.onnx
  fp4export my.yaml -o my.plan --target rtx-sm89
  fp4export my.yaml -o my.onnx --set calibration.steps=10 --set layers.0.weight=e3m0
  fp4export my.yaml -o my.plan --set compute=fp16
  fp4export my.yaml -o my.plan --dry-run
  fp4export validate digits.onnx

\b
Targets:
  auto           cpu for .onnx; for .plan the GPU that is here, else rtx-sm89
  cpu            ONNX Runtime
  TensorRT-RTX   rtx-sm75 rtx-sm80 rtx-sm86 rtx-sm89 rtx-sm120 rtx-sm121 (built without a GPU)
  TensorRT       orin l4 h100 h200 b200 thor (built on the device)

\b
Beside OUT (here NAME.onnx) it writes
  NAME.report.html   samples, noise-prediction SNR, every layer, sizes, times (of the NAME made last)
  NAME.metrics.json  the same figures for programs
  NAME.recipe.yaml   the recipe with every default filled in
  NAME.work/         finished stages: a second run, also after Ctrl-C, goes on from them
  OUT.origin.json    where `fp4export validate OUT` finds the reference

\b
Exit codes:
  0    done
  1    a defect of fp4export itself; please report it
  2    bad input: recipe, file or flag
  3    this machine lacks something (a package, a GPU, a network); finished stages are kept
  4    the validation failed; the first deviating layer is named
  130  interrupted; finished stages are kept
"""


class _ExportByDefault(click.Group):
    """A group whose words that are no command start an export: ``fp4export digits -o …``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "--version"}
        if args and args[0] not in own and args[0] not in self.commands:
            args = ["export", *args]
        return super().parse_args(ctx, args or ["--help"])

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "RECIPE -o OUT [OPTIONS]")
        formatter.write_usage(ctx.command_path, "validate FILE", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        export.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=_ExportByDefault, help=_ABOUT, context_settings={"max_content_width": 110})
@click.version_option(__version__, prog_name="fp4export")
def command() -> None:
    """Hold the commands together."""


_QUIET = click.option("--quiet", is_flag=True, help="Print nothing but errors.")
_DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


@command.command(name="export", hidden=True, short_help="Export a recipe (what happens without a command).")
@click.argument("recipe")
@click.option("-o", "--output", required=True, metavar="OUT", help="The engine: NAME.onnx, NAME.plan or NAME.engine.")
@click.option("--target", metavar="TARGET", help="The machine that OUT is for, instead of the recipe's.")
@click.option("--seed", type=int, metavar="N", help="Seed of the calibration, instead of the recipe's.")
@click.option(
    "--set", "overrides", multiple=True, metavar="A.B=C", help="Change one value of the recipe; may be repeated."
)
@click.option("--work-dir", metavar="DIR", help="Where finished stages are kept (default: NAME.work beside OUT).")
@click.option("--dry-run", is_flag=True, help="Print the plan: target, layers, formats, sizes. Writes nothing.")
@click.option("--no-validate", is_flag=True, help="Skip the comparison of the graphs with the PyTorch reference.")
@click.option("--keep-graphs", is_flag=True, help="Keep the ONNX graph after every pass, in the work folder.")
@click.option("--fresh", is_flag=True, help="Run every stage again, whatever the work folder holds.")
@_QUIET
@_DEBUG
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
    fresh: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Export RECIPE to OUT; `fp4export --help` tells the whole story."""
    from exporter.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, target, seed)
    resolve_target(loaded.target, output)
    if dry_run:
        from exporter.describe import describe, print_description

        print_description(describe(loaded, output), _console(stderr=False))
        return
    from exporter.pipeline import export as run_export

    result = run_export(
        loaded,
        output,
        work_dir=work_dir,
        validate=not no_validate,
        keep_graphs=keep_graphs,
        fresh=fresh,
        progress=_progress(quiet=quiet),
    )
    if not quiet:
        _print_result(result)


@command.command(short_help="Repeat the validation of an engine that an export wrote.")
@click.argument("file")
@_QUIET
@_DEBUG
def validate(file: str, *, quiet: bool, debug: bool) -> None:
    """Compare FILE, written by an earlier export, with the reference saved in its work folder."""
    from exporter.pipeline import validate_output

    if not Path(file).is_file():
        raise InputError(f"{file}: no such file; validate takes an output that fp4export wrote")
    validate_output(file, progress=_progress(quiet=quiet))


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_PIPED_WIDTH)


def _progress(*, quiet: bool) -> Progress:
    from exporter.progress import NullProgress, RichProgress

    return NullProgress() if quiet else RichProgress(_console(stderr=True))


def _print_result(result: ExportResult) -> None:
    click.echo(f"engine   {result.output}")
    click.echo(f"report   {result.report}")
    click.echo(f"metrics  {result.metrics}")
    click.echo(f"work     {result.work_dir}")


def run() -> NoReturn:
    """Run the command as this process and end it with the exit code.

    Python kills itself by SIGINT at its end, whatever `sys.exit` says, if a KeyboardInterrupt passed through code
    that a library ran with `exec`, as torch's tracing does; so an interrupted run ends without that last step.
    """
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
    debug = "--debug" in words
    try:
        return _run(words)
    except Fp4ExportError as error:
        return _fail(str(error), error.exit_code, debug=debug)
    except (KeyboardInterrupt, click.Abort):
        note = "interrupted; finished stages are kept in the work folder: run the same command again to go on"
        return _fail(note, EXIT_INTERRUPTED, debug=debug)
    except click.ClickException as error:
        return _fail(f"{error.format_message()} (see fp4export --help)", InputError.exit_code, debug=debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", InputError.exit_code, debug=debug)
    except ImportError as error:
        return _fail(f"a package is missing: {error}", EnvironmentLacksError.exit_code, debug=debug)
    except MemoryError:
        return _fail("this machine has too little memory", EnvironmentLacksError.exit_code, debug=debug)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: a defect must not look like bad input
        note = f"internal: {type(error).__name__}: {error}; please report it with what --debug prints"
        return _fail(note, EXIT_INTERNAL, debug=debug)


def _run(words: list[str]) -> int:
    answer: Any = command.main(words, prog_name="fp4export", standalone_mode=False)
    return answer if isinstance(answer, int) else 0


def _fail(message: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo("error: " + " ".join(line.strip() for line in message.splitlines()), err=True)
    return code
